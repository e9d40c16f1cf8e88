"""Questions and answers: rows of {"question", "context", "answer"} in their many spellings, from JSON or a table."""

import csv
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any, TextIO

from persona.convert.draft import Draft, extras
from persona.convert.formats.json_rows import Row
from persona.convert.formats.turns import Turn, content_of, to_messages
from persona.convert.options import Options
from persona.errors import DataError
from persona.records import RecordFault

PROMPTS = ("question", "prompt", "query", "input", "user", "问题", "提问", "问")
RESPONSES = ("answer", "response", "target", "output", "completion", "reply", "回答", "答案", "答")
CONTEXTS = ("context", "background", "上下文", "背景")
_SYSTEM = "system"
_HISTORY = "history"


def columns_of(keys: list[str], options: Options) -> tuple[str, str, str | None] | None:
    """The columns of prompt, response and context, by the options or by their names; None where one is missing."""
    folded = {key.strip().casefold(): key for key in reversed(keys)}
    given = (options.prompt_col, options.response_col, options.context_col)
    names = [
        folded.get(chosen.strip().casefold()) if chosen else next((folded[n] for n in known if n in folded), None)
        for chosen, known in zip(given, (PROMPTS, RESPONSES, CONTEXTS), strict=True)
    ]
    prompt, response, context = names
    if prompt is None or response is None or (options.context_col and context is None):
        return None
    return prompt, response, context


def recognise(row: dict[str, Any], options: Options) -> str | None:
    """Why the row is a question with its answer, or None."""
    if "chosen" in row and "rejected" in row:
        return None
    found = columns_of(list(row), options)
    return f'rows have "{found[0]}" and "{found[1]}"' if found else None


def convert(row: dict[str, Any], options: Options) -> Draft:
    """The conversation of one row: history, then the context and the question, then the answer."""
    repairs: Counter[str] = Counter()
    found = columns_of(list(row), options)
    if found is None:
        reason = f"found the columns {', '.join(map(str, row))[:80]}"
        raise RecordFault("COLUMNS", "$", reason, "name them with --prompt-col, --response-col and --context-col")
    prompt, response, context = found
    turns = history_turns(row.get(_HISTORY), repairs)
    parts = [_cell(row.get(context), f"$.{context}", repairs)] if context else []
    parts.append(_cell(row[prompt], f"$.{prompt}", repairs))
    turns.append(Turn("user", "\n".join(part for part in parts if part), f"$.{prompt}"))
    turns.append(Turn("assistant", _cell(row[response], f"$.{response}", repairs), f"$.{response}"))
    system = _cell(row.get(_SYSTEM), "$.system", repairs)
    known = frozenset(name for name in (prompt, response, context, _SYSTEM, _HISTORY, "split") if name)
    return Draft(to_messages(turns, system, "$", repairs, options), repairs, extras(row, known, repairs))


def _cell(value: object, path: str, repairs: Counter[str]) -> str:
    """The text of a cell; an empty one is "" and never the word NaN."""
    if value is None or value == "":
        if path != "$.system":
            repairs["empty cells"] += 1
        return ""
    return content_of(value, path, repairs)


def history_turns(history: object, repairs: Counter[str]) -> list[Turn]:
    """The turns of [["question", "answer"], ...]."""
    if history in (None, "", "[]"):
        return []
    if not isinstance(history, list):
        raise RecordFault("HISTORY", "$.history", f"found {str(history)[:40]!r}", 'write [["q", "a"], ...]')
    turns = []
    for index, pair in enumerate(history):
        path = f"$.history[{index}]"
        if not isinstance(pair, list) or len(pair) != 2:
            raise RecordFault("HISTORY", path, f"found {str(pair)[:40]!r}", "write a question and its answer")
        for side, role in enumerate(("user", "assistant")):
            turns.append(Turn(role, content_of(pair[side], f"{path}[{side}]", repairs), f"{path}[{side}]"))
    return turns


# --- csv input --------------------------------------------------------------------------------------------------------
# The rows of a table (CSV or TSV) as objects, whatever separates its cells; a line at a time.


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
