"""Passages counted: for each family of features one matrix, a row for a passage, a column for a feature.

Everything else is computed from sums of rows, so that thousands of samples cost a few products of matrices.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from persona.style import lexicon
from persona.style.units import Language, Segmenter, passages, sentences, units, words

OTHER = "(other)"  # what a distribution has outside its vocabulary
_WORDS, _GRAMS, _PAIRS = 3000, 6000, 150  # the most frequent ones
_SPREAD = 800  # words of the word distribution
_SENTENCE_BINS = (1, 2, 3, 4, 5, 6, 8, 10, 13, 17, 22, 29, 38, 50)  # words, or characters; steps of about 1.3
_TEXT_BINS = (0, 10, 20, 30, 45, 60, 85, 120, 170, 240, 340, 480, 680, 960, 1360, 1920, 2720)  # steps of about 1.4


@dataclass(frozen=True)
class Passage:
    """What is drawn in samples: a text, or a part of a long one; `opens` has the length of the text it begins."""

    text: str
    opens: int | None


@dataclass(frozen=True)
class Counts:
    """One set of texts, counted: matrices of (passages, features), and the characters of each passage."""

    families: Mapping[str, np.ndarray]
    characters: np.ndarray  # (passages,)


Features = dict[str, list[str]]  # family: what stands in a passage, in its order
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
    """What stands in a passage, family by family, as often as it does."""
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
    """The features to count: the most frequent ones of all groups, each group with the same say."""
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
    """The matrices of one set of passages; unknown features count as other where there is such a column."""
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
    """Several sets in one, one after the other."""
    families = {family: np.concatenate([part.families[family] for part in sets]) for family in sets[0].families}
    return Counts(families, np.concatenate([part.characters for part in sets]))


def summed(counts: Counts) -> Counts:
    """A whole set as one passage."""
    families = {family: matrix.sum(axis=0, keepdims=True) for family, matrix in counts.families.items()}
    return Counts(families, counts.characters.sum(keepdims=True))


@dataclass(frozen=True)
class Corpus:
    """One set of texts in every form that the measures want it in."""

    passages: Sequence[Passage]
    features: Sequence[Features]
    counts: Counts
