"""Alpaca: {"instruction", "input", "output"}, with `system` and `history` where a file has them."""

from collections import Counter
from typing import Any

from persona.console import excerpt
from persona.convert.draft import Draft, small_extras
from persona.convert.turns import Turn, content_of, to_messages
from persona.records import RecordFault

_KNOWN = frozenset(("instruction", "input", "output", "system", "history"))


def recognise(row: dict[str, Any]) -> str | None:
    """Why the row is Alpaca, or None."""
    return 'rows have "instruction"' if "instruction" in row else None


def convert(row: dict[str, Any]) -> Draft:
    """The conversation of one row: the exchanges of `history`, then the instruction and its output."""
    repairs: Counter[str] = Counter()
    for key in ("instruction", "output"):
        if row.get(key) is None:
            raise RecordFault("MISSING", f"$.{key}", "found nothing", f'write the text under "{key}"')
    system = _optional(row, "system", repairs)
    parts = (content_of(row["instruction"], "$.instruction", repairs), _optional(row, "input", repairs))
    turns = _history(row.get("history"), repairs)
    turns.append(Turn("user", "\n".join(part for part in parts if part), "$.instruction"))
    turns.append(Turn("assistant", content_of(row["output"], "$.output", repairs), "$.output"))
    extras = small_extras(row, _KNOWN)
    return Draft(to_messages(turns, system, "$", repairs), repairs, {"extra": extras} if extras else {})


def _optional(row: dict[str, Any], key: str, repairs: Counter[str]) -> str:
    return "" if row.get(key) is None else content_of(row[key], f"$.{key}", repairs)


def _history(history: object, repairs: Counter[str]) -> list[Turn]:
    if history is None:
        return []
    if not isinstance(history, list):
        raise RecordFault("HISTORY", "$.history", f"found {excerpt(repr(history), 40)}", 'write [["q", "a"], ...]')
    turns = []
    for index, pair in enumerate(history):
        path = f"$.history[{index}]"
        if not isinstance(pair, list) or len(pair) != 2:
            raise RecordFault("HISTORY", path, f"found {excerpt(repr(pair), 40)}", "write a question and its answer")
        for side, role in enumerate(("user", "assistant")):
            turns.append(Turn(role, content_of(pair[side], f"{path}[{side}]", repairs), f"{path}[{side}]"))
    return turns
