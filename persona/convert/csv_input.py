"""The rows of a table (CSV or TSV) as objects, whatever separates its cells; a line at a time."""

import csv
import re
from collections import Counter
from collections.abc import Iterator
from typing import TextIO

from persona.convert.json_input import Row
from persona.errors import DataError
from persona.records import RecordFault

SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars", "，": "full-width commas"}
_LOOKED_AT = 20  # lines
_HEAD = 300


def separator_of(head: str) -> str | None:
    """What separates the cells: the mark that cuts the first lines into the same number of cells, at least two."""
    best, most = None, 1
    for mark in SEPARATORS:
        try:
            lines = [row for _, row in zip(range(_LOOKED_AT), csv.reader(_lines(head), delimiter=mark), strict=False)]
        except csv.Error:
            continue
        lines = [row for row in lines if row]
        if len(head) > 100_000 and len(lines) < _LOOKED_AT:
            lines = lines[:-1]  # cut off in the middle
        width = len(lines[0]) if lines else 0
        agreeing = sum(abs(len(row) - width) <= (width > 8) for row in lines)  # old WeChat exports have one value more
        if width > most and len(lines) > 1 and agreeing >= 0.8 * len(lines):
            best, most = mark, width
    return best


def _lines(head: str) -> list[str]:
    return re.split(r"(?<=\n)", head)


def header_of(head: str, separator: str) -> list[str]:
    """The names in the first line."""
    try:
        cells = next(csv.reader(_lines(head), delimiter=separator), [])
    except csv.Error:
        return []
    return [cell.strip().removeprefix("\ufeff") for cell in cells]


def table_rows(stream: TextIO, name: str, separator: str, limit: int, repairs: Counter[str]) -> Iterator[Row]:
    """The rows below the header; one with more or fewer cells than the header has is a fault of that row."""
    csv.field_size_limit(limit)
    reader = csv.reader(stream, delimiter=separator)
    try:
        header = [cell.strip().removeprefix("\ufeff") for cell in next(reader, [])]
        line = reader.line_num + 1
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                repairs["empty lines passed over"] += 1
            else:
                yield _row(header, cells, line, separator)
            line = reader.line_num + 1
    except csv.Error as error:
        fix = f"Check the quotes; cells are separated by {SEPARATORS[separator]}."
        raise DataError(f"{name}:{reader.line_num}  not a table: {error}. {fix}") from None


def _row(header: list[str], cells: list[str], line: int, separator: str) -> Row:
    fault = None
    extra = cells[len(header) :]
    if any(cell.strip() for cell in extra[1:]) or (extra and len(header) < 6):  # old WeChat exports have one more
        reason = f"{len(cells)} cells where the header has {len(header)}"
        fault = RecordFault("CELLS", "$", reason, "put texts that hold the separator or line breaks into quotes")
    value = dict(zip(header, [*cells, *[""] * (len(header) - len(cells))], strict=False))
    return Row(value, line, "$", separator.join(cells)[:_HEAD], fault)
