"""Tables (CSV, TSV) read row by row, and the questions with answers that they mostly hold, in JSON too."""

import csv
from collections import Counter
from collections.abc import Iterator
from io import StringIO
from itertools import islice
from typing import TextIO

from persona.convert.draft import Draft, extras
from persona.convert.formats.format import Row, RowFormat
from persona.convert.formats.json_rows import HEAD
from persona.convert.formats.turns import Turn, content_of, history_turns, optional_text, to_messages
from persona.convert.options import Options
from persona.errors import DataError
from persona.files import JsonObject
from persona.records import RecordFault

PROMPTS = ("question", "prompt", "query", "input", "user", "问题", "提问", "问")
RESPONSES = ("answer", "response", "target", "output", "completion", "reply", "回答", "答案", "答")
CONTEXTS = ("context", "background", "上下文", "背景")
SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars", "，": "full-width commas"}
_LOOKED_AT = 20  # lines


def columns_of(keys: list[str], options: Options) -> tuple[str, str, str | None] | None:
    """The columns of prompt, response and context, by the options or by name; None if one is missing."""
    folded = {key.strip().casefold(): key for key in reversed(keys)}
    chosen = (options.prompt_col, options.response_col, options.context_col)
    prompt, response, context = (
        folded.get(name.strip().casefold()) if name else next((folded[one] for one in known if one in folded), None)
        for name, known in zip(chosen, (PROMPTS, RESPONSES, CONTEXTS), strict=True)
    )
    if prompt is None or response is None or (options.context_col and context is None):
        return None
    return prompt, response, context


def _recognise(row: JsonObject, options: Options) -> str | None:
    if "chosen" in row and "rejected" in row:
        return None
    columns = columns_of(list(row), options)
    return f'rows have "{columns[0]}" and "{columns[1]}"' if columns else None


def _read(row: JsonObject, options: Options) -> Draft:
    """The history, the question with its context, and the answer of one row."""
    repairs: Counter[str] = Counter()
    columns = columns_of(list(row), options)
    if columns is None:
        reason = f"found the columns {', '.join(map(str, row))[:80]}"
        raise RecordFault("COLUMNS", "$", reason, "name them with --prompt-col, --response-col and --context-col")
    prompt, response, context = columns
    turns = history_turns(row.get("history"), repairs)
    parts = [_cell(row.get(context), f"$.{context}", repairs)] if context else []
    parts.append(_cell(row[prompt], f"$.{prompt}", repairs))
    turns.append(Turn("user", "\n".join(part for part in parts if part), f"$.{prompt}"))
    turns.append(Turn("assistant", _cell(row[response], f"$.{response}", repairs), f"$.{response}"))
    system = optional_text(row, "system", repairs)
    known = frozenset(name for name in (prompt, response, context, "system", "history", "split") if name)
    return Draft(to_messages(turns, system, "$", repairs, options), repairs, extras(row, known, repairs))


def _cell(value: object, path: str, repairs: Counter[str]) -> str:
    """The text of a cell; "" for an empty one."""
    if value is None or value == "":
        repairs["empty cells"] += 1
        return ""
    return content_of(value, path, repairs)


def separator_of(head: str) -> str | None:
    """The mark that cuts the first lines into the same number of cells, at least two; None without one."""
    best, most = None, 1
    for mark in SEPARATORS:
        try:
            lines = list(filter(None, islice(csv.reader(StringIO(head), delimiter=mark), _LOOKED_AT)))
        except csv.Error:
            continue
        if len(head) > 100_000 and len(lines) < _LOOKED_AT:
            lines = lines[:-1]  # the head may end inside this line
        width = len(lines[0]) if lines else 0
        agreeing = sum(abs(len(row) - width) <= (width > 8) for row in lines)  # old WeChat exports have one value more
        if width > most and len(lines) > 1 and agreeing >= 0.8 * len(lines):
            best, most = mark, width
    return best


def header_of(head: str, separator: str) -> list[str]:
    """The names in the first line."""
    try:
        cells = next(csv.reader(StringIO(head), delimiter=separator), [])
    except csv.Error:
        return []
    return [cell.strip().removeprefix("\ufeff") for cell in cells]


def table_rows(stream: TextIO, name: str, separator: str, limit: int, repairs: Counter[str]) -> Iterator[Row]:
    """The rows below the header; a row with more cells than the header has a fault."""
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
        raise DataError(f"{name}:{reader.line_num}  this is not a table: {error}. {fix}") from None


def _row(header: list[str], cells: list[str], line: int, separator: str) -> Row:
    fault = None
    extra = cells[len(header) :]
    if any(cell.strip() for cell in extra[1:]) or (extra and len(header) < 6):  # old WeChat exports have one more
        reason = f"found {len(cells)} cells, but {len(header)} columns in the header"
        fault = RecordFault("CELLS", "$", reason, "put texts that hold the separator or line breaks into quotes")
    value = dict(zip(header, [*cells, *[""] * (len(header) - len(cells))], strict=False))
    return Row(value, line, "$", separator.join(cells)[:HEAD], fault)


TABLE = RowFormat("table", _recognise, _read, header=lambda row, options: columns_of(list(row), options))
