"""The rows of a JSON file with one object a line, or of one object that holds columns or lists.

Broken JSON is repaired only if `lenient`; else the message names line and column and says what to write.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator
from typing import TextIO

from persona.convert.formats import lenient as lenient_json
from persona.convert.formats.format import Row
from persona.errors import DataError
from persona.files import JsonObject, scan_json
from persona.records import RecordFault

# How JSON that people wrote by hand is broken: a pattern at the place of the fault, the fault, the fix.
_SYMPTOMS = (
    (r"//|/\*|#", "a comment", "JSON allows no comments: delete it"),
    (r"\.\.|…", "the placeholder ...", "it was copied from documentation: delete it"),
    (r"'", "single quotes", 'write "double quotes" (json.dump writes them)'),
    (r"[“”‘’]", "curly quotes", 'write straight "double quotes"; a word processor has changed them'),
    (r"(?:True|False|None)\b", "a Python value", "write true, false or null (json.dump writes them)"),
    (r"\{|\[|\"", "a value with no comma before it", "write a comma between two values"),
    (r"[A-Za-z_]", "a word without quotes", 'write every key and text in "double quotes"'),
)


def explain(error: json.JSONDecodeError) -> tuple[str, str]:
    """The reason why JSON is broken, in words, and how to fix it."""
    rest = error.doc[error.pos :].lstrip(", \t\r\n")
    before = error.doc[: error.pos + 1].rstrip("]} \t\r\n")
    if error.msg.startswith("Nested"):
        return error.msg.lower(), "this is not a conversation: check the export"
    if error.doc[error.pos : error.pos + 1] == "," and before.rstrip(",").endswith("}"):
        return "a comma between objects", "put [ and ] around all of them, or delete the commas between the lines"
    if error.msg.startswith("Invalid control"):
        return "a line break or tab inside a text", r"write \n or \t instead"
    if error.msg.startswith("Invalid \\"):
        return "a backslash without an escape", r"write \\ for a backslash"
    if not rest or error.msg.startswith("Unterminated"):
        return "the file or line ends inside a value", "it was cut off, or a closing quote is missing: copy it again"
    if rest[0] in "]}" and before.endswith(","):
        return "a comma before a closing bracket", "delete the last comma"
    for pattern, reason, fix in _SYMPTOMS:
        if re.match(pattern, rest):
            return f"found {reason}", fix
    return f"not JSON ({error.msg.lower()})", "check the brackets, commas and quotes before this place"


_SPACE = re.compile(r"[ \t\r\n]*")
HEAD = 300  # characters of a row kept for the excerpt of a rejection
WRAPPERS = ("data", "train", "test", "validation", "valid", "val", "dev", "rows", "records", "examples", "dataset")
_WRAPPED = re.compile(rf'\s*\{{\s*"(?:{"|".join(WRAPPERS)})"\s*:\s*\[')


# The opening bracket of JSON, broken or not; `[Enter HAMLET]` and `[12:30]` are text.
_START = re.compile(
    r"""(?:\s*+(?>//[^\n]*|/\*.*?\*/|\.{3,}|…+))*+\s*+(?:\[\s*+(?:[{\["'\]/.…]|$)|\{\s*+(?:["'}/“”.…]|$))""", re.DOTALL
)


def is_json(text: str) -> bool:
    """Whether a text is meant to be JSON, well-formed or not."""
    return _START.match(text[:10_000]) is not None


def is_wrapped(head: str) -> bool:
    """Whether the file is one object whose first member is the list of rows."""
    return _WRAPPED.match(head) is not None


def one_object_a_line(head: str) -> bool:
    """Whether the first line is an object by itself, or is broken while the second line is one."""
    start = skip_space(head, 0)
    line_end = head.find("\n", start)
    if head[start : start + 1] != "{" or line_end < 0:
        return False
    try:
        return scan_json(head, start)[1] <= line_end
    except json.JSONDecodeError:
        second = skip_space(head, line_end)
    try:
        end = scan_json(head, second)[1] if head[second : second + 1] == "{" else len(head) + 1
    except json.JSONDecodeError:
        return False
    return end <= len(head) and head[end : head.find("\n", end) if "\n" in head[end:] else None].strip() == ""


def skip_space(text: str, position: int) -> int:
    """The next place without white space of JSON."""
    if text[position : position + 1] > " ":  # nearly always, and faster than the pattern
        return position
    match = _SPACE.match(text, position)
    return match.end() if match else position


def line_rows(stream: TextIO, name: str, limit: int, lenient: bool, repairs: Counter[str]) -> Iterator[Row]:
    """The rows of a file with one object a line; a broken line costs that line only."""
    number = 0
    while line := stream.readline(limit):  # split at LF only: a text may hold U+2028
        number += 1
        if len(line) >= limit:
            raise too_long(name, number, limit)
        if number == 1:
            line = line.removeprefix("\ufeff")
        line = line.rstrip("\r\n")
        position = skip_space(line, 0)
        if position == len(line):
            repairs["empty lines passed over"] += 1
        while position < len(line):
            begin = position
            try:
                value, end, fault = scan_json(line, position)
            except json.JSONDecodeError as error:
                yield _mended(line, begin, number, error) if lenient else _broken(line, begin, number, error)
                break
            position = skip_space(line, end)
            yield Row(value, number, "$", line[begin : min(end, begin + HEAD)], unsafe(fault))


def _broken(line: str, begin: int, number: int, error: json.JSONDecodeError) -> Row:
    reason, fix = explain(error)
    fault = RecordFault("NOT_JSON", "$", f"column {error.colno}: {reason}", fix)
    return Row(None, number, "$", line[begin : begin + HEAD], fault)


def _mended(line: str, begin: int, number: int, error: json.JSONDecodeError) -> Row:
    """The row of a broken line, read leniently."""
    repairs: Counter[str] = Counter()
    try:
        value, end = lenient_json.read(line, begin, repairs)
    except lenient_json.Unreadable:
        return _broken(line, begin, number, error)
    if line[lenient_json.skip(line, end, repairs) :].strip(", \t\r\n"):
        return _broken(line, begin, number, error)
    return Row(value, number, "$", line[begin : begin + HEAD], repairs=repairs)


def too_long(name: str, line: int, limit: int) -> DataError:
    """The fault of a record above --max-record."""
    size = f"{limit / 1e6:g} million characters"
    return DataError(f"{name}:{line}  a record is longer than {size}. Cut it, or raise --max-record (in millions).")


def unsafe(fault: str | None) -> RecordFault | None:
    """The fault of JSON that is well-formed and still cannot be used."""
    if fault is None:
        return None
    return RecordFault("UNSAFE_JSON", "$", fault, "write each key once, plain numbers, and fewer levels")


def columns(row: Row, name: str) -> list[Row] | None:
    """The rows of {"instruction": [...], "input": [...], "output": [...]}; None for another object."""
    if row.fault or not isinstance(row.value, dict):
        return None
    lists = {key: values for key, values in row.value.items() if isinstance(values, list)}
    if not {"instruction", "output"} <= lists.keys():
        return None
    lengths = {key: len(values) for key, values in lists.items()}
    if len(set(lengths.values())) > 1:
        raise DataError(f"{name}  the columns differ in length: {lengths}. Give each column the same number of values.")
    values = (dict(zip(lists, cells, strict=True)) for cells in zip(*lists.values(), strict=True))
    return [_inner(value, row, f"$.*[{index}]") for index, value in enumerate(values)]


def inner_rows(row: Row) -> list[Row] | None:
    """The rows of an object with lists of rows under `data`, `train`, ...; None for another object."""
    if row.fault or not isinstance(row.value, dict):
        return None
    lists = [key for key in WRAPPERS if isinstance(row.value.get(key), list)]
    if not lists or not all(isinstance(value, dict) for key in lists for value in row.value[key]):
        return None
    return [_inner(value, row, f"$.{key}[{index}]", key) for key in lists for index, value in enumerate(row.value[key])]


def _inner(value: JsonObject, row: Row, path: str, split: str | None = None) -> Row:
    return Row(value, row.line, path, json.dumps(value, ensure_ascii=False)[:HEAD], split=split)
