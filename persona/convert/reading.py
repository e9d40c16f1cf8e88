"""One input file opened: its format decided with the reason, its content made into drafts as it is read."""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from persona.console import excerpt
from persona.convert.draft import Draft
from persona.convert.formats import characters, chat_exports, json_rows, json_stream, tables
from persona.convert.formats.dialogue import Script
from persona.convert.formats.dialogue import parse as parse_dialogue
from persona.convert.formats.dialogue import recognise as recognise_dialogue
from persona.convert.formats.json_rows import Row
from persona.convert.formats.recognise import (
    ARTICLES,
    DIALOGUE,
    EXPECTED,
    LINES,
    ROW_FORMATS,
    SPEECH_FORMATS,
    TEXT_FORMATS,
    Intake,
    drafts_of_rows,
    unusable,
)
from persona.convert.formats.scenes import MAX_SILENCE, conversations
from persona.convert.inputs import Foreign, Probe, Source, open_text, probe, read_head, read_text
from persona.convert.options import Options
from persona.errors import DataError, EnvironmentFault, UsageError

# --- detect -----------------------------------------------------------------------------------------------------------
# What a text means to be: JSON, well-formed or not, or an article; by content, never by the file's ending.

# What may follow an opening bracket of JSON, broken JSON included; `[Enter HAMLET]` and `[12:30]` are text.
_JSON_START = re.compile(
    r"""(?:\s*+(?>//[^\n]*|/\*.*?\*/|\.{3,}|…+))*+\s*+(?:\[\s*+(?:[{\["'\]/.…]|$)|\{\s*+(?:["'}/“”.…]|$))""", re.DOTALL
)
# Texts that look like prose or dialogue and are neither.
_FOREIGN = (
    (
        re.compile(r"\d\d:\d\d[,.]\d{3} --> (?:\d\d:)?\d\d:\d\d[,.]\d{3}|\A\[Script Info\]"),
        "subtitles, which rarely say who speaks",
        "write the lines as NAME: words",
    ),
    (
        re.compile(r"^label \w+(?:\(.*\))?:\s*$", re.MULTILINE),
        "a Ren'Py script",
        "Extract Dialogue in the Ren'Py launcher writes dialogue.tab, which can be read here",
    ),
    (re.compile(r"\A\s*<(?:!doctype html|html|\?xml)", re.IGNORECASE), "a web page", "save it as plain text"),
)
_HEADING = re.compile(r"#{1,6} \S|\[[^\]\n]+\]\([^)\n]+\)|!\[")
_SENTENCE = re.compile(r"[。！？!?.…](?=\s|$|[”」』\"])|[。！？]")
_ARTICLE = 300  # characters; shorter texts are notes


def is_json(text: str) -> bool:
    """Whether the text means to be JSON, well-formed or not."""
    return _JSON_START.match(text[:10_000]) is not None


def foreign(head: str) -> tuple[str, str] | None:
    """What a text is that cannot be read here, and what to do about it; None for all others."""
    return next(((what, fix) for pattern, what, fix in _FOREIGN if pattern.search(head)), None)


def article(path: Path, head: str) -> str | None:
    """Why a text is an article, or None: prose of some length, or Markdown, or with a meta.json beside it."""
    if len(head.strip()) < 20:
        return None
    if (path.parent / "meta.json").is_file():
        return "a text with meta.json beside it"
    if len(head) >= _ARTICLE and _HEADING.search(head):
        return "Markdown of some length"
    return "prose of some length" if len(head) >= _ARTICLE and len(_SENTENCE.findall(head)) >= 3 else None


_PEEKED = 20  # rows by which the format of a whole file is decided
_LARGEST_TEXT = 500_000_000  # bytes; scripts and chats are read whole


@dataclass
class Opened:
    """A file whose format is known: how it is laid out and why, who speaks in it, and a way to read its drafts."""

    source: Source
    found: Probe
    format: str
    why: str
    read: Callable[[Intake, Options], Iterator[Draft]]
    notes: list[str] = field(default_factory=list)
    speakers: Counter[str] = field(default_factory=Counter)
    character: str | None = None  # whom the file itself names
    article: str = ""


def open_source(source: Source, options: Options) -> Opened:
    """The opened file; a DataError names the place that cannot be read, or what is not known."""
    if source.path.is_file() and _first_bytes(source) == characters.PNG:
        return _picture(source, options)
    found = probe(source.path, source.name, options.encoding)
    head = read_head(source.path, found)
    opened = _by_format(source, found, head, options) if options.format else _by_content(source, found, head, options)
    if found.notice:
        opened.notes.insert(0, found.notice)
    return opened


def _first_bytes(source: Source) -> bytes:
    try:
        with source.path.open("rb") as file:
            return file.read(len(characters.PNG))
    except OSError as error:
        raise EnvironmentFault(f"{source.path} cannot be read: {error.strerror}. Check its permissions.") from error


def _picture(source: Source, options: Options) -> Opened:
    data = source.path.read_bytes()
    value = characters.parse(characters.card_text(data, source.name), source.name)
    row = Row(value, 1, "$", "")
    found = Probe("utf-8", "utf-8", None, len(data), "")
    return Opened(
        source, found, "card", "PNG", lambda intake, chosen: drafts_of_rows(iter([row]), None, intake, chosen)
    )


def _by_format(source: Source, found: Probe, head: str, options: Options) -> Opened:
    name = options.format or ""
    why = f"--format {name}"
    if name in TEXT_FORMATS:
        return _chat(source, found, name, why, options)
    if name == DIALOGUE and (opened := _dialogue(source, found, options, forced=True)):
        return opened
    if name == DIALOGUE:
        raise Foreign(f"{source.name}: --format dialogue, but no line has the form NAME: words.")
    if name == ARTICLES:
        return _article(source, found, why)
    separator = None if is_json(head) else tables.separator_of(head)
    if separator:
        return _table(source, found, head, separator, options)
    return _json(source, found, head, options)


def _by_content(source: Source, found: Probe, head: str, options: Options) -> Opened:
    if is_json(head):
        return _json(source, found, head, options)
    for name, chat in TEXT_FORMATS.items():
        if why := chat.recognise(head.replace("\r\n", "\n")):
            return _chat(source, found, name, why, options)
    if other := foreign(head):
        what, fix = other
        raise Foreign(f"{source.name}: it looks like {what}: {fix}. --format NAME reads it all the same.")
    for mark in tables.SEPARATORS:
        if _known_table(tables.header_of(head, mark), options):
            return _table(source, found, head, mark, options)
    if opened := _dialogue(source, found, options, forced=False):
        return opened
    if why := article(source.path, head):
        return _article(source, found, why)
    separator = tables.separator_of(head)
    if separator and all(tables.header_of(head, separator)) and len(head) > 20:
        return _table(source, found, head, separator, options)
    raise Foreign(
        f"{source.name}: no format recognised: it begins with {excerpt(head, 30)!r}. Expected {EXPECTED}; "
        "--format NAME forces one."
    )


def _chat(source: Source, found: Probe, name: str, why: str, options: Options) -> Opened:
    script = TEXT_FORMATS[name].read(_whole(source, found), options)
    return _scripted(source, found, name, why, script, [])


def _whole(source: Source, found: Probe) -> str:
    if found.size > _LARGEST_TEXT:
        raise DataError(
            f"{source.name}: {found.size / 1e6:,.0f} MB in one text is too much. Cut it into several files."
        )
    return read_text(source.path, source.name, found)


def _dialogue(source: Source, found: Probe, options: Options, forced: bool) -> Opened | None:
    text = _whole(source, found)
    script = parse_dialogue(text, options.characters, options.narration != "drop", options.keep_quotes)
    plain = parse_dialogue(text, options.characters) if options.narration != "drop" else script
    if not plain.speeches or not (forced or recognise_dialogue(plain, options.characters)):
        return None
    heads = "scenes by their heads"
    scenes = (
        heads if script.has_borders else f"no scene heads, so {MAX_SILENCE} lines without the character end a scene"
    )
    return _scripted(source, found, DIALOGUE, f"{script.layout}, {scenes}", script, [])


def _scripted(
    source: Source, found: Probe, name: str, why: str, script: Script, bad: list[Draft], character: str | None = None
) -> Opened:
    """A file of speeches; `bad` are the rows that could not be read."""

    def read(intake: Intake, options: Options) -> Iterator[Draft]:
        yield from bad
        drafts, not_used = conversations(script, options)
        intake.formats[name] += len(drafts)
        intake.speeches += len(script.speeches) + script.left_out.total()
        intake.not_used += not_used
        intake.repairs += script.repairs
        yield from drafts

    layout = f"{why}, {script.layout}" if script.layout not in why else why
    speakers = Counter(speech.speaker for speech in script.speeches)
    return Opened(source, found, name, layout, read, list(script.notes), speakers, character)


def _article(source: Source, found: Probe, why: str) -> Opened:
    def read(_intake: Intake, _options: Options) -> Iterator[Draft]:
        raise AssertionError("articles are read together, for lines that recur in them are dropped")

    return Opened(source, found, ARTICLES, why, read, article=_whole(source, found))


def _json(source: Source, found: Probe, head: str, options: Options) -> Opened:
    by_line = json_rows.one_object_a_line(head) or chat_exports.one_scene_a_line(head)
    wrapped = not by_line and json_rows.is_wrapped(head)

    def rows(repairs: Counter[str]) -> Iterator[Row]:
        with open_text(source.path, source.name, found) as stream:
            if by_line:
                yield from json_rows.line_rows(stream, source.name, options.limit, options.lenient, repairs)
            else:
                yield from _unwrapped(
                    json_stream.value_rows(stream, source.name, options.limit, options.lenient, wrapped, repairs),
                    source,
                )

    layout = "one JSON object a line" if by_line else "JSON array" if head.lstrip()[:1] == "[" else "JSON objects"
    return _rows(source, found, layout, rows, options)


def _unwrapped(rows: Iterator[Row], source: Source) -> Iterator[Row]:
    """The rows; a file of one object that holds columns or lists of rows is opened."""
    first = next(rows, None)
    if first is None:
        return
    second = next(rows, None)
    if second is None and first.path == "$":
        yield from json_rows.columns(first, source.name) or json_rows.inner_rows(first) or [first]
        return
    yield first
    if second is not None:
        yield second
        yield from rows


def _known_table(header: list[str], options: Options) -> bool:
    row = dict.fromkeys(header, "")
    known = any(one.recognise([row]) for name, one in SPEECH_FORMATS.items() if name != "sillytavern")
    return known or characters.recognise_lines([row]) is not None or tables.columns_of(header, options) is not None or (
        {"instruction", "output"} <= set(header)
    )  # fmt: skip


def _table(source: Source, found: Probe, head: str, separator: str, options: Options) -> Opened:
    header = tables.header_of(head, separator)
    if not options.format and not _known_table(header, options):
        listed = ", ".join(excerpt(name, 30) for name in header[:30])
        raise UsageError(
            f"{source.name}: a table whose columns are not known. Columns found: {listed}.\n"
            "Say which hold what: --prompt-col NAME --response-col NAME, and --context-col NAME if there is one."
        )

    def rows(repairs: Counter[str]) -> Iterator[Row]:
        with open_text(source.path, source.name, found, newline="") as stream:
            yield from tables.table_rows(stream, source.name, separator, options.limit, repairs)

    return _rows(source, found, f"table separated by {tables.SEPARATORS[separator]}", rows, options)


def _rows(
    source: Source, found: Probe, layout: str, rows: Callable[[Counter[str]], Iterator[Row]], options: Options
) -> Opened:
    """A file of rows: all of one chat, or a conversation each."""
    first = [row for _, row in zip(range(_PEEKED), rows(Counter()), strict=False)]
    if not first:
        raise DataError(f"{source.name} holds no records. Give a file that holds conversations.")
    values = [_as_object(row.value) for row in first if row.fault is None]
    values = [value for value in values if value]
    name, why = _whole_file_format(values, options) if values else (None, "")
    if name is None:
        forced = options.format if options.format in ROW_FORMATS else None

        def read(intake: Intake, chosen: Options) -> Iterator[Draft]:
            return drafts_of_rows(rows(intake.repairs), forced, intake, chosen)

        return Opened(source, found, "rows", layout, read)
    repairs: Counter[str] = Counter()
    good, bad = _sorted_out(rows(repairs), by_line=name == "utterances")
    if name == LINES:
        return _lines(source, found, f"{layout}, {why}", good, bad)
    speech_format = SPEECH_FORMATS[name]
    script = speech_format.read(good, options)
    script.repairs.update(repairs)
    opened = _scripted(source, found, name, f"{layout}, {why}", script, bad)
    if name == "sillytavern" and isinstance(found_name := values[0].get("character_name"), str):
        opened.character = found_name if found_name in opened.speakers else None
    return opened


def _as_object(value: Any) -> dict[str, Any]:
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return {"dialogue": value}
    return value if isinstance(value, dict) else {}


def _whole_file_format(values: list[dict[str, Any]], options: Options) -> tuple[str | None, str]:
    if options.format:
        known = options.format in SPEECH_FORMATS or options.format == LINES
        return (options.format if known else None), f"--format {options.format}"
    for name in ("discord", "telegram", "sillytavern", "wechat"):
        if why := SPEECH_FORMATS[name].recognise(values):
            return name, why
    if why := characters.recognise_lines(values):
        return LINES, why
    if why := SPEECH_FORMATS["utterances"].recognise(values):
        return "utterances", why
    return None, ""


def _sorted_out(rows: Iterator[Row], by_line: bool) -> tuple[list[Row], list[Draft]]:
    """The rows that are objects, and drafts with faults for the others."""
    good: list[Row] = []
    bad: list[Draft] = []
    for row in rows:
        if row.fault is None and (isinstance(row.value, dict) or (by_line and isinstance(row.value, list))):
            good.append(row)
        else:
            bad.append(unusable(row))
    return good, bad


def _lines(source: Source, found: Probe, why: str, good: list[Row], bad: list[Draft]) -> Opened:
    speakers = characters.speakers(good)

    def read(intake: Intake, options: Options) -> Iterator[Draft]:
        yield from bad
        intake.speeches += speakers.total()
        for draft in characters.drafts(good, options, intake.not_used):
            intake.formats[LINES] += 1
            yield draft

    only = next(iter(speakers)) if len(speakers) == 1 else None
    return Opened(source, found, LINES, why, read, speakers=speakers, character=only)
