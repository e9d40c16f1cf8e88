"""What an evaluation found, as it stands in evaluation.json: plain JSON for programs, classes for our own pages."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from persona.errors import UsageError
from persona.evaluation.figures import PLAIN, Copying, Exchange, FileScore, Recall, Replies, Sides, StyleReport
from persona.storage import write_json

NAME = "evaluation.json"
FORMAT = 1


@dataclass(frozen=True, config=PLAIN)
class Finding:
    """A sentence of the verdict, with its number in it, and the setting to change, if one helps."""

    code: str
    """Such as `best_at`, `overfitting`, `does_not_stop`."""
    text: str
    setting: str | None = None


@dataclass(frozen=True, config=PLAIN)
class Curve:
    """What a run measured while it trained, by update."""

    train: tuple[tuple[int, float], ...]
    """Loss in nats per token."""
    held_out: tuple[tuple[int, float], ...]
    """The same on held-out conversations; update 0 is the base."""
    best: int | None
    """The update with the lowest held-out loss."""


@dataclass(frozen=True, config=PLAIN)
class DataStatistics:
    """What was learned from, or measured on."""

    file: str
    sha256: str
    conversations: int
    replies: int
    characters: int
    """Of the replies."""
    median_reply: int
    """Characters."""
    types: dict[str, int]
    """Conversations by `meta.type`."""


@dataclass(frozen=True, config=PLAIN)
class Evaluation:
    """Everything that was found about one model."""

    name: str
    """Of the run or the file."""
    kind: Literal["adapter", "model", "texts"]
    seed: int
    language: str
    """`zh` or `en`: which tokenizer BLEU takes and how words are counted."""
    scores: tuple[FileScore, ...] = ()
    replies: Sides[Replies] | None = None
    recall: Recall | None = None
    copying: Sides[Copying] | None = None
    style: StyleReport | None = None
    exchanges: tuple[Exchange, ...] = ()
    verdict: tuple[Finding, ...] = ()
    curve: Curve | None = None
    data: tuple[DataStatistics, ...] = ()
    settings: dict[str, Any] | None = None
    """The run's configuration."""
    versions: dict[str, str] | None = None
    hashes: dict[str, str] | None = None
    """SHA-256 by what they are of: base, adapter, data files."""
    format: int = FORMAT


def write_evaluation(path: Path, evaluation: Evaluation) -> None:
    """Write `evaluation` as readable JSON, whole or not at all."""
    write_json(path, asdict(evaluation))


def read_evaluation(path: Path) -> Evaluation:
    """The evaluation in `path`, a file or the folder of a run; raises `UsageError` with the place of what is wrong."""
    file = path / NAME if path.is_dir() else path
    again = f"Make it with: python evaluate_model.py report {path.as_posix()}"
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise UsageError(f"{file} cannot be read. {again}") from None
    try:
        if (found := json.loads(text).get("format")) != FORMAT:
            raise UsageError(f"{file}: it is of format {found}, this version reads format {FORMAT}. {again}")
        return TypeAdapter(Evaluation).validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise UsageError(f"{file}: {place}: {first['msg']}. {again}") from None
    except (ValueError, AttributeError):
        raise UsageError(f"{file} is no evaluation. {again}") from None
