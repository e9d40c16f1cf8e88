"""The figures of an evaluation, one class a kind, each as it stands in evaluation.json.

`tuned` is the model that was trained (or a merged one, or somebody else's generations), `base` the same model with its
adapter switched off, `author` the held-out text itself. What was not measured is None; nothing is NaN.
"""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from persona.errors import UsageError
from persona.files import write_json

S = TypeVar("S")
T = TypeVar("T")
PLAIN = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


@dataclass(frozen=True, config=PLAIN)
class Estimate:
    """A figure with its 95 % confidence interval, or without one where there is too little to resample."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, config=PLAIN)
class Sides(Generic[T]):
    """The same figure of both sides; `base` is None where there is no adapter to switch off."""

    tuned: T
    base: T | None = None

    def each(self, function: Callable[[T], S]) -> "Sides[S]":
        """`function` of both sides."""
        return Sides(function(self.tuned), None if self.base is None else function(self.base))


@dataclass(frozen=True, config=PLAIN)
class Score:
    """How well a side expects the replies of a file, each in its real context."""

    perplexity: Estimate
    """exp of the mean negative log-likelihood per supervised token."""
    bits_per_character: Estimate
    """Negative log-likelihood in bits over the characters of the replies; comparable between tokenizers."""


@dataclass(frozen=True, config=PLAIN)
class FileScore:
    """The score on one file: the persona's held-out replies, or a control that should not get worse."""

    file: str
    """With its folder, since files of several people have one name."""
    sha256: str
    role: Literal["held_out", "control"]
    conversations: int
    replies: int
    tokens: int
    """Supervised ones."""
    characters: int
    """Of the replies."""
    score: Sides[Score]
    ratio: Estimate | None
    """Perplexity of tuned over base, resampled in pairs: below 1 is better."""
    left_out: tuple[str, ...] = ()
    """Conversations that could not be measured exactly, with the reason."""
    precision: str = ""
    """`fp32`, `bf16` or `fp16`, in which the model computed."""


@dataclass(frozen=True, config=PLAIN)
class Replies:
    """Figures of one side's replies to the held-out prompts."""

    count: int
    bleu: float
    """Corpus BLEU from 0 to 100 (sacrebleu, tokenizer `zh` for Chinese)."""
    chrf: float
    """Corpus chrF from 0 to 100 (sacrebleu)."""
    rouge_l: float
    """Mean ROUGE-L F1 from 0 to 100."""
    length_ratio: float
    """Characters written over characters of the references."""
    breaks_character: float
    """Share of the replies that speak as a language model or under another speaker's name."""
    stops: float | None = None
    """Share of the replies that end by themselves before the limit; None for texts from elsewhere."""


@dataclass(frozen=True, config=PLAIN)
class Answer:
    """A reply to a question about the lore, and which of the key facts are in it."""

    text: str
    found: tuple[str, ...]


@dataclass(frozen=True, config=PLAIN)
class Question:
    """A question about the character's world."""

    question: str
    reference: str
    facts: tuple[str, ...]
    with_system: Sides[Answer]
    """Asked under the system prompt of training."""
    without_system: Sides[Answer]
    trained: bool
    """Whether the very question was learned, which is what lore is for, or held out."""


@dataclass(frozen=True, config=PLAIN)
class Recall:
    """Memory of the lore: share of the key facts that were found, mean over the questions."""

    with_system: Sides[Estimate]
    without_system: Sides[Estimate]
    questions: tuple[Question, ...]
    facts_given: bool
    """Whether all facts were given as keywords, or some were taken from the references."""


@dataclass(frozen=True, config=PLAIN)
class Span:
    """A stretch of a reply, in characters, that stands in the training data too."""

    start: int
    end: int
    source: str
    """Where in the training data: source and group of the conversation."""


@dataclass(frozen=True, config=PLAIN)
class Copying:
    """How much of the replies is pasted from the training data (spans of 8 or more tokens)."""

    share: float
    """Of the replies' tokens, those in copied spans."""
    longest: int
    """Tokens of the longest copied span."""
    text: str
    """That span."""
    source: str
    """Where it comes from; empty where nothing is copied."""


@dataclass(frozen=True, config=PLAIN)
class Diversity:
    """How varied the words are, all sides cut to the same length; None where there is too little text."""

    distinct_1: float | None
    distinct_2: float | None
    mattr: float | None
    """Moving-average type-token ratio."""
    self_bleu: float | None
    """0 to 100: how much the replies are alike."""


@dataclass(frozen=True, config=PLAIN)
class Exchange:
    """One held-out prompt and what each side said, for reading side by side."""

    prompt: str
    """The last user message."""
    target: str
    said: Sides[str]
    copied: tuple[Span, ...]
    """In the tuned reply."""


@dataclass(frozen=True, config=PLAIN)
class Distance:
    """One measure of style: how far each side is from the author, and the author from himself."""

    name: str
    author: Estimate
    """Between random halves of the author's own text: nothing can be nearer than that."""
    distance: Sides[float]


@dataclass(frozen=True, config=PLAIN)
class Distribution:
    """Shares (or rates) by class, to be drawn over each other."""

    name: str
    labels: tuple[str, ...]
    author: tuple[float, ...]
    side: Sides[tuple[float, ...]]


@dataclass(frozen=True, config=PLAIN)
class Phrase:
    """A catch-phrase of the author and its rate in 1,000 words (characters for Chinese)."""

    text: str
    author: float
    rate: Sides[float]


@dataclass(frozen=True, config=PLAIN)
class StyleReport:
    """How far from base to author the tuned model has come."""

    headline: Estimate | None
    """0 is the base, 1 the author; None without a base."""
    words: str
    """How words were found: `jieba`, `character bigrams`, `letters`."""
    texts: int
    distances: tuple[Distance, ...]
    distributions: tuple[Distribution, ...]
    phrases: tuple[Phrase, ...]
    diversity: Sides[Diversity]
    author_diversity: Diversity
    notes: tuple[str, ...] = ()
    """What a person should know of the figures, such as too little text."""


# --- results ----------------------------------------------------------------------------------------------------------
# What an evaluation found, as it stands in evaluation.json: plain JSON for programs, classes for our own pages.


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
