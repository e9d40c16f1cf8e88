"""A format: one object with its name, how it is recognised and how it is read. The list is in `recognise`.

There are three kinds. The rows of a `RowFormat` are conversations by themselves; the rows of a `FileFormat` are one
conversation together, such as the messages of a chat; a `TextFormat` is read from plain text.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from persona.convert.draft import Draft
from persona.convert.ledger import Counts
from persona.convert.options import Options
from persona.files import JsonObject
from persona.records import RecordFault


@dataclass(slots=True)
class Row:
    """One value of a file and its place; with a `fault` it cannot be used."""

    value: Any
    line: int
    path: str
    text: str
    fault: RecordFault | None = None
    repairs: Counter[str] | None = None
    split: str | None = None  # the key of the list that holds the row: "train", "test"


@dataclass(kw_only=True)
class Contents:
    """A file that was read: who speaks in it, and its drafts."""

    layout: str = ""  # how the file is laid out, in a few words; "" if the format says it all
    notes: list[str] = field(default_factory=list)  # sentences for the report
    speakers: Counter[str] = field(default_factory=Counter)  # how often each person speaks; empty without names
    character: str | None = None  # that the file itself names

    def drafts(self, options: Options, counts: Counts) -> Iterator[Draft]:
        """The conversations of the file, counted in `counts`."""
        raise NotImplementedError


@dataclass(frozen=True)
class Packing:
    """A file that is not text and holds one row, such as a picture with a character card in it."""

    name: str
    signature: bytes  # the first bytes of such a file
    unpack: Callable[[Path, str], Row]


@dataclass(frozen=True)
class RowFormat:
    """A format in which each row is a conversation, or several. `recognise` says why a row is one, or None."""

    name: str
    recognise: Callable[[JsonObject, Options], str | None]
    read: Callable[[JsonObject, Options], Draft | list[Draft]]
    header: Callable[[JsonObject, Options], object] | None = None  # recognises a table, by a row of empty cells
    system_prompt: Callable[[JsonObject, Options], str] | None = None  # the system prompt for chat, if rows hold one
    packing: Packing | None = None


@dataclass(frozen=True)
class FileFormat:
    """A format in which all rows of a file belong together. `recognise` gets the first rows."""

    name: str
    recognise: Callable[[list[JsonObject]], str | None]
    read: Callable[[list[Row], Options], Contents]
    header: Callable[[JsonObject, Options], object] | None = None
    of_lists: bool = False  # a row may be a list of objects too


@dataclass(frozen=True)
class Text:
    """A text file with its beginning, line ends LF; `whole` reads all of it."""

    path: Path
    name: str
    head: str
    whole: Callable[[], str]


class Tally(Protocol):
    """Statistics of all files of one format in a conversion."""

    def to_json(self, written: int, train: int, val: int) -> JsonObject:
        """The statistics as the report has them, with the numbers of records in all and in the two files."""
        ...

    def summary(self) -> str:
        """The statistics in a line."""
        ...


@dataclass(frozen=True)
class TextFormat:
    """A format of plain text. `recognise` must be quick: it sees the beginning of the file."""

    name: str
    recognise: Callable[[Text, Options], str | None]
    read: Callable[[Text, Options], Contents]
    prose: bool = False  # any text may look like it, so subtitles and web pages are refused first
    together: Callable[[Sequence[Any], Options], Tally] | None = None  # called with all files before any is drafted
    # Names of the output files instead of train.jsonl and val.jsonl, if all files are of this format
    names: Mapping[str, str] = field(default_factory=dict, hash=False)
    statistics: str = ""  # the file for the tally


Format = RowFormat | FileFormat | TextFormat
