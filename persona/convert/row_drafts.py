"""Rows made into drafts one by one, each by the format that recognises it; what none recognises is refused by name."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from persona.console import excerpt
from persona.convert.card import system_prompt as card_prompt
from persona.convert.draft import Draft
from persona.convert.formats import EXPECTED, ROW_FORMATS
from persona.convert.json_input import Row
from persona.convert.options import Options
from persona.records import RecordFault


@dataclass
class Intake:
    """What was found in a file while it was read."""

    formats: Counter[str] = field(default_factory=Counter)
    reasons: dict[str, None] = field(default_factory=dict)
    repairs: Counter[str] = field(default_factory=Counter)
    not_used: Counter[str] = field(default_factory=Counter)
    speeches: int = 0
    other_splits: Counter[str] = field(default_factory=Counter)
    system_prompt: str | None = None


def drafts_of_rows(rows: Iterator[Row], forced: str | None, intake: Intake, options: Options) -> Iterator[Draft]:
    """A draft for each row, or several."""
    for row in rows:
        if options.split and (split := _split_of(row)) is not None and split != options.split:
            intake.other_splits[split] += 1
            continue
        try:
            if row.fault:
                raise row.fault
            value = _object(row)
            name, why = (forced, f"--format {forced}") if forced else _recognise(value, options)
            if name is None:
                raise _unknown(value)
            made = ROW_FORMATS[name].convert(value, options)
        except RecordFault as fault:
            name, why = ("unreadable", "some rows cannot be read") if row.fault else _blame(row, forced, options)
            made = Draft([], fault=fault)
        intake.formats[name] += 1
        intake.reasons[why] = None
        if name == "card" and isinstance(row.value, dict):
            intake.system_prompt = intake.system_prompt or card_prompt(row.value, options)
        for draft in made if isinstance(made, list) else [made]:
            yield _placed(draft, row)


def _placed(draft: Draft, row: Row) -> Draft:
    draft.line, draft.path, draft.source_text = row.line, row.path, draft.source_text or row.text
    if row.repairs:
        draft.repairs += row.repairs
    return draft


def unusable(row: Row) -> Draft:
    """The draft of a row that holds nothing to read."""
    shown = excerpt(repr(row.value), 40)
    fault = row.fault or RecordFault("NOT_AN_OBJECT", "$", f"found {shown}", f"write {EXPECTED}")
    return Draft([], line=row.line, path=row.path, fault=fault, source_text=row.text)


def _split_of(row: Row) -> str | None:
    if row.split is not None:
        return row.split
    value = row.value.get("split") if isinstance(row.value, dict) else None
    return value if isinstance(value, str) else None


def _object(row: Row) -> dict[str, Any]:
    value = row.value
    turns = isinstance(value, list) and value and all(isinstance(turn, dict) for turn in value)
    if turns and ("from" in value[0] or "role" in value[0]):
        return {"conversations": value}
    if not isinstance(value, dict):
        raise RecordFault("NOT_AN_OBJECT", "$", f"found {excerpt(repr(value), 40)}", f"write {EXPECTED}")
    return value


def _recognise(value: dict[str, Any], options: Options) -> tuple[str | None, str]:
    for name, row_format in ROW_FORMATS.items():
        if why := row_format.recognise(value, options):
            return name, why
    return None, "some rows are of no known format"


def _blame(row: Row, forced: str | None, options: Options) -> tuple[str, str]:
    """The format of a row that was refused, for the account."""
    if forced:
        return forced, f"--format {forced}"
    name, why = _recognise(row.value, options) if isinstance(row.value, dict) else (None, "some rows are no objects")
    return name or "unknown", why


def _unknown(value: dict[str, Any]) -> RecordFault:
    keys = excerpt(", ".join(map(str, value)), 60) or "(none)"
    if {"chosen", "rejected"} <= value.keys():
        fix = "preference data compares two answers; for this tool give the better one as a conversation"
        return RecordFault("PREFERENCE", "$", f"found the keys {keys}", fix)
    lists = [key for key, inner in value.items() if isinstance(inner, list)]
    fix = f'save the list under "{excerpt(lists[0], 40)}" as a file of its own' if lists else f"write {EXPECTED}"
    return RecordFault("UNKNOWN_FORMAT", "$", f"found the keys {keys}", fix)
