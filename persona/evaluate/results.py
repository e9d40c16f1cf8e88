"""The figures of an evaluation, one class a kind, each as it is written to evaluation.json.

`tuned` is the model that was trained (or a merged one, or somebody else's generations), `base` the same model with its
adapter switched off, `author` the held-out text itself. A figure that was not measured is None; none is NaN.
"""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Generic, Literal, TypeVar

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from persona.files import JsonObject, write_json
from persona.speak.rounding import Rounding
from persona.train.verdict import Finding

S = TypeVar("S")
T = TypeVar("T")
PLAIN = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


@dataclass(frozen=True, config=PLAIN)
class Estimate:
    """A figure with its 95 % confidence interval; without one if there is too little to resample."""

    value: float | None
    low: float | None = None
    high: float | None = None
    reason: str | None = None
    """Why there is no value."""


@dataclass(frozen=True, config=PLAIN)
class Sides(Generic[T]):
    """The same figure of both sides; `base` is None if there is no adapter to switch off."""

    tuned: T
    base: T | None = None

    def each(self, function: Callable[[T], S]) -> "Sides[S]":
        """`function` of both sides."""
        return Sides(function(self.tuned), None if self.base is None else function(self.base))


@dataclass(frozen=True, config=PLAIN)
class Score:
    """How well one side predicts the replies of a file, each in its real context."""

    perplexity: Estimate
    """exp of the mean negative log-likelihood per supervised token."""
    bits_per_character: Estimate
    """Negative log-likelihood in bits over the characters of the replies; comparable between tokenizers."""


@dataclass(frozen=True, config=PLAIN)
class FileScore:
    """The score on one file: the persona's held-out replies, or a control that should not get worse."""

    file: str
    """The file with its folder, since many files are called val.jsonl."""
    sha256: str
    role: Literal["held_out", "control"]
    conversations: int
    replies: int
    tokens: int
    """Supervised tokens."""
    characters: int
    """Characters of the replies."""
    score: Sides[Score]
    ratio: Estimate | None
    """Perplexity of tuned over base, resampled in pairs: below 1 is better."""
    left_out: tuple[str, ...] = ()
    """Conversations that could not be measured exactly, with the reason."""
    precision: str = ""
    """Precision of the computation: `fp32`, `bf16` or `fp16`."""


@dataclass(frozen=True, config=PLAIN)
class Matrix:
    """Perplexities of several models on several files: each should predict its own author's file best."""

    models: tuple[str, ...]
    files: tuple[str, ...]
    perplexity: tuple[tuple[float, ...], ...]
    """A row per file, a column per model; the last column is the base of the first model, if it has one."""
    own: tuple[str | None, ...]
    """For each file the model whose held-out file it is, if any."""


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
    """Whether this very question was in the training data; the others were held out."""


@dataclass(frozen=True, config=PLAIN)
class Recall:
    """Memory of the lore: the share of the key facts in an answer, as the mean over the questions."""

    with_system: Sides[Estimate]
    without_system: Sides[Estimate]
    questions: tuple[Question, ...]
    facts_given: bool
    """Whether all facts were given as keywords, or some were taken from the references."""


@dataclass(frozen=True, config=PLAIN)
class Span:
    """A span of a reply, in characters, that is in the training data too."""

    start: int
    end: int
    source: str
    """Source and group of the training conversation."""


@dataclass(frozen=True, config=PLAIN)
class Copied:
    """How much of one side's replies is pasted from the training data (spans of 8 or more tokens)."""

    share: Estimate
    """Tokens in copied spans over all tokens of the replies; the interval is over replies."""
    longest: int
    """Tokens of the longest copied span."""
    text: str
    """That span."""
    source: str
    """Its source and group in the training data; empty if nothing is copied."""


@dataclass(frozen=True, config=PLAIN)
class Copying:
    """The copies of both sides, and the share of the author's own held-out replies that is in the training data too."""

    author: float
    side: Sides[Copied]


@dataclass(frozen=True, config=PLAIN)
class Exchange:
    """One held-out prompt with the replies of both sides."""

    prompt: str
    """The last user message."""
    target: str
    said: Sides[str]
    copied: tuple[Span, ...]
    """Spans of the tuned reply."""


@dataclass(frozen=True, config=PLAIN)
class Distance:
    """One measure of style: how far each side is from the author, and the author from himself."""

    name: str
    unit: str
    author: Estimate
    """Between random halves of the author's own text: nothing can be nearer than that."""
    distance: Sides[Estimate]


@dataclass(frozen=True, config=PLAIN)
class Level:
    """One plain measure of a text by itself, such as the length of its sentences."""

    name: str
    unit: str
    author: Estimate
    side: Sides[Estimate]


@dataclass(frozen=True, config=PLAIN)
class Distribution:
    """Shares or rates by class, to be drawn over each other."""

    name: str
    unit: str
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

    headline: Estimate
    """0 is the base, 1 is as near as the author's own other half."""
    words: str
    """The way words were cut: `words`, `jieba 0.42.1`, `character bigrams`."""
    texts: int
    sample: int
    """Characters of each sample that was compared; distances of other lengths do not compare."""
    distances: tuple[Distance, ...]
    """The last is the weighted mean behind the headline."""
    levels: tuple[Level, ...]
    diversity: tuple[Level, ...]
    """The variety of the words, all sides cut to the same length."""
    distributions: tuple[Distribution, ...]
    phrases: tuple[Phrase, ...]
    notes: tuple[str, ...] = ()
    """Warnings about the figures, such as too little text."""


# --- the whole --------------------------------------------------------------------------------------------------------


NAME = "evaluation.json"
FORMAT = 2


@dataclass(frozen=True, config=PLAIN)
class Curve:
    """The losses that a run measured, by update."""

    train: tuple[tuple[int, float], ...]
    """Loss in nats per token."""
    held_out: tuple[tuple[int, float], ...]
    """The same on held-out conversations; update 0 is the base."""
    best: int | None
    """The update with the lowest held-out loss."""


@dataclass(frozen=True, config=PLAIN)
class DataStatistics:
    """Counts of one file that was trained or measured on."""

    file: str
    sha256: str
    conversations: int
    replies: int
    characters: int
    """Characters of the replies."""
    median_reply: int
    """Median length of a reply in characters."""
    types: dict[str, int]
    """Conversations by `meta.type`."""


@dataclass(frozen=True, config=PLAIN)
class Evaluation:
    """All figures of one model."""

    name: str
    """Name of the run or the file."""
    kind: Literal["adapter", "model", "texts"]
    seed: int
    language: str
    """`zh` or `en`; it decides the tokenizer of BLEU and how words are counted."""
    scores: tuple[FileScore, ...] = ()
    replies: Sides[Replies] | None = None
    rounding: Rounding | None = None
    """The way in which the model's replies were decoded, so that they do not depend on the batch."""
    recall: Recall | None = None
    copying: Copying | None = None
    style: StyleReport | None = None
    exchanges: tuple[Exchange, ...] = ()
    verdict: tuple[Finding, ...] = ()
    curve: Curve | None = None
    data: tuple[DataStatistics, ...] = ()
    settings: JsonObject | None = None
    """The settings of the run."""
    versions: dict[str, str] | None = None
    hashes: dict[str, str] | None = None
    """SHA-256 of the base, the adapter and the data files."""
    format: int = FORMAT


def write_evaluation(path: Path, evaluation: Evaluation) -> None:
    """Write `evaluation` as readable JSON, whole or not at all."""
    write_json(path, asdict(evaluation))
