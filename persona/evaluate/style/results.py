"""What a comparison finds, as plain values: `dataclasses.asdict` of any of it is JSON, without NaN."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval, or the reason why there is none (then all three are None)."""

    value: float | None
    low: float | None = None
    high: float | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Distance:
    """How far from the author: another half of himself (the ceiling), the base (the floor), the tuned model."""

    name: str
    label: str
    unit: str
    source: str
    weight: float  # in the headline; 0 for those that are shown only
    ceiling: Estimate
    floor: Estimate
    tuned: Estimate
    progress: (
        Estimate  # of the way from floor to ceiling: 0 = as far as the base, 1 = as near as the author's other half
    )


@dataclass(frozen=True)
class Level:
    """One measure of a text by itself, in each of the three."""

    name: str
    label: str
    unit: str
    source: str
    author: Estimate
    base: Estimate
    tuned: Estimate


@dataclass(frozen=True)
class Histogram:
    """One distribution of each of the three over the same bins, shares or rates as `unit` says; None: no text."""

    name: str
    label: str
    unit: str
    bins: tuple[str, ...]
    author: tuple[float, ...] | None
    base: tuple[float, ...] | None
    tuned: tuple[float, ...] | None


@dataclass(frozen=True)
class Phrase:
    """A catch-phrase: the z-score of its log-odds against the base, and its rate in each per 1,000 words."""

    text: str
    z: float
    author: float
    base: float | None
    tuned: float | None


@dataclass(frozen=True)
class Texts:
    """How much there was to compare: texts that are not blank, their characters, and the passages drawn from."""

    texts: int
    characters: int
    passages: int


@dataclass(frozen=True)
class Comparison:
    """How far from base to author the tuned model has gone, and what that rests on."""

    score: Estimate  # the headline: 0 = the base, 1 = as near as the author's own other half
    distance: Distance  # the weighted mean of `distances` that the headline is made of
    distances: tuple[Distance, ...]
    levels: tuple[Level, ...]
    diversity: tuple[Level, ...]
    histograms: tuple[Histogram, ...]
    phrases: tuple[Phrase, ...]
    language: str  # "zh" or "en"
    words: str  # what cut the words: "words", "jieba 0.42.1", "character bigrams"
    sample: int  # characters of each sample that was compared
    seed: int
    author: Texts
    base: Texts
    tuned: Texts | None
    notes: tuple[str, ...]  # what a reader has to know: little text, texts cut into passages
