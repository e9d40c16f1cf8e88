"""The table of formats: a new family is one module with pure functions and one line here."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from persona.convert import alpaca, messages, sharegpt
from persona.convert.draft import Draft


@dataclass(frozen=True)
class RowFormat:
    """A format whose rows are JSON objects, a conversation each: `recognise` says why a row is one, or None."""

    recognise: Callable[[dict[str, Any]], str | None]
    convert: Callable[[dict[str, Any]], Draft]


# In the order in which they are tried: messages are a stricter kind of ShareGPT.
ROW_FORMATS = {
    "messages": RowFormat(messages.recognise, messages.convert),
    "sharegpt": RowFormat(sharegpt.recognise, sharegpt.convert),
    "alpaca": RowFormat(alpaca.recognise, alpaca.convert),
}
DIALOGUE = "dialogue"
NAMES = (*ROW_FORMATS, DIALOGUE)
EXPECTED = 'conversations (ShareGPT, messages), instruction/output (Alpaca), or text with lines "NAME: words"'
