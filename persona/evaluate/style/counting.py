"""Passages counted: for each family of features one matrix, a row for a passage, a column for a feature.

Everything else is computed from sums of rows, so that thousands of samples cost a few products of matrices.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from persona.evaluate.results import Distribution, Estimate, Level, Sides
from persona.evaluate.style import words as lexicon
from persona.evaluate.style.words import Language, Segmenter, passages, sentences, units, words

T = TypeVar("T")
OTHER = "(other)"  # the class of everything outside a vocabulary
_WORDS, _GRAMS, _PAIRS = 3000, 6000, 150  # the most frequent ones
_SPREAD = 800  # words of the word distribution
_SENTENCE_BINS = (1, 2, 3, 4, 5, 6, 8, 10, 13, 17, 22, 29, 38, 50)  # words, or characters; steps of about 1.3
_TEXT_BINS = (0, 10, 20, 30, 45, 60, 85, 120, 170, 240, 340, 480, 680, 960, 1360, 1920, 2720)  # steps of about 1.4


@dataclass(frozen=True)
class Passage:
    """The unit of the samples: a text, or a part of a long one; `opens` is the length of the text that it begins."""

    text: str
    opens: int | None


@dataclass(frozen=True)
class Counts:
    """One set of texts, counted: matrices of (passages, features), and the characters of each passage."""

    families: Mapping[str, np.ndarray]
    characters: np.ndarray  # (passages,)


Features = dict[str, list[str]]  # family: the features of a passage, in their order
Columns = Mapping[str, Mapping[str, int]]  # family: the column of each feature


def passages_of(texts: Sequence[str]) -> list[Passage]:
    """The passages of all texts that are not blank."""
    found = []
    for text in texts:
        if text.strip():
            parts = passages(text.strip())
            found.append(Passage(parts[0], len(text.strip())))
            found += [Passage(part, None) for part in parts[1:]]
    return found


def bins(edges: Sequence[int]) -> list[str]:
    """The names of the bins that begin at `edges`: "6-7", "50+"."""
    names = [f"{low}" if low == high - 1 else f"{low}-{high - 1}" for low, high in zip(edges, edges[1:], strict=False)]
    return [*names, f"{edges[-1]}+"]


def _binned(edges: Sequence[int], names: Sequence[str], value: int) -> str:
    return names[max(int(np.searchsorted(edges, value, "right")) - 1, 0)]


_SENTENCE_NAMES, _TEXT_NAMES = bins(_SENTENCE_BINS), bins(_TEXT_BINS)
FIXED = {"sentence_length": _SENTENCE_NAMES, "text_length": _TEXT_NAMES}


def features(passage: Passage, language: Language, cut: Segmenter) -> Features:
    """The features of a passage by family, each as often as it occurs."""
    text = passage.text
    found = words(text, cut)
    flat = " ".join(text.casefold().split())
    function = found if language == "en" else list(flat)
    lengths = [len(units(sentence)) for sentence in sentences(text)]
    return {
        "words": found,
        "frequent_words": found,
        "characters": [flat[start : start + n] for n in (3, 4, 5) for start in range(len(flat) - n + 1)],
        "function_words": function,
        "delta": function if language == "en" else function + [flat[i : i + 2] for i in range(len(flat) - 1)],
        "punctuation": lexicon.marks(text),
        "sentence_length": [_binned(_SENTENCE_BINS, _SENTENCE_NAMES, length) for length in lengths if length],
        "text_length": [] if passage.opens is None else [_binned(_TEXT_BINS, _TEXT_NAMES, passage.opens)],
    }


def vocabulary(groups: Iterable[Sequence[Features]], language: Language) -> Columns:
    """The features to count: the most frequent ones of all groups, each group with the same weight."""
    shares: dict[str, Counter[str]] = {}
    for group in groups:
        counted: dict[str, Counter[str]] = {}
        for passage in group:
            for family, found in passage.items():
                counted.setdefault(family, Counter()).update(found)
        for family, counter in counted.items():
            total = max(counter.total(), 1)
            shares.setdefault(family, Counter()).update({name: count / total for name, count in counter.items()})
    function = lexicon.ENGLISH if language == "en" else lexicon.CHINESE
    chosen = {
        "words": [*_most(shares, "words", _WORDS, lambda _: True), OTHER],
        "frequent_words": [*_most(shares, "words", _SPREAD, lambda _: True), OTHER],
        "characters": _most(shares, "characters", _GRAMS, lambda _: True),
        "function_words": [*sorted(function), OTHER],
        "delta": _delta(shares, language, function),
        "punctuation": _most(shares, "punctuation", _WORDS, lambda _: True),
        **FIXED,
    }
    return {family: {name: column for column, name in enumerate(names)} for family, names in chosen.items()}


def _most(shares: dict[str, Counter[str]], family: str, count: int, fits: Callable[[str], bool]) -> list[str]:
    found = sorted(((-share, name) for name, share in shares.get(family, Counter()).items() if fits(name)))
    return [name for _, name in found[:count]]


def _delta(shares: dict[str, Counter[str]], language: Language, function: frozenset[str]) -> list[str]:
    if language == "en":
        return [*_most(shares, "delta", _PAIRS, function.__contains__), OTHER]
    grams = _most(shares, "delta", _PAIRS, lambda gram: not gram.isspace() and " " not in gram)
    return [*sorted(function | set(grams)), OTHER]


def count(group: Sequence[Features], passages: Sequence[Passage], known: Columns) -> Counts:
    """The matrices of one set of passages; unknown features count as other if the family has such a column."""
    families = {}
    for family, columns in known.items():
        matrix = np.zeros((len(group), len(columns)), np.float32)
        other = columns.get(OTHER)
        for row, passage in enumerate(group):
            for name, times in Counter(passage[family]).items():
                column = columns.get(name, other)
                if column is not None:
                    matrix[row, column] += times
        families[family] = matrix
    return Counts(families, np.array([len(passage.text) for passage in passages], np.float64))


def joined(sets: Sequence[Counts]) -> Counts:
    """Several sets as one, in their order."""
    families = {family: np.concatenate([part.families[family] for part in sets]) for family in sets[0].families}
    return Counts(families, np.concatenate([part.characters for part in sets]))


@dataclass(frozen=True)
class Corpus:
    """One set of texts in every form that the measures need."""

    passages: Sequence[Passage]
    features: Sequence[Features]
    counts: Counts


# --- sampling ---------------------------------------------------------------------------------------------------------
# Samples of equal length: texts in random order up to a number of characters, the last one counted in part.
#
# A distance between two samples shrinks as they grow, since chance averages out; only samples of one length compare.


def orders(generator: np.random.Generator, repeats: int, passages: int) -> np.ndarray:
    """Random orders of the passages: (repeats, passages)."""
    return generator.permuted(np.tile(np.arange(passages), (repeats, 1)), axis=1)


def multiplicities(generator: np.random.Generator, repeats: int, passages: int) -> np.ndarray:
    """How often a bootstrap draws each passage: (repeats, passages). Efron 1979."""
    return generator.multinomial(passages, np.full(passages, 1 / passages), size=repeats)


def weights(order: np.ndarray, times: np.ndarray, characters: np.ndarray, sample: float) -> np.ndarray:
    """How much each passage counts in a sample of `sample` characters drawn in this order: (repeats, passages).

    `order` is (repeats, those to draw from); `times`, (repeats, passages), is how often a passage may be drawn.
    """
    there = np.take_along_axis(times * characters, order, axis=1)
    before = np.cumsum(there, axis=1) - there
    share = np.clip((sample - before) / np.maximum(there, 1e-9), 0, 1)
    found = np.zeros((len(order), len(characters)))
    np.put_along_axis(found, order, share, axis=1)
    return (found * times).astype(np.float32)


# --- describing -------------------------------------------------------------------------------------------------------
# Each set of texts by itself: its plain measures with their intervals, and its distributions for a picture.


_SHOWN = 16  # marks or words in a picture
Ratio = tuple[float, float]  # a count, and the total that it is a share of


def by_side(sets: Mapping[str, T]) -> Sides[T]:
    """The values of "tuned" and, if it is there, "base"."""
    return Sides(sets["tuned"], sets.get("base"))


@dataclass(frozen=True)
class _Plain:
    name: str
    unit: str
    count: Callable[[Passage, Features], Ratio]


def levels(sets: Mapping[str, Corpus], language: Language, cutter: str, seed: int, repeats: int) -> tuple[Level, ...]:
    """The plain measures of each set, with bootstrap intervals over the passages (Efron 1979)."""
    generator = np.random.default_rng(seed)
    found = []
    for plain in _plain(language, cutter):
        values = {name: _value(plain, corpus, generator, repeats) for name, corpus in sets.items()}
        found.append(Level(plain.name, plain.unit, values["author"], by_side(values)))
    return tuple(found)


def _value(plain: _Plain, corpus: Corpus, generator: np.random.Generator, repeats: int) -> Estimate:
    pairs = [plain.count(passage, found) for passage, found in zip(corpus.passages, corpus.features, strict=True)]
    counted = np.array(pairs, float).reshape(-1, 2)
    above, below = counted.sum(axis=0)
    if not below:
        return Estimate(None, reason="nothing of this kind to count")
    sums = multiplicities(generator, repeats, len(counted)) @ counted
    sums = sums[sums[:, 1] > 0]
    low, high = np.percentile(sums[:, 0] / sums[:, 1], (2.5, 97.5))
    return Estimate(float(above / below), float(low), float(high))


def _plain(language: Language, cutter: str) -> list[_Plain]:
    words = "characters" if language == "zh" else "words"
    function = lexicon.CHINESE if language == "zh" else lexicon.ENGLISH

    def marks(kind: Callable[[str], bool]) -> Callable[[Passage, Features], Ratio]:
        return lambda passage, found: (1000 * sum(map(kind, found["punctuation"])), len(passage.text))

    def sentence_length(passage: Passage, _: Features) -> Ratio:
        lengths = [length for sentence in sentences(passage.text) if (length := len(units(sentence)))]
        return sum(lengths), len(lengths)

    def of_words(passage: Passage, found: Features) -> Ratio:
        return sum(word in function for word in found["function_words"]), len(units(passage.text))

    named = {*lexicon.NAMED.values(), lexicon.REST}
    profile = "per 1,000 characters"
    found = [
        _Plain("text length", "characters", lambda passage, _: (len(passage.text), passage.opens is not None)),
        _Plain("sentence length", words, sentence_length),
        _Plain("punctuation marks", profile, marks(lambda mark: mark not in named)),
        _Plain("emoji", profile, marks(lambda mark: mark == lexicon.NAMED["emoji"])),
        _Plain("Latin letters", profile, marks(lambda mark: mark == lexicon.NAMED["latin"])),
        _Plain("digits", profile, marks(lambda mark: mark == lexicon.NAMED["digit"])),
        _Plain("function words", f"share of {words}", of_words),
    ]
    if language == "zh":
        by_words = cutter.startswith("jieba")
        unit = "share of words (jieba)" if by_words else "share of characters (no jieba)"
        found.append(_Plain("the 28 stop words of older reports", unit, _stop_words if by_words else _stop_characters))
    return found


def _stop_words(_: Passage, found: Features) -> Ratio:
    return sum(word in lexicon.STOP_WORDS for word in found["words"]), len(found["words"])


def _stop_characters(passage: Passage, _: Features) -> Ratio:
    return sum(len(word) for word in lexicon.STOP_WORD.findall(passage.text)), len(units(passage.text))


def distributions(sets: Mapping[str, Corpus], columns: Columns, language: Language) -> tuple[Distribution, ...]:
    """Text and sentence lengths as shares; marks and function words as rates, the most frequent of all sets."""
    words = "characters" if language == "zh" else "words"
    marks, function = _frequent(sets, columns, "punctuation"), _frequent(sets, columns, "function_words")
    drawn = (
        ("text_length", "text length", "share of texts, by characters", FIXED["text_length"], 1),
        ("sentence_length", "sentence length", f"share of sentences, by {words}", FIXED["sentence_length"], 1),
        ("punctuation", "punctuation", "per 1,000 characters", marks, 1000),
        ("function_words", "function words", f"per 1,000 {words}", function, 1000),
    )
    made = [_distribution(sets, columns, *each) for each in drawn]
    return tuple(one for one in made if one is not None)


def _rates(corpus: Corpus, family: str) -> np.ndarray | None:
    counted = corpus.counts.families[family].sum(axis=0, dtype=float)
    return counted / counted.sum() if counted.sum() else None


def _frequent(sets: Mapping[str, Corpus], columns: Columns, family: str) -> list[str]:
    every = [rates for corpus in sets.values() if (rates := _rates(corpus, family)) is not None]
    total = np.sum(every, axis=0) if every else np.zeros(len(columns[family]))
    dull = {OTHER, lexicon.REST, lexicon.NAMED["latin"]}
    names = sorted(
        (name for name in columns[family] if name not in dull), key=lambda name: -total[columns[family][name]]
    )
    return [name for name in names if total[columns[family][name]] > 0][:_SHOWN]


def _distribution(
    sets: Mapping[str, Corpus], columns: Columns, family: str, name: str, unit: str, bins: Sequence[str], scale: float
) -> Distribution | None:
    """The distribution of one family; None if the author or the tuned side has nothing of it."""
    at = [columns[family][label] for label in bins]
    drawn: dict[str, tuple[float, ...]] = {}
    for side, corpus in sets.items():
        rates = _rates(corpus, family)
        if rates is not None:
            drawn[side] = tuple(float(scale * rate) for rate in rates[at])
    if not {"author", "tuned"} <= drawn.keys():
        return None
    return Distribution(name, unit, tuple(bins), drawn["author"], by_side(drawn))
