"""The tables of formats: a new family is one module with pure functions and one line here."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from persona.convert import alpaca, card, chat_rows, chat_texts, chatgpt, messages, pairs, sharegpt, tables, utterances
from persona.convert.dialogue import Script
from persona.convert.draft import Draft
from persona.convert.json_input import Row
from persona.convert.options import Options


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
    "messages": RowFormat(messages.recognise, messages.convert),
    "sharegpt": RowFormat(sharegpt.recognise, sharegpt.convert),
    "alpaca": RowFormat(alpaca.recognise, alpaca.convert),
    "card": RowFormat(card.recognise, card.convert),
    "chatgpt": RowFormat(chatgpt.recognise, chatgpt.convert),
    "pairs": RowFormat(pairs.recognise, pairs.convert),
    "table": RowFormat(tables.recognise, tables.convert),
}
SPEECH_FORMATS = {
    "discord": SpeechFormat(chat_rows.recognise_discord, chat_rows.read_discord),
    "telegram": SpeechFormat(chat_rows.recognise_telegram, chat_rows.read_telegram),
    "sillytavern": SpeechFormat(chat_rows.recognise_tavern, chat_rows.read_tavern),
    "wechat": SpeechFormat(chat_rows.recognise_wechat, chat_rows.read_wechat),
    "utterances": SpeechFormat(utterances.recognise, utterances.read),
}
TEXT_FORMATS = {
    "qq": TextFormat(chat_texts.recognise_qq, chat_texts.read_qq),
    "whatsapp": TextFormat(chat_texts.recognise_whatsapp, chat_texts.read_whatsapp),
}
LINES, DIALOGUE, ARTICLES = "lines", "dialogue", "articles"
NAMES = (*ROW_FORMATS, LINES, *SPEECH_FORMATS, *TEXT_FORMATS, DIALOGUE, ARTICLES)
EXPECTED = (
    "conversations (ShareGPT, messages), instruction/output (Alpaca), questions and answers, a chat export, "
    'a character card, articles, or text with lines "NAME: words"'
)
