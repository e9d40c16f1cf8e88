"""What a family of formats hands to the pipeline: a conversation on its way to a record, or why it is none."""

import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from persona.console import excerpt
from persona.records import RecordFault

Message = dict[str, str]
_SMALL = 200  # characters; a longer text beside a conversation is data of its own, not a label


@dataclass(slots=True)
class Draft:
    """A conversation with its place in the file; with a `fault` it will be rejected."""

    messages: list[Message]
    repairs: Counter[str] = field(default_factory=Counter)
    meta: dict[str, Any] = field(default_factory=dict)
    group: str = ""  # what may not be torn, within the file; "" for a row by itself
    line: int = 0
    path: str = "$"
    fault: RecordFault | None = None
    source_text: str = ""  # for the excerpt of a rejection
    learned: int = 0  # speeches, for formats with named speakers
    context: int = 0
    part: bool = False  # of a row that was cut into several, which are one group
    plain: bool = False  # in turn, all texts printable but for line ends, and without outer white space
    fresh: bool = True  # made here from raw data; our own records come as they are, repetitions of lore included


@dataclass(frozen=True)
class Rejection:
    """One line of rejected.jsonl."""

    file: str
    line: int
    path: str
    code: str
    reason: str
    fix: str
    excerpt: str

    def to_json(self) -> str:
        """The rejection as one line of JSON."""
        return json.dumps(vars(self), ensure_ascii=False)


def reject(file: str, draft: Draft, fault: RecordFault) -> Rejection:
    """The rejection of `draft`; a path inside a record is written as a path inside the file."""
    path = draft.path + fault.path.removeprefix("$")
    texts = (file, path, fault.code, fault.reason, fault.fix, excerpt(draft.source_text[:1000]))
    file, path, code, reason, fix, shown = (printable(text) for text in texts)
    return Rejection(file, draft.line, path, code, reason, fix, shown[:80])


def printable(text: str) -> str:
    """`text` with lone surrogates written as escapes, so that it can be encoded."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def extras(row: dict[str, Any], known: frozenset[str], repairs: Counter[str]) -> dict[str, Any]:
    """The meta for keys of a row that no format reads: short scalars (`id`, `score`) are kept, others counted."""
    if row.keys() <= known:
        return {}
    kept: dict[str, Any] = {}
    for key, value in row.items():
        if key in known or value is None:
            continue
        if isinstance(value, (str, int, float)) and len(str(value)) <= _SMALL:
            kept[key] = value
        else:
            repairs["other keys with long values dropped"] += 1
    return {"extra": kept} if kept else {}
