"""Files of records -> conversations of examples: the system prompt, the lore, and the records left out."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from persona.config import Data
from persona.errors import DataError, UsageError
from persona.model.render import ChatFormat, Example, Message, Untrainable, render
from persona.records import Record, read_records, repeat_weighted

Conversation = tuple[Example, ...]


@dataclass(frozen=True)
class Dataset:
    """Rendered conversations, their records, and one line for each record that was left out."""

    records: list[Record]
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
    """The system prompt of the run: that of the settings, or the most frequent one in the training `records`."""
    if data.system_prompt is not None:
        return read_system_prompt(data.system_prompt, "data.system_prompt")
    counts = Counter(record.system for record in records if record.system is not None)
    return counts.most_common(1)[0][0] if counts else None


def with_system(record: Record, system: str | None) -> list[Message]:
    """The messages of `record`, with `system` in front when it has no system message of its own."""
    own = record.system if record.system is not None else system
    return [*([{"role": "system", "content": own}] if own else []), *record.turns]


def render_records(records: Sequence[Record], fmt: ChatFormat, system: str | None, max_length: int) -> Dataset:
    """Every conversation rendered; one that cannot be learned is left out whole, with the reason."""
    kept: list[Record] = []
    conversations: list[Conversation] = []
    left_out: list[str] = []
    for number, record in enumerate(records, 1):
        try:
            conversations.append(tuple(render(with_system(record, system), fmt, max_length)))
            kept.append(record)
        except Untrainable as error:
            place = f"{record.meta.get('source', 'record')} {record.meta.get('group', number)}"
            left_out.append(f"{place}: {error}")
    if records and not conversations:
        raise DataError(f"None of the {len(records)} conversations can be learned. The first reason: {left_out[0]}")
    return Dataset(kept, conversations, left_out)


@dataclass(frozen=True)
class Records:
    """The records of a run, read but not rendered."""

    train: list[Record]
    """The training conversations, then the lore, repeated by its weight."""
    held_out: list[Record]
    system: str | None
    """The run's system prompt."""

    @property
    def shared(self) -> int:
        """How many held-out conversations are also trained on."""
        trained = {_text(record) for record in self.train}
        return sum(_text(record) in trained for record in self.held_out)


def _text(record: Record) -> str:
    return "\n".join(" ".join(message["content"].split()) for message in record.turns)


def read_data(data: Data, seed: int) -> Records:
    """The records of every file in the data section; raises `DataError` or `UsageError` with the place."""
    train = read_records(Path(data.train_file))
    held_out = read_records(Path(data.validation_file)) if data.validation_file is not None else []
    lore = read_records(Path(data.lore_file)) if data.lore_file is not None else []
    system = choose_system_prompt(data, train)
    return Records([*train, *repeat_weighted(lore, data.lore_weight, seed)], held_out, system)
