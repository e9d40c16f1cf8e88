"""Character lines and lore: {"source_title", "speaker", "text"} and {"input": "关于「神之眼」", "speaker", "text"}.

Each record of the character is one of three kinds, decided by its `input`: background, question about the lore, or
a line of dialogue with the lines of the same title before it.
"""

import base64
import binascii
import json
import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

from persona.console import excerpt
from persona.convert.cleaning import clean_text
from persona.convert.draft import Draft, Message
from persona.convert.formats.dialogue import Speech, fold_name
from persona.convert.formats.json_rows import Row
from persona.convert.formats.scenes import prompt_of
from persona.convert.formats.turns import Turn, opening, to_messages
from persona.convert.inputs import Foreign
from persona.convert.options import Options
from persona.errors import DataError, UsageError
from persona.records import CHARACTER_MACRO, USER_MACRO, RecordFault, is_chinese

BACKGROUND, QUESTION, DIALOGUE = "lore_background", "lore_qa", "dialogue"
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


def recognise_lines(first: list[dict[str, Any]]) -> str | None:
    """Why rows are a character's lines and lore, or None."""
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


# --- card -------------------------------------------------------------------------------------------------------------
# Character cards, versions 1 to 3, as JSON or in a PNG: a system prompt, example dialogues, greetings, lore.


PNG = b"\x89PNG\r\n\x1a\n"
_FIELDS = ("description", "personality", "scenario")
_START = re.compile(r"<START>", re.IGNORECASE)
_LARGEST = 32_000_000  # bytes of a card unpacked


def card_text(data: bytes, name: str) -> str:
    """The JSON text of the card inside a PNG; the newer `ccv3` before `chara`."""
    found: dict[str, bytes] = {}
    position = len(PNG)
    while position + 12 <= len(data):
        size = int.from_bytes(data[position : position + 4], "big")
        kind, body = data[position + 4 : position + 8], data[position + 8 : position + 8 + size]
        position += 12 + size
        if kind in (b"tEXt", b"iTXt", b"zTXt"):
            keyword, _, rest = body.partition(b"\0")
            if keyword in (b"chara", b"ccv3"):
                found[keyword.decode()] = _chunk_text(kind, rest, name)
    if not found:
        raise Foreign(f"{name}: it is a picture without a character card in it.")
    try:
        text = base64.b64decode(found.get("ccv3", found.get("chara", b"")), validate=True).decode("utf-8")
    except (binascii.Error, ValueError):
        raise DataError(f"{name}: the card in the picture is damaged (no base64 of UTF-8). Export it again.") from None
    return text


def _chunk_text(kind: bytes, rest: bytes, name: str) -> bytes:
    compressed = kind == b"zTXt" or (kind == b"iTXt" and rest[:1] == b"\1")
    if kind == b"zTXt":
        rest = rest[1:]
    elif kind == b"iTXt":
        rest = rest[2:].partition(b"\0")[2].partition(b"\0")[2]
    if not compressed:
        return rest
    try:
        return zlib.decompressobj().decompress(rest, _LARGEST)
    except zlib.error:
        raise DataError(f"{name}: the card in the picture is damaged (compression). Export it again.") from None


def recognise_card(row: dict[str, Any], _options: Options) -> str | None:
    """Why the row is a character card, or None."""
    if str(row.get("spec", "")).startswith("chara_card") and isinstance(row.get("data"), dict):
        return f"character card, {row['spec']}"
    if {"name", "description", "first_mes"} <= row.keys():
        return "character card, version 1"
    return None


def card_of(row: dict[str, Any]) -> dict[str, Any]:
    """The fields of a card, wherever its version puts them."""
    return row["data"] if isinstance(row.get("data"), dict) else row


def convert(row: dict[str, Any], options: Options) -> list[Draft]:
    """The conversations of a card: a draft for each example, greeting and entry of its book."""
    card = card_of(row)
    name = str(card.get("name") or (options.characters[0] if options.characters else "")).strip()
    system = card_prompt(row, options)
    drafts: list[Draft] = []
    for index, block in enumerate(_START.split(_text(card, "mes_example"))):
        if block.strip():
            drafts.append(_example(block, index, name, system, options))
    greetings = card.get("alternate_greetings")
    texts = [_text(card, "first_mes"), *(greetings if isinstance(greetings, list) else [])]
    for index, text in enumerate(texts):
        if isinstance(text, str) and text.strip():
            path = "$.first_mes" if index == 0 else f"$.alternate_greetings[{index - 1}]"
            filled = _filled(text, name, options)
            drafts.append(
                _card_draft([("system", system), ("user", opening(filled)), ("assistant", filled)], path, name)
            )
    return drafts + _book(card, name, options) or [_nothing()]


def _nothing() -> Draft:
    fix = "a card needs mes_example, first_mes or a character_book to learn from"
    return Draft([], fault=RecordFault("NO_REPLY", "$", "the card holds no line of the character", fix))


def card_prompt(row: dict[str, Any], options: Options) -> str:
    """What the card says about the character, as one text."""
    card = card_of(row)
    name = str(card.get("name") or "").strip()
    parts = [_text(card, "system_prompt").replace("{{original}}", ""), *(_text(card, field) for field in _FIELDS)]
    text = "\n\n".join(_filled(part, name, options).strip() for part in parts if part.strip())
    return options.system or text or name


def _text(card: dict[str, Any], field: str) -> str:
    value = card.get(field)
    return value if isinstance(value, str) else ""


def _filled(text: str, name: str, options: Options) -> str:
    text = CHARACTER_MACRO.sub(lambda _: name, text) if name else text
    return USER_MACRO.sub(lambda _: options.user_name or "", text) if options.user_name else text


def _example(block: str, index: int, name: str, system: str, options: Options) -> Draft:
    """One example dialogue: lines that begin with a name begin a turn, others go on with it."""
    user = re.escape(options.user_name) if options.user_name else "user"
    mine, others = f"{{{{char}}}}|<BOT>|{re.escape(name) or 'char'}", f"{{{{user}}}}|<USER>|{user}|You"
    head = re.compile(rf"\s*(?:(?P<mine>{mine})|(?:{others}))\s*[:：]\s*(?P<text>.*)", re.IGNORECASE)
    repairs: Counter[str] = Counter()
    path = f"$.mes_example[{index}]"
    turns: list[Turn] = []
    for line in block.replace("\r\n", "\n").split("\n"):
        if found := head.fullmatch(line):
            role = "assistant" if found["mine"] else "user"
            if turns and turns[-1].role == role:
                turns[-1].content += f"\n{found['text']}"
            else:
                turns.append(Turn(role, found["text"], path))
        elif turns and line.strip():
            turns[-1].content += f"\n{line}"
    fault, messages = None, list[Message]()
    try:
        for turn in turns:
            turn.content = clean_text(_filled(turn.content, name, options), path, repairs)
        messages = to_messages(turns, clean_text(system, "$", repairs), path, repairs, options)
    except RecordFault as found:
        fault = found
    return Draft(messages, repairs, {"type": "dialogue", "character": name}, fault=fault, source_text=block[:300])


def _card_draft(texts: list[tuple[str, str]], path: str, name: str, kind: str = "dialogue") -> Draft:
    repairs: Counter[str] = Counter()
    fault, messages = None, list[Message]()
    try:
        for role, text in texts:
            if cleaned := clean_text(text, path, repairs):
                messages.append({"role": role, "content": cleaned})
    except RecordFault as found:
        fault = found
    return Draft(messages, repairs, {"type": kind, "character": name}, fault=fault, source_text=texts[-1][1][:300])


def _book(card: dict[str, Any], name: str, options: Options) -> list[Draft]:
    """The entries of the card's book: their keys ask, their content answers."""
    book = card.get("character_book")
    entries = book.get("entries") if isinstance(book, dict) else None
    entries = list(entries.values()) if isinstance(entries, dict) else entries
    drafts: list[Draft] = []
    for index, entry in enumerate(entries if isinstance(entries, list) else []):
        if not isinstance(entry, dict) or not isinstance(entry.get("content"), str):
            continue
        keys = entry.get("keys")
        keys = keys if isinstance(keys, list) else []
        prompt = ", ".join(str(key) for key in keys) or str(entry.get("name") or entry.get("comment") or name)
        content = _filled(entry["content"], name, options)
        instruction = INSTRUCTIONS[BACKGROUND] if is_chinese(content) else "Background and facts about {character}."
        texts = [("system", instruction.replace("{character}", name)), ("user", prompt), ("assistant", content)]
        drafts.append(_card_draft(texts, f"$.character_book.entries[{index}]", name, BACKGROUND))
    return drafts


def parse(text: str, name: str) -> dict[str, Any]:
    """The card of a PNG as an object; a DataError for anything else."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict) or recognise_card(value, Options()) is None:
        raise DataError(f"{name}: what stands in the picture is no character card. Export it again.")
    return value
