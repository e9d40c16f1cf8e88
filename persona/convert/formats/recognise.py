"""The list of all formats, and which of them a file or a row is of. A new format is one line in `FORMATS`."""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from persona.console import excerpt
from persona.convert.draft import Draft
from persona.convert.formats.articles import ARTICLES
from persona.convert.formats.characters import CARD, LINES
from persona.convert.formats.chat_rows import DISCORD, TAVERN, TELEGRAM, UTTERANCES, WECHAT
from persona.convert.formats.chat_texts import QQ, WHATSAPP
from persona.convert.formats.conversations import ALPACA, CHATGPT, MESSAGES, PAIRS, SHAREGPT
from persona.convert.formats.dialogue import DIALOGUE
from persona.convert.formats.format import Contents, FileFormat, Format, Row, RowFormat, Text, TextFormat
from persona.convert.formats.tables import TABLE
from persona.convert.inputs import Foreign
from persona.convert.ledger import Counts
from persona.convert.options import Options
from persona.files import JsonObject, scan_json
from persona.records import RecordFault

# In the order in which they are tried: messages are a stricter kind of ShareGPT, pairs of questions and answers.
FORMATS: tuple[Format, ...] = (
    *(MESSAGES, SHAREGPT, ALPACA, CARD, CHATGPT, PAIRS, TABLE),
    *(DISCORD, TELEGRAM, TAVERN, WECHAT, LINES, UTTERANCES),
    *(QQ, WHATSAPP, DIALOGUE, ARTICLES),
)
BY_NAME = {one.name: one for one in FORMATS}
NAMES = tuple(BY_NAME)
ROW_FORMATS = tuple(one for one in FORMATS if isinstance(one, RowFormat))
FILE_FORMATS = tuple(one for one in FORMATS if isinstance(one, FileFormat))
TEXT_FORMATS = tuple(one for one in FORMATS if isinstance(one, TextFormat))
EXPECTED = (
    "conversations (ShareGPT, messages), instruction/output (Alpaca), questions and answers, a chat export, "
    'a character card, articles, or text with lines "NAME: words"'
)
# Texts that look like prose or dialogue and cannot be read: a pattern, what it is, what to do.
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


def text_format(text: Text, options: Options) -> tuple[TextFormat, str] | None:
    """The format of a plain text, and why; Foreign for texts of a known kind that cannot be read."""
    for one in TEXT_FORMATS:
        if one.prose:
            for pattern, kind, fix in _FOREIGN:
                if pattern.search(text.head):
                    raise Foreign(f"{text.name}: it looks like {kind}: {fix}. --format NAME reads it all the same.")
        if why := one.recognise(text, options):
            return one, why
    return None


def file_format(first: list[Any], options: Options) -> tuple[FileFormat | None, str]:
    """The format of rows that belong together, by the first of them, and why; None for rows by themselves."""
    if options.format:
        one = BY_NAME[options.format]
        return (one if isinstance(one, FileFormat) else None), f"--format {one.name}"
    rows = [row for value in first if (row := _as_row(value))]
    for one in FILE_FORMATS if rows else ():
        if why := one.recognise(rows):
            return one, why
    return None, ""


def _as_row(value: object) -> JsonObject:
    """The value as an object; a list of objects is a dialogue."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return {"dialogue": value}
    return value if isinstance(value, dict) else {}


def has_known_columns(header: list[str], options: Options) -> bool:
    """Whether a table with these columns is of a known format."""
    row = dict.fromkeys(header, "")
    return any(one.header and one.header(row, options) for one in (*ROW_FORMATS, *FILE_FORMATS))


def is_list_a_line(head: str) -> bool:
    """Whether the first line is a list of objects by itself, and so a row of a format with such rows."""
    line = head.removeprefix("\ufeff").lstrip().partition("\n")[0].rstrip()
    if not line.startswith("[{") or not line.endswith("]") or len(head.strip()) == len(line):
        return False
    try:
        value, end, _ = scan_json(line)
    except json.JSONDecodeError:
        return False
    if end < len(line) or not all(isinstance(turn, dict) for turn in value):
        return False
    return any(one.of_lists and one.recognise([_as_row(value)]) for one in FILE_FORMATS)


@dataclass
class Rows(Contents):
    """A file whose rows are conversations by themselves, each read by the format that recognises it."""

    rows: Callable[[Counter[str]], Iterator[Row]]  # counts repairs of the file in its argument
    forced: RowFormat | None

    def drafts(self, options: Options, counts: Counts) -> Iterator[Draft]:
        """A draft for each row, or several; a row that no format recognises has a fault."""
        for row in self.rows(counts.repairs):
            if options.split and (split := _split_of(row)) is not None and split != options.split:
                counts.other_splits[split] += 1
                continue
            value = _object(row.value)
            one, name, why = self._format(row, value, options)
            counts.formats[name] += 1
            counts.reasons[why] = None
            try:
                if row.fault or value is None:
                    raise row.fault or _no_object(row)
                if one is None:
                    raise _unknown(value)
                drafts = one.read(value, options)
            except RecordFault as fault:
                drafts = Draft([], fault=fault)
            if one and one.system_prompt and isinstance(row.value, dict):
                counts.system_prompt = counts.system_prompt or one.system_prompt(row.value, options)
            for draft in drafts if isinstance(drafts, list) else [drafts]:
                draft.line, draft.path, draft.source_text = row.line, row.path, draft.source_text or row.text
                if row.repairs:
                    draft.repairs += row.repairs
                yield draft

    def _format(self, row: Row, value: JsonObject | None, options: Options) -> tuple[RowFormat | None, str, str]:
        """The format that reads a row, the name under which it is counted, and why."""
        if row.fault:
            return None, "unreadable", "some rows cannot be read"
        if self.forced:
            return self.forced, self.forced.name, f"--format {self.forced.name}"
        if value is None:
            return None, "unknown", "some rows are not objects"
        for one in ROW_FORMATS:
            if why := one.recognise(value, options):
                return one, one.name, why
        return None, "unknown", "some rows are of no known format"


def unusable(row: Row) -> Draft:
    """The draft of a row that holds nothing to read."""
    return Draft([], line=row.line, path=row.path, fault=row.fault or _no_object(row), source_text=row.text)


def _no_object(row: Row) -> RecordFault:
    return RecordFault("NOT_AN_OBJECT", "$", f"found {excerpt(repr(row.value), 40)}", f"write {EXPECTED}")


def _split_of(row: Row) -> str | None:
    if row.split is not None:
        return row.split
    value = row.value.get("split") if isinstance(row.value, dict) else None
    return value if isinstance(value, str) else None


def _object(value: Any) -> JsonObject | None:
    """The value as an object; a list of turns is a conversation."""
    if isinstance(value, list) and value and all(isinstance(turn, dict) for turn in value):
        return {"conversations": value} if "from" in value[0] or "role" in value[0] else None
    return value if isinstance(value, dict) else None


def _unknown(value: JsonObject) -> RecordFault:
    keys = excerpt(", ".join(map(str, value)), 60) or "(none)"
    if {"chosen", "rejected"} <= value.keys():
        fix = "preference data compares two answers: write the better one as a conversation"
        return RecordFault("PREFERENCE", "$", f"found the keys {keys}", fix)
    lists = [key for key, inner in value.items() if isinstance(inner, list)]
    fix = f'save the list under "{excerpt(lists[0], 40)}" as a file of its own' if lists else f"write {EXPECTED}"
    return RecordFault("UNKNOWN_FORMAT", "$", f"found the keys {keys}", fix)
