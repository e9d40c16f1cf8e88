"""JSON as people paste it, with comments, trailing commas, Python literals and quotes of every kind.

Only --lenient reads it, and only after strict JSON has failed. Every repair is counted by its name.
"""

import re
from collections import Counter
from typing import Any

from persona.files import MAX_DEPTH, JsonObject

_SKIPPED = re.compile(r"[ \t\r\n\ufeff]+|(?P<comment>//[^\n]*|/\*.*?\*/|#[^\n]*)|(?P<dots>\.{3,}|…+)", re.DOTALL)
_WORD = re.compile(r"[^\s,:\[\]{}\"'“”‘’]+")
_NUMBER = re.compile(r"-?(?:0|[1-9]\d{0,300})(?:\.\d+)?(?:[eE][+-]?\d{1,3})?")
_CLOSING = {'"': '"', "'": "'", "“": "”", "‘": "’"}
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "/": "/", "\\": "\\", '"': '"', "'": "'", "\n": ""}
_LITERALS = {"true": True, "false": False, "null": None, "True": True, "False": False, "None": None}


class Unreadable(ValueError):
    """The place where even lenient reading fails."""

    def __init__(self, reason: str, position: int) -> None:
        super().__init__(reason)
        self.reason, self.position = reason, position


def skip(text: str, position: int, repairs: Counter[str]) -> int:
    """The next place after white space, comments and placeholders."""
    while match := _SKIPPED.match(text, position):
        if match["comment"]:
            repairs["JSON: comment dropped"] += 1
        elif match["dots"]:
            repairs["JSON: placeholder ... dropped"] += 1
        position = match.end()
    return position


def read(text: str, position: int, repairs: Counter[str], depth: int = 0) -> tuple[Any, int]:
    """The value at `position` and where it ends; Unreadable names the place of a fault."""
    position = skip(text, position, repairs)
    mark = text[position : position + 1]
    if depth > MAX_DEPTH:
        raise Unreadable(f"nested deeper than {MAX_DEPTH} levels", position)
    if mark == "{":
        return _members(text, position + 1, repairs, depth)
    if mark == "[":
        return _items(text, position + 1, repairs, depth)
    if mark in _CLOSING and mark:
        return _string(text, position, repairs)
    if number := _NUMBER.match(text, position):
        written = number[0]
        return (int(written) if written.lstrip("-").isdigit() else float(written)), number.end()
    word = _WORD.match(text, position)
    if word and word[0] in _LITERALS:
        if word[0][0] in "TFN":
            repairs["JSON: Python value rewritten"] += 1
        return _LITERALS[word[0]], word.end()
    raise Unreadable("no value here" if mark else "the file or line ends inside a value", position)


def _members(text: str, position: int, repairs: Counter[str], depth: int) -> tuple[JsonObject, int]:
    members: JsonObject = {}
    while True:
        position, ended = _next_item(text, position, "}", repairs, bool(members))
        if ended:
            return members, position
        key, position = _key(text, position, repairs)
        position = skip(text, position, repairs)
        if text[position : position + 1] not in (":", "："):
            raise Unreadable("a colon is missing after a key", position)
        if key in members:
            raise Unreadable("a key is there twice in one object", position)
        members[key], position = read(text, position + 1, repairs, depth + 1)


def _items(text: str, position: int, repairs: Counter[str], depth: int) -> tuple[list[Any], int]:
    items: list[Any] = []
    while True:
        position, ended = _next_item(text, position, "]", repairs, bool(items))
        if ended:
            return items, position
        value, position = read(text, position, repairs, depth + 1)
        items.append(value)


def _next_item(text: str, position: int, closing: str, repairs: Counter[str], later: bool) -> tuple[int, bool]:
    """The place of the next item, or after the closing bracket; and whether this is the end."""
    position = skip(text, position, repairs)
    comma = text[position : position + 1] == ","
    if comma:
        position = skip(text, position + 1, repairs)
    if text[position : position + 1] == closing:
        repairs["JSON: comma before a closing bracket dropped"] += comma
        return position + 1, True
    if later and not comma and position < len(text):
        repairs["JSON: missing comma added"] += 1
    return position, False


def _key(text: str, position: int, repairs: Counter[str]) -> tuple[str, int]:
    if text[position : position + 1] in _CLOSING and position < len(text):
        return _string(text, position, repairs)
    if word := _WORD.match(text, position):
        repairs["JSON: quotes added around a key"] += 1
        return word[0], word.end()
    raise Unreadable("no key here" if position < len(text) else "the file or line ends inside a value", position)


def _string(text: str, position: int, repairs: Counter[str]) -> tuple[str, int]:
    opening, parts, start = text[position], [], position + 1
    stop = re.compile(rf"[\\{_CLOSING[opening]}\n\t]")
    if opening != '"':
        repairs["JSON: quotes made straight and double"] += 1
    while match := stop.search(text, start):
        parts.append(text[start : match.start()])
        if match[0] in "\n\t":
            repairs["JSON: line break or tab inside a text kept"] += 1
            parts.append(match[0])
        elif match[0] == "\\":
            part, start = _escape(text, match.end())
            parts.append(part)
            continue
        else:
            return "".join(parts), match.end()
        start = match.end()
    raise Unreadable("the file or line ends inside a text", position)


def _escape(text: str, position: int) -> tuple[str, int]:
    mark = text[position : position + 1]
    if mark == "u" and re.fullmatch("[0-9a-fA-F]{4}", text[position + 1 : position + 5]):
        code, end = int(text[position + 1 : position + 5], 16), position + 5
        low = re.match(r"\\u([dD][c-fC-F][0-9a-fA-F]{2})", text[end : end + 6])
        if 0xD800 <= code < 0xDC00 and low:
            return chr(0x10000 + ((code - 0xD800) << 10) + int(low[1], 16) - 0xDC00), end + 6
        return chr(code), end
    if mark in _ESCAPES and mark:
        return _ESCAPES[mark], position + 1
    raise Unreadable("a backslash without an escape", position)
