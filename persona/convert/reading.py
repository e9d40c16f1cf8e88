"""One input file opened: its format decided with the reason, by its content and never by its name, and its drafts read.

A file is packed (a picture with one row in it), JSON, a table, or plain text. JSON and tables are read row by row,
unless the rows belong together; plain text is read whole.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

from persona.console import excerpt
from persona.convert.draft import Draft
from persona.convert.formats import json_rows, json_stream, tables
from persona.convert.formats.format import Contents, FileFormat, Row, RowFormat, Tally, Text, TextFormat
from persona.convert.formats.recognise import (
    BY_NAME,
    EXPECTED,
    ROW_FORMATS,
    Rows,
    file_format,
    has_known_columns,
    is_list_a_line,
    text_format,
    unusable,
)
from persona.convert.inputs import Foreign, Probe, Source, chunks, open_text, probe, read_head, read_text
from persona.convert.ledger import Counts
from persona.convert.options import Options
from persona.errors import DataError, UsageError
from persona.files import JsonObject, file_sha256

_PEEKED = 20  # rows by which the format of a whole file is decided
_LARGEST_TEXT = 500_000_000  # bytes; plain text is read whole


@dataclass
class Opened:
    """A file whose format is known, with the reason; `drafts` reads it."""

    source: Source
    probed: Probe
    why: str
    contents: Contents
    format: FileFormat | TextFormat | None = None  # None if each row has its own
    bad: list[Draft] = field(default_factory=list)  # rows that cannot be read
    counts: Counts = field(default_factory=Counts)

    def __post_init__(self) -> None:
        layout = self.contents.layout
        self.why = layout if layout.startswith(self.why) else ", ".join(part for part in (self.why, layout) if part)
        self.notes = [note for note in (self.probed.notice, *self.contents.notes) if note]

    @property
    def reason(self) -> str:
        """Why the file was read in its format, or its rows in theirs."""
        return ", ".join(filter(None, (self.why, " and ".join(self.counts.reasons))))

    def drafts(self, options: Options) -> Iterator[Draft]:
        """All drafts of the file, counted in `counts`."""
        counts = self.counts
        yield from self.bad
        for draft in self.contents.drafts(options, counts):
            if self.format:
                counts.formats[self.format.name] += 1
            yield draft
        if counts.other_splits:
            others = ", ".join(f"{name} ({count:,})" for name, count in counts.other_splits.items())
            self.notes.append(f"not of --split {options.split}: {others}")
        if not counts.formats and not options.split and not counts.read:
            counts.formats[self.format.name if self.format else "rows"] = 0

    def to_json(self) -> JsonObject:
        """The file as report.json has it: how it was read, and what became of its content."""
        probed = self.probed
        values = {"file": self.source.name, "why": self.reason, "encoding": probed.label, "bytes": probed.size}
        return values | {"sha256": probed.digest, "notes": self.notes} | self.counts.to_json()


def open_source(source: Source, options: Options) -> Opened:
    """The opened file; a DataError names the place that cannot be read, or what is not known."""
    if opened := _packed(source):
        return opened
    probed = probe(source.path, source.name, options.encoding)
    head = read_head(source.path, probed)
    text = Text(
        source.path, source.name, head.replace("\r\n", "\n").replace("\r", "\n"), lambda: _whole(source, probed)
    )
    if options.format and isinstance(one := BY_NAME[options.format], TextFormat):
        return Opened(source, probed, f"--format {one.name}", one.read(text, options), one)
    if json_rows.is_json(head):
        return _json(source, probed, head, options)
    separator = tables.separator_of(head)
    if options.format:
        return _table(source, probed, separator, options) if separator else _json(source, probed, head, options)
    for mark in tables.SEPARATORS:
        if has_known_columns(tables.header_of(head, mark), options):
            return _table(source, probed, mark, options)
    if recognised := text_format(text, options):
        one, why = recognised
        return Opened(source, probed, why, one.read(text, options), one)
    columns = tables.header_of(head, separator) if separator else []
    if all(columns) and len(columns) > 1 and len(head) > 20:
        listed = ", ".join(excerpt(name, 30) for name in columns[:30])
        raise UsageError(
            f"{source.name}: the columns of this table are not known. Columns found: {listed}.\n"
            "Name them with --prompt-col NAME --response-col NAME, and --context-col NAME if there is one."
        )
    raise Foreign(
        f"{source.name}: no format recognised: it begins with {excerpt(head, 30)!r}. Expected {EXPECTED}; "
        "--format NAME forces one."
    )


def read_together(opened: Sequence[Opened], options: Options) -> dict[TextFormat, Tally]:
    """The tallies of formats whose files must all be known before one is drafted."""
    formats = dict.fromkeys(file.format for file in opened)
    return {
        one: one.together([file.contents for file in opened if file.format is one], options)
        for one in formats
        if isinstance(one, TextFormat) and one.together
    }


def _packed(source: Source) -> Opened | None:
    """A file that is not text and holds one row."""
    start = next(chunks(source.path), b"")
    for packing in (one.packing for one in ROW_FORMATS if one.packing):
        if start.startswith(packing.signature):
            rows = [packing.unpack(source.path, source.name)]
            probed = Probe(source.path.stat().st_size, file_sha256(source.path))
            return Opened(source, probed, packing.name, Rows(lambda _, rows=rows: iter(rows), None))
    return None


def _whole(source: Source, probed: Probe) -> str:
    if probed.size > _LARGEST_TEXT:
        limit = f"{_LARGEST_TEXT / 1e6:,.0f} MB"
        raise DataError(f"{source.name}: {probed.size / 1e6:,.0f} MB of text, more than {limit}. Cut it into several.")
    return read_text(source.path, source.name, probed)


def _json(source: Source, probed: Probe, head: str, options: Options) -> Opened:
    by_line = json_rows.one_object_a_line(head) or is_list_a_line(head)
    wrapped = not by_line and json_rows.is_wrapped(head)

    def rows(repairs: Counter[str]) -> Iterator[Row]:
        with open_text(source.path, source.name, probed) as stream:
            shared = (stream, source.name, options.limit, options.lenient)
            if by_line:
                yield from json_rows.line_rows(*shared, repairs)
            else:
                yield from _unwrapped(json_stream.Values(*shared, repairs).rows(wrapped), source)

    layout = "one JSON object a line" if by_line else "JSON array" if head.lstrip()[:1] == "[" else "JSON objects"
    return _rows(source, probed, layout, rows, options)


def _unwrapped(rows: Iterator[Row], source: Source) -> Iterator[Row]:
    """The rows; those inside, if the file is one object that holds columns or lists of rows."""
    first = list(islice(rows, 2))
    if len(first) == 1 and first[0].path == "$":
        first = json_rows.columns(first[0], source.name) or json_rows.inner_rows(first[0]) or first
    yield from first
    yield from rows


def _table(source: Source, probed: Probe, separator: str, options: Options) -> Opened:
    def rows(repairs: Counter[str]) -> Iterator[Row]:
        with open_text(source.path, source.name, probed, newline="") as stream:
            yield from tables.table_rows(stream, source.name, separator, options.limit, repairs)

    return _rows(source, probed, f"table separated by {tables.SEPARATORS[separator]}", rows, options)


def _rows(
    source: Source, probed: Probe, layout: str, rows: Callable[[Counter[str]], Iterator[Row]], options: Options
) -> Opened:
    """A file of rows that are conversations by themselves, or one conversation together."""
    first = list(islice(rows(Counter()), _PEEKED))
    if not first:
        raise DataError(f"{source.name} holds no records. Give a file that holds conversations.")
    one, why = file_format([row.value for row in first if row.fault is None], options)
    if one is None:
        forced = BY_NAME[options.format] if options.format else None
        return Opened(source, probed, layout, Rows(rows, forced if isinstance(forced, RowFormat) else None))
    counts = Counts()
    good: list[Row] = []
    bad: list[Draft] = []
    for row in rows(counts.repairs):
        if row.fault is None and isinstance(row.value, (dict, list) if one.of_lists else dict):
            good.append(row)
        else:
            bad.append(unusable(row))
    return Opened(source, probed, f"{layout}, {why}", one.read(good, options), one, bad, counts)
