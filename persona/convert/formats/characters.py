"""Formats about one character: its lines and lore from a game or story, and character cards of role-play programs.

Character lines are {"source_title", "speaker", "text"} or {"input": "关于「神之眼」", "speaker", "text"}. Their `input`
tells background, questions about the lore, and lines of dialogue, whose context is the lines before them with the same
title. Cards (versions 1 to 3, JSON or PNG) hold a system prompt, example dialogues, greetings and lore.
"""

import base64
import re
import struct
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from persona.console import excerpt
from persona.convert.cleaning import clean_text, fill
from persona.convert.draft import Draft
from persona.convert.formats.format import Contents, FileFormat, Packing, Row, RowFormat
from persona.convert.formats.json_rows import unsafe
from persona.convert.formats.scenes import Speech, fold_name, prompt_of
from persona.convert.formats.turns import Turn, opening, to_messages
from persona.convert.inputs import Foreign
from persona.convert.ledger import Counts
from persona.convert.options import Options
from persona.errors import DataError, UsageError
from persona.files import JsonObject, scan_json
from persona.records import CHARACTER_MACRO, USER_MACRO, RecordFault, is_chinese

BACKGROUND, QUESTION, DIALOGUE = "lore_background", "lore_qa", "dialogue"
INSTRUCTIONS = {
    BACKGROUND: "以下是关于{character}的背景故事和设定描述。",
    QUESTION: "你现在是{character}。请根据你的背景设定回答问题。",
    DIALOGUE: "你现在是{character}。请模仿{character}的语气、口癖和性格进行对话。",
}
_BACKGROUND = re.compile(r"(?:更多描述|角色详细)\d*|角色故事\d+|神之眼")
_KINDS = {  # lines that are not speech, for --drop-lines; a stage note is in brackets too, so it is before the thoughts
    "notes": ("stage note", re.compile(r"（[^（）]{0,12}(?:选项|触发|分支|旁白|任务|提示)[^（）]{0,12}）")),
    "silence": ("line of dots only", re.compile(r"[….。·—\-~～\s]+")),
    "marks": ("leftover mark", re.compile(r"[#*_=|/\\\s]+")),
    "thoughts": ("inner thoughts in brackets", re.compile(r"（[^（）]*）|\([^()]*\)", re.DOTALL)),
}
_DESCRIPTIONS = ("description", "personality", "scenario")
_START = re.compile(r"<START>", re.IGNORECASE)
_AGAIN = "Export the card again as PNG."


@dataclass
class Lines(Contents):
    """The rows of a file of character lines; other speakers' lines are context. A single speaker is the character."""

    rows: list[Row]

    def __post_init__(self) -> None:
        self.speakers.update(row.value["speaker"].strip() for row in self.rows if _is_line(row))
        self.character = next(iter(self.speakers)) if len(self.speakers) == 1 else None

    def drafts(self, options: Options, counts: Counts) -> Iterator[Draft]:
        """A draft for each line of the character, in the order of the file."""
        if not options.characters:
            raise UsageError("The file has several speakers. Name the one to learn with --character.")
        counts.speeches += self.speakers.total()
        counts.system_prompt = options.system or INSTRUCTIONS[DIALOGUE].replace("{character}", options.characters[0])
        names = {fold_name(name) for name in options.characters}
        before: dict[str, list[Speech]] = defaultdict(list)
        for row in self.rows:
            if not _is_line(row):
                fix = 'write "speaker" and "text" as texts'
                fault = row.fault or RecordFault("MISSING", "$", "found no speaker or no text", fix)
                yield Draft([], line=row.line, path=row.path, fault=fault, source_text=row.text)
                continue
            title, prompt = (str(row.value.get(key) or "") for key in ("source_title", "input"))
            prompt = prompt.strip()
            speech = Speech(row.value["speaker"].strip(), row.value["text"].strip(), row.line, 0)
            mine = fold_name(speech.speaker) in names
            if reason := _dropped(speech.text, options.drop_lines):
                counts.not_used[reason] += 1
                continue
            if mine:
                context = before[title][-options.context_turns :] if title else []
                yield _line_draft(speech, row, prompt, title, context, options)
            else:
                counts.not_used["spoken by others, context of what follows"] += 1
            if not prompt and title:
                before[title].append(speech)
                del before[title][: -options.context_turns]


def _are_lines(first: list[JsonObject]) -> str | None:
    keys = ({"speaker", "text", "source_title"}, {"speaker", "text", "input"})
    if all(any(needed <= row.keys() for needed in keys) for row in first):
        return 'rows have "speaker", "text" and "source_title" or "input"'
    return None


def _is_line(row: Row) -> bool:
    return all(isinstance(row.value.get(key), str) for key in ("speaker", "text"))


def _dropped(text: str, kinds: tuple[str, ...]) -> str | None:
    """The kind of a line that is left out, in words, or None."""
    matching = (name for kind, (name, pattern) in _KINDS.items() if kind in kinds and text and pattern.fullmatch(text))
    return next(matching, None)


def _line_draft(speech: Speech, row: Row, prompt: str, title: str, before: list[Speech], options: Options) -> Draft:
    character = options.characters[0]
    kind = DIALOGUE
    if prompt:  # 神之眼 is the title of a story, 关于「神之眼」 a question
        kind = BACKGROUND if prompt in options.background or _BACKGROUND.fullmatch(prompt) else QUESTION
    else:
        names = {fold_name(name) for name in options.characters}
        spoken = [one for one in before if one.text]
        others = any(fold_name(one.speaker) not in names for one in spoken)
        prompt = prompt_of(spoken) if others else opening(speech.text)
    own = options.system if kind == DIALOGUE else None
    instruction = own or INSTRUCTIONS[kind].replace("{character}", character)
    meta = {"type": kind, "character": character} | ({"title": excerpt(title, 80)} if title else {})
    group = f"title-{title}" if kind == DIALOGUE and title else ""
    draft = Draft([], Counter(), meta, group, row.line, row.path, None, row.text, learned=1)
    if not speech.text:
        draft.fault = RecordFault("EMPTY", "$.text", "found no text", "write the text, or delete the row")
        return draft
    return fill(draft, (("system", instruction), ("user", prompt), ("assistant", speech.text)), "$.text")


def _is_card(row: JsonObject, _options: Options) -> str | None:
    if str(row.get("spec", "")).startswith("chara_card") and isinstance(row.get("data"), dict):
        return f"character card, {row['spec']}"
    return "character card, version 1" if {"name", "description", "first_mes"} <= row.keys() else None


def _fields(row: JsonObject) -> JsonObject:
    """The fields of a card, wherever its version puts them."""
    return row["data"] if isinstance(row.get("data"), dict) else row


def _card(row: JsonObject, options: Options) -> list[Draft]:
    """The conversations of a card: a draft for each example, greeting and entry of its book."""
    card = _fields(row)
    name = str(card.get("name") or (options.characters[0] if options.characters else "")).strip()
    system = _card_prompt(row, options)
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
            drafts.append(_card_draft((system, opening(filled), filled), path, name))
    drafts += _book(card, name, options)
    if not drafts:
        fix = "write mes_example, first_mes or a character_book: the model learns from these"
        fault = RecordFault("NO_REPLY", "$", "found no line of the character in the card", fix)
        return [Draft([], fault=fault)]
    return drafts


def _card_prompt(row: JsonObject, options: Options) -> str:
    """The system prompt of the card and its description of the character, as one text."""
    card = _fields(row)
    name = str(card.get("name") or "").strip()
    parts = [_text(card, "system_prompt").replace("{{original}}", ""), *(_text(card, key) for key in _DESCRIPTIONS)]
    text = "\n\n".join(_filled(part, name, options).strip() for part in parts if part.strip())
    return options.system or text or name


def _text(card: JsonObject, field: str) -> str:
    value = card.get(field)
    return value if isinstance(value, str) else ""


def _filled(text: str, name: str, options: Options) -> str:
    text = CHARACTER_MACRO.sub(lambda _: name, text) if name else text
    return USER_MACRO.sub(lambda _: options.user_name or "", text) if options.user_name else text


def _example(block: str, index: int, name: str, system: str, options: Options) -> Draft:
    """One example dialogue: a line that begins with a name begins a turn, other lines continue it."""
    user = re.escape(options.user_name) if options.user_name else "user"
    mine, others = f"{{{{char}}}}|<BOT>|{re.escape(name) or 'char'}", f"{{{{user}}}}|<USER>|{user}|You"
    head = re.compile(rf"\s*(?:(?P<mine>{mine})|(?:{others}))\s*[:：]\s*(?P<text>.*)", re.IGNORECASE)
    path = f"$.mes_example[{index}]"
    turns: list[Turn] = []
    for line in block.replace("\r\n", "\n").split("\n"):
        if named := head.fullmatch(line):
            role = "assistant" if named["mine"] else "user"
            if turns and turns[-1].role == role:
                turns[-1].content += f"\n{named['text']}"
            else:
                turns.append(Turn(role, named["text"], path))
        elif turns and line.strip():
            turns[-1].content += f"\n{line}"
    draft = Draft([], meta={"type": "dialogue", "character": name}, source_text=block[:300])
    try:
        for turn in turns:
            turn.content = clean_text(_filled(turn.content, name, options), path, draft.repairs)
        system = clean_text(system, "$", draft.repairs)
        draft.messages = to_messages(turns, system, path, draft.repairs, options)
    except RecordFault as fault:
        draft.fault = fault
    return draft


def _card_draft(texts: tuple[str, str, str], path: str, name: str, kind: str = "dialogue") -> Draft:
    draft = Draft([], meta={"type": kind, "character": name}, source_text=texts[-1][:300])
    messages = zip(("system", "user", "assistant"), texts, strict=True)
    return fill(draft, (message for message in messages if message[1].strip()), path)


def _book(card: JsonObject, name: str, options: Options) -> list[Draft]:
    """The entries of the card's lore book: their keys are the prompt, their content the reply."""
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
        texts = (instruction.replace("{character}", name), prompt, content)
        drafts.append(_card_draft(texts, f"$.character_book.entries[{index}]", name, BACKGROUND))
    return drafts


def _unpack(path: Path, name: str) -> Row:
    """The card in a PNG picture; the newer `ccv3` before `chara`."""
    text = _packed_text(path, name)
    try:
        text = base64.b64decode(text, validate=True).decode("utf-8").strip()
        value, end, fault = scan_json(text)
    except ValueError:
        raise DataError(f"{name}: the card in the picture is damaged (not JSON in base64). {_AGAIN}") from None
    if end < len(text) or not isinstance(value, dict) or _is_card(value, Options()) is None:
        raise DataError(f"{name}: the picture holds JSON that is not a character card. {_AGAIN}")
    return Row(value, 1, "$", "", unsafe(fault))


def _packed_text(path: Path, name: str) -> str:
    from PIL import Image, PngImagePlugin  # takes 50 ms, and few conversions have pictures

    most = Image.MAX_IMAGE_PIXELS or 0
    try:
        with PngImagePlugin.PngImageFile(path) as image:
            if image.width * image.height > most:
                pixels = f"{image.width:,} x {image.height:,}"
                raise Foreign(f"{name}: the picture has {pixels} pixels, more than {most:,}. {_AGAIN}")
            texts = image.text  # decodes the pixels first, because SillyTavern writes its cards behind them
    except (OSError, SyntaxError, ValueError, struct.error) as error:
        raise Foreign(f"{name}: the picture is damaged or holds too much text ({error}). {_AGAIN}") from None
    if not texts.keys() & {"ccv3", "chara"}:
        raise Foreign(f"{name}: the picture holds no character card.")
    return texts.get("ccv3") or texts["chara"]


LINES = FileFormat("lines", _are_lines, lambda rows, _: Lines(rows), header=lambda row, _: _are_lines([row]))
CARD = RowFormat(
    "card", _is_card, _card, system_prompt=_card_prompt, packing=Packing("PNG", b"\x89PNG\r\n\x1a\n", _unpack)
)
