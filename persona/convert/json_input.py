"""The rows of a JSON file with their line numbers: an array, one object a line, objects one after another, or columns.

Broken JSON is never repaired here: the message names line and column and says what to write.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from persona.errors import DataError
from persona.records import RecordFault, scan_json

_SPACE = re.compile(r"[ \t\r\n]*")
_HEAD = 300  # characters of a row kept for the excerpt of a rejection


@dataclass(frozen=True)
class Row:
    """One value of the file and its place; with a `fault` it cannot be used."""

    value: Any
    line: int
    path: str
    text: str
    fault: RecordFault | None = None


def read_rows(text: str, name: str) -> tuple[list[Row], str]:
    """All rows of `text`, and in words how the file is laid out."""
    start = _skip(text, 0)
    if text[start : start + 1] == "{" and _one_object_a_line(text, start):
        rows, layout = list(_line_rows(text)), "one JSON object a line"
    else:
        try:
            rows, layout = list(_value_rows(text, start)), "JSON array" if text[start] == "[" else "JSON objects"
        except json.JSONDecodeError as error:
            reason, fix = explain(error)
            raise DataError(f"{name}:{error.lineno}:{error.colno}  {reason}. {fix}.") from None
    if len(rows) == 1 and isinstance(rows[0].value, dict) and text[start] == "{":
        rows, layout = _columns(rows[0], name) or (rows, "one JSON object")
    if not rows:
        raise DataError(f"{name} holds no records: {text.strip()[:20]!r}. Give a file that holds conversations.")
    return rows, layout


def _skip(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    return match.end() if match else position


def _one_object_a_line(text: str, start: int) -> bool:
    """Whether the first line is an object by itself, or is broken while the second line is one."""
    line_end = text.find("\n", start)
    if line_end < 0:
        return False
    try:
        return scan_json(text, start)[1] <= line_end
    except json.JSONDecodeError:
        second = _skip(text, line_end)
    try:
        end = scan_json(text, second)[1] if text[second : second + 1] == "{" else len(text) + 1
    except json.JSONDecodeError:
        return False
    return end <= len(text) and text[end : text.find("\n", end) if "\n" in text[end:] else None].strip() == ""


def _line_rows(text: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines(): U+2028 may stand inside a text
        position = _skip(line, 0)
        while position < len(line):
            begin = position
            try:
                value, end, fault = scan_json(line, position)
            except json.JSONDecodeError as error:
                reason, fix = explain(error)
                fault = RecordFault("NOT_JSON", "$", f"column {error.colno}: {reason}", fix)
                yield Row(None, number, "$", line[begin : begin + _HEAD], fault)
                break
            position = _skip(line, end)
            yield Row(value, number, "$", line[begin : min(end, begin + _HEAD)], _unsafe(fault))


def _value_rows(text: str, start: int) -> Iterator[Row]:
    """The rows of all values in `text`, the elements of an array being a row each."""
    position, counted, line, index = start, 0, 1, 0
    inside, after_comma = False, False
    while True:
        if not inside and position >= len(text):
            return
        mark = text[position : position + 1]
        if mark == "[" and not inside:
            inside, position, after_comma = True, _skip(text, position + 1), False
            continue
        if mark == "]" and inside and not after_comma:
            inside, position = False, _skip(text, position + 1)
            continue
        value, end, fault = scan_json(text, position)
        line, counted = line + text.count("\n", counted, position), position
        yield Row(
            value, line, f"$[{index}]" if inside else "$", text[position : min(end, position + _HEAD)], _unsafe(fault)
        )
        index += 1
        position = _skip(text, end)
        after_comma = inside and text[position : position + 1] == ","
        if after_comma:
            position = _skip(text, position + 1)
        elif inside and text[position : position + 1] != "]":
            raise json.JSONDecodeError("Expecting ',' delimiter", text, position)


def _unsafe(fault: str | None) -> RecordFault | None:
    return (
        RecordFault("UNSAFE_JSON", "$", fault, "write each key once, plain numbers, and fewer levels")
        if fault
        else None
    )


def _columns(row: Row, name: str) -> tuple[list[Row], str] | None:
    """The rows of {"instruction": [...], "input": [...], "output": [...]}; None if the object is not of that kind."""
    columns = {key: values for key, values in row.value.items() if isinstance(values, list)}
    if row.fault or not {"instruction", "output"} <= columns.keys():
        return None
    lengths = {key: len(values) for key, values in columns.items()}
    if len(set(lengths.values())) > 1:
        raise DataError(f"{name}  the columns differ in length: {lengths}. Give each column the same number of values.")
    rows = [
        Row(
            value := dict(zip(columns, cells, strict=True)),
            row.line,
            f"$.*[{index}]",
            json.dumps(value, ensure_ascii=False)[:_HEAD],
        )
        for index, cells in enumerate(zip(*columns.values(), strict=True))
    ]
    return rows, "JSON columns"


_SYMPTOMS = (
    (r"//|/\*|#", "a comment", "JSON has none: delete it, and the placeholder it may stand for"),
    (r"\.\.|…", "the placeholder ...", "it comes from a documentation: delete it"),
    (r"'", "single quotes", 'write "double quotes" (json.dump writes them)'),
    (r"[“”‘’]", "curly quotes", 'write straight "double quotes"; a word processor has changed them'),
    (r"(?:True|False|None)\b", "a Python value", "write true, false or null (json.dump writes them)"),
    (r"\{|\[|\"", "a value with no comma before it", "write a comma between two values"),
    (r"[A-Za-z_]", "a word without quotes", 'write every key and text in "double quotes"'),
)


def explain(error: json.JSONDecodeError) -> tuple[str, str]:
    """What a person did to make this JSON broken, and how to mend it."""
    rest = error.doc[error.pos :].lstrip(", \t\r\n")
    before = error.doc[: error.pos + 1].rstrip("]} \t\r\n")
    if error.msg.startswith("Nested"):
        return error.msg.lower(), "this is no conversation: check the export"
    if error.doc[error.pos : error.pos + 1] == "," and before.rstrip(",").endswith("}"):
        return "a comma between objects", "put [ and ] around all of them, or delete the commas between the lines"
    if error.msg.startswith("Invalid control"):
        return "a line break or tab inside a text", r"write \n or \t instead"
    if error.msg.startswith("Invalid \\"):
        return "a backslash that begins nothing", r"write \\ for a backslash"
    if not rest or error.msg.startswith("Unterminated"):
        return "the file or line ends inside a value", "it was cut off, or a closing quote is missing: copy it again"
    if rest[0] in "]}" and before.endswith(","):
        return "a comma before a closing bracket", "delete the last comma"
    for pattern, found, fix in _SYMPTOMS:
        if re.match(pattern, rest):
            return f"found {found}", fix
    return f"not JSON ({error.msg.lower()})", "check the brackets, commas and quotes before this place"
