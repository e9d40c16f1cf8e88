"""A conversation on its way from a format to a record, or why it is rejected."""

from collections import Counter
from dataclasses import dataclass, field

from persona.console import excerpt
from persona.files import JsonObject
from persona.records import RecordFault

Message = dict[str, str]
_SMALL = 200  # characters; a longer text beside a conversation is data of its own, not a label


@dataclass(slots=True)
class Draft:
    """A conversation with its place in the file; with a `fault` it will be rejected."""

    messages: list[Message]
    repairs: Counter[str] = field(default_factory=Counter)
    meta: JsonObject = field(default_factory=dict)
    group: str = ""  # drafts of one group stay on one side of the split; "" for a draft by itself
    line: int = 0
    path: str = "$"
    fault: RecordFault | None = None
    source_text: str = ""  # for the excerpt of a rejection
    learned: int = 0  # speeches, for formats with named speakers
    context: int = 0  # speeches
    part: bool = False  # one of several parts of a row, which are one group
    plain: bool = False  # roles alternate; texts are printable except line ends, without outer white space
    fresh: bool = True  # from raw data; False for our own records, whose repetitions of lore are kept


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


def reject(file: str, draft: Draft, fault: RecordFault) -> Rejection:
    """The rejection of `draft`, with a path inside the file instead of the record."""
    path = draft.path + fault.path.removeprefix("$")
    texts = (file, path, fault.code, fault.reason, fault.fix, excerpt(draft.source_text[:1000]))
    file, path, code, reason, fix, shown = (printable(text) for text in texts)
    return Rejection(file, draft.line, path, code, reason, fix, shown[:80])


def printable(text: str) -> str:
    """`text` with lone surrogates written as escapes, so that it can be encoded."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def extras(row: JsonObject, known: frozenset[str], repairs: Counter[str]) -> JsonObject:
    """Meta of the keys that the format does not read: short scalars (`id`, `score`) are kept, others counted."""
    if row.keys() <= known:
        return {}
    kept: JsonObject = {}
    for key, value in row.items():
        if key in known or value is None:
            continue
        if isinstance(value, (str, int, float)) and len(str(value)) <= _SMALL:
            kept[key] = value
        else:
            repairs["other keys with long values dropped"] += 1
    return {"extra": kept} if kept else {}
