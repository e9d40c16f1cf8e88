"""Character cards, versions 1 to 3, as JSON or in a PNG: a system prompt, example dialogues, greetings, settings."""

import base64
import binascii
import json
import re
import zlib
from collections import Counter
from typing import Any

from persona.convert.clean import clean_text
from persona.convert.draft import Draft, Message
from persona.convert.encoding import Foreign
from persona.convert.lines import BACKGROUND, INSTRUCTIONS
from persona.convert.options import Options
from persona.convert.turns import Turn, opening, to_messages
from persona.errors import DataError
from persona.records import RecordFault

PNG = b"\x89PNG\r\n\x1a\n"
_FIELDS = ("description", "personality", "scenario")
_CHARACTER = re.compile(r"\{\{\s*char\s*\}\}|<(?:BOT|CHAR)>", re.IGNORECASE)
_USER = re.compile(r"\{\{\s*user\s*\}\}|<USER>", re.IGNORECASE)
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


def recognise(row: dict[str, Any], _options: Options) -> str | None:
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
    system = system_prompt(row, options)
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
            drafts.append(_draft([("system", system), ("user", opening(filled)), ("assistant", filled)], path, name))
    return drafts + _book(card, name, options) or [_nothing()]


def _nothing() -> Draft:
    fix = "a card needs mes_example, first_mes or a character_book to learn from"
    return Draft([], fault=RecordFault("NO_REPLY", "$", "the card holds no line of the character", fix))


def system_prompt(row: dict[str, Any], options: Options) -> str:
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
    text = _CHARACTER.sub(lambda _: name, text) if name else text
    return _USER.sub(lambda _: options.user_name or "", text) if options.user_name else text


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


def _draft(texts: list[tuple[str, str]], path: str, name: str, kind: str = "dialogue") -> Draft:
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
        chinese = any("\u3400" <= character <= "\u9fff" for character in content)
        instruction = INSTRUCTIONS[BACKGROUND] if chinese else "Background and facts about {character}."
        texts = [("system", instruction.replace("{character}", name)), ("user", prompt), ("assistant", content)]
        drafts.append(_draft(texts, f"$.character_book.entries[{index}]", name, BACKGROUND))
    return drafts


def parse(text: str, name: str) -> dict[str, Any]:
    """The card of a PNG as an object; a DataError for anything else."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict) or recognise(value, Options()) is None:
        raise DataError(f"{name}: what stands in the picture is no character card. Export it again.")
    return value
