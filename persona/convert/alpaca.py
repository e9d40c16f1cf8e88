"""Alpaca: {"instruction", "input", "output"}, with `system` and `history` where a file has them."""

from collections import Counter
from typing import Any

from persona.convert.draft import Draft, extras
from persona.convert.options import Options
from persona.convert.tables import history_turns
from persona.convert.turns import Turn, content_of, to_messages
from persona.records import RecordFault

_KNOWN = frozenset(("instruction", "input", "output", "system", "history"))


def recognise(row: dict[str, Any], _options: Options) -> str | None:
    """Why the row is Alpaca, or None."""
    return 'rows have "instruction"' if "instruction" in row else None


def convert(row: dict[str, Any], options: Options) -> Draft:
    """The conversation of one row: the exchanges of `history`, then the instruction and its output."""
    repairs: Counter[str] = Counter()
    for key in ("instruction", "output"):
        if row.get(key) is None:
            raise RecordFault("MISSING", f"$.{key}", "found nothing", f'write the text under "{key}"')
    system = _optional(row, "system", repairs)
    parts = (content_of(row["instruction"], "$.instruction", repairs), _optional(row, "input", repairs))
    turns = history_turns(row.get("history"), repairs)
    turns.append(Turn("user", "\n".join(part for part in parts if part), "$.instruction"))
    turns.append(Turn("assistant", content_of(row["output"], "$.output", repairs), "$.output"))
    return Draft(to_messages(turns, system, "$", repairs, options), repairs, extras(row, _KNOWN, repairs))


def _optional(row: dict[str, Any], key: str, repairs: Counter[str]) -> str:
    return "" if row.get(key) is None else content_of(row[key], f"$.{key}", repairs)
