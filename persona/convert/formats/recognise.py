"""The tables of formats: a new family is one module with pure functions and one line here."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from persona.console import excerpt
from persona.convert.draft import Draft
from persona.convert.formats import characters, chat_exports, chats, conversations, tables
from persona.convert.formats.characters import card_prompt
from persona.convert.formats.dialogue import Script
from persona.convert.formats.json_rows import Row
from persona.convert.options import Options
from persona.records import RecordFault


@dataclass(frozen=True)
class RowFormat:
    """A format whose rows are objects, a conversation each (or several): `recognise` says why a row is one, or None."""

    recognise: Callable[[dict[str, Any], Options], str | None]
    convert: Callable[[dict[str, Any], Options], Draft | list[Draft]]


@dataclass(frozen=True)
class SpeechFormat:
    """A format whose rows together are one chat or scene; `recognise` sees the first rows of a file."""

    recognise: Callable[[list[dict[str, Any]]], str | None]
    read: Callable[[list[Row], Options], Script]


@dataclass(frozen=True)
class TextFormat:
    """A chat as plain text; `recognise` sees the beginning of the file."""

    recognise: Callable[[str], str | None]
    read: Callable[[str, Options], Script]


# In the order in which they are tried: messages are a stricter kind of ShareGPT, pair rows of questions and answers.
ROW_FORMATS = {
    "messages": RowFormat(conversations.recognise_messages, conversations.convert_messages),
    "sharegpt": RowFormat(conversations.recognise_sharegpt, conversations.convert_sharegpt),
    "alpaca": RowFormat(conversations.recognise_alpaca, conversations.convert_alpaca),
    "card": RowFormat(characters.recognise_card, characters.convert),
    "chatgpt": RowFormat(conversations.recognise_chatgpt, conversations.convert_chatgpt),
    "pairs": RowFormat(conversations.recognise_pairs, conversations.convert_pairs),
    "table": RowFormat(tables.recognise, tables.convert),
}
SPEECH_FORMATS = {
    "discord": SpeechFormat(chat_exports.recognise_discord, chat_exports.read_discord),
    "telegram": SpeechFormat(chat_exports.recognise_telegram, chat_exports.read_telegram),
    "sillytavern": SpeechFormat(chat_exports.recognise_tavern, chat_exports.read_tavern),
    "wechat": SpeechFormat(chat_exports.recognise_wechat, chat_exports.read_wechat),
    "utterances": SpeechFormat(chat_exports.recognise, chat_exports.read),
}
TEXT_FORMATS = {
    "qq": TextFormat(chats.recognise_qq, chats.read_qq),
    "whatsapp": TextFormat(chats.recognise_whatsapp, chats.read_whatsapp),
}
LINES, DIALOGUE, ARTICLES = "lines", "dialogue", "articles"
NAMES = (*ROW_FORMATS, LINES, *SPEECH_FORMATS, *TEXT_FORMATS, DIALOGUE, ARTICLES)
EXPECTED = (
    "conversations (ShareGPT, messages), instruction/output (Alpaca), questions and answers, a chat export, "
    'a character card, articles, or text with lines "NAME: words"'
)


# --- row drafts -------------------------------------------------------------------------------------------------------
# Rows made into drafts one by one, each by the format that recognises it; what none recognises is refused by name.


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
