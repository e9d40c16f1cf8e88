"""Files of records -> conversations of examples: system prompt, settings mixed in, and what had to be left out."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from persona.config import Data
from persona.errors import DataError, UsageError
from persona.records import Record, read_records, repeat_weighted
from persona.render import ChatFormat, Example, Message, Untrainable, render

Conversation = tuple[Example, ...]


@dataclass(frozen=True)
class Dataset:
    """Rendered conversations, and one line for each that was left out."""

    conversations: list[Conversation]
    left_out: list[str]

    @property
    def examples(self) -> list[Example]:
        """Every example, in the order of the conversations."""
        return [example for conversation in self.conversations for example in conversation]

    @property
    def tokens(self) -> int:
        """Tokens of all examples, each in its full context."""
        return sum(len(example.prompt_ids) + len(example.reply_ids) for example in self.examples)

    @property
    def supervised(self) -> int:
        """Tokens that are learned: the replies and their end tokens."""
        return sum(len(example.reply_ids) for example in self.examples)


def read_system_prompt(text: str | None, option: str) -> str | None:
    """`text`, or the contents of FILE when it is `@FILE`; surrounding white space is dropped."""
    if text is None or not text.startswith("@"):
        return text
    path = Path(text[1:])
    try:
        return path.read_text(encoding="utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UsageError(f"{option}: {path} cannot be read: {reason}. After @ comes the path of a text file.") from None


def choose_system_prompt(data: Data, records: Sequence[Record]) -> str | None:
    """The system prompt of the run: the setting, or the most frequent one in the training data."""
    if data.system_prompt is not None:
        return read_system_prompt(data.system_prompt, "data.system_prompt")
    counts = Counter(record.system for record in records)
    return counts.most_common(1)[0][0]


def with_system(record: Record, system: str | None) -> list[Message]:
    """The messages of `record`, with `system` in front when it has no system message of its own."""
    own = record.system if record.system is not None else system
    return [*([{"role": "system", "content": own}] if own else []), *record.turns]


def render_records(records: Sequence[Record], fmt: ChatFormat, system: str | None, max_length: int) -> Dataset:
    """Every conversation rendered; one that cannot be learned is left out whole, with its reason."""
    conversations, left_out = [], []
    for number, record in enumerate(records, 1):
        try:
            conversations.append(tuple(render(with_system(record, system), fmt, max_length)))
        except Untrainable as error:
            place = f"{record.meta.get('source', 'record')} {record.meta.get('group', number)}"
            left_out.append(f"{place}: {error}")
    if records and not conversations:
        raise DataError(f"None of the {len(records)} conversations can be learned. The first reason: {left_out[0]}")
    return Dataset(conversations, left_out)


def read_training_records(data: Data, seed: int) -> list[Record]:
    """The training conversations, then the settings repeated by their weight."""
    records = read_records(Path(data.train_file))
    if data.settings_file is not None:
        records = records + repeat_weighted(read_records(Path(data.settings_file)), data.settings_weight, seed)
    return records
