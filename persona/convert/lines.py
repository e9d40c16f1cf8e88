"""Character lines and settings: {"source_title", "speaker", "text"} and {"input": "关于「神之眼」", "speaker", "text"}.

Each record of the character is one of three kinds, decided by its `input`: background, question about the settings, or
a line of dialogue with the lines of the same title before it.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

from persona.console import excerpt
from persona.convert.clean import clean_text
from persona.convert.dialogue import Speech, fold_name
from persona.convert.draft import Draft, Message
from persona.convert.json_input import Row
from persona.convert.options import Options
from persona.convert.scenes import prompt_of
from persona.convert.turns import opening
from persona.errors import UsageError
from persona.records import RecordFault

BACKGROUND, QUESTION, DIALOGUE = "settings_background", "settings_qa", "dialogue"
INSTRUCTIONS = {
    BACKGROUND: "以下是关于{character}的背景故事和设定描述。",
    QUESTION: "你现在是{character}。请根据你的背景设定回答问题。",
    DIALOGUE: "你现在是{character}。请模仿{character}的语气、口癖和性格进行对话。",
}
_BACKGROUND = re.compile(r"(?:更多描述|角色详细)\d*|角色故事\d+|神之眼")
_KINDS = {  # what real files hold besides speech; --drop-lines says which kinds are left out
    "thoughts": re.compile(r"（[^（）]*）|\([^()]*\)", re.DOTALL),
    "notes": re.compile(r"（[^（）]{0,12}(?:选项|触发|分支|旁白|任务|提示)[^（）]{0,12}）"),
    "silence": re.compile(r"[….。·—\-~～\s]+"),
    "marks": re.compile(r"[#*_=|/\\\s]+"),
}
_NAMES = {
    "thoughts": "inner thoughts in brackets",
    "notes": "stage note",
    "silence": "line of dots only",
    "marks": "leftover mark",
}


def recognise(first: list[dict[str, Any]]) -> str | None:
    """Why rows are a character's lines and settings, or None."""
    keys = ({"speaker", "text", "source_title"}, {"speaker", "text", "input"})
    if all(any(needed <= row.keys() for needed in keys) for row in first):
        return 'rows have "speaker", "text" and "source_title" or "input"'
    return None


def speakers(rows: list[Row]) -> Counter[str]:
    """How many records each speaker has."""
    return Counter(row.value["speaker"].strip() for row in rows if _is_line(row))


def _is_line(row: Row) -> bool:
    value = row.value
    return isinstance(value, dict) and all(isinstance(value.get(key), str) for key in ("speaker", "text"))


def kind_of(prompt: str, background: tuple[str, ...]) -> str:
    """The kind of a record by its `input`."""
    if not prompt:
        return DIALOGUE
    # whole, for 神之眼 is the title of a story and 关于「神之眼」 a question
    return BACKGROUND if prompt in background or _BACKGROUND.fullmatch(prompt) else QUESTION


def drafts(rows: list[Row], options: Options, not_used: Counter[str]) -> Iterator[Draft]:
    """The drafts of the character's records, in the order of the file; other speakers' lines are context."""
    names = {fold_name(name) for name in options.characters}
    if not options.characters:
        raise UsageError("The file has several speakers: --character must say whose lines are learned.")
    before: dict[str, list[Speech]] = defaultdict(list)
    for row in rows:
        if not _is_line(row):
            fault = RecordFault("MISSING", "$", "found no speaker or no text", 'write "speaker" and "text" as texts')
            yield Draft([], line=row.line, path=row.path, fault=row.fault or fault, source_text=row.text)
            continue
        value = row.value
        title = str(value.get("source_title") or "")
        prompt = str(value.get("input") or "").strip()
        dropped = _dropped(value["text"].strip(), options.drop_lines)
        mine = fold_name(value["speaker"]) in names
        if dropped:
            not_used[dropped] += 1
            continue
        speech = Speech(value["speaker"].strip(), value["text"].strip(), row.line, 0)
        if mine:
            yield _draft(speech, row, prompt, title, before[title][-options.context_turns :] if title else [], options)
        if not prompt and title:
            before[title].append(speech)
            del before[title][: -options.context_turns]
        if not mine:
            not_used["spoken by others, context of what follows"] += 1


def _dropped(text: str, kinds: tuple[str, ...]) -> str | None:
    for kind in ("notes", "silence", "marks", "thoughts"):
        if kind in kinds and text and _KINDS[kind].fullmatch(text):
            return _NAMES[kind]
    return None


def _draft(speech: Speech, row: Row, prompt: str, title: str, before: list[Speech], options: Options) -> Draft:
    character = options.characters[0]
    kind = kind_of(prompt, options.background)
    repairs: Counter[str] = Counter()
    names = {fold_name(name) for name in options.characters}
    if kind == DIALOGUE:
        spoken = [one for one in before if one.text]
        others = any(fold_name(one.speaker) not in names for one in spoken)
        prompt = prompt_of(spoken) if others else opening(speech.text)
    instruction = INSTRUCTIONS[kind].replace("{character}", character)
    if kind == DIALOGUE and options.system:
        instruction = options.system
    fault, messages = None, list[Message]()
    try:
        if not speech.text:
            raise RecordFault("EMPTY", "$.text", "found no text", "write the words, or delete the row")
        texts = (("system", instruction), ("user", prompt), ("assistant", speech.text))
        messages = [{"role": role, "content": clean_text(text, "$.text", repairs)} for role, text in texts]
    except RecordFault as found:
        fault = found
    meta = {"type": kind, "character": character}
    if title:
        meta["title"] = excerpt(title, 80)
    group = f"title-{title}" if kind == DIALOGUE and title else ""
    return Draft(messages, repairs, meta, group, row.line, row.path, fault, row.text, learned=1)


def system_prompt(options: Options) -> str | None:
    """What chat speaks with when records like these were learned."""
    if options.system or not options.characters:
        return options.system
    return INSTRUCTIONS[DIALOGUE].replace("{character}", options.characters[0])
