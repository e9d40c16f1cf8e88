"""Distances between samples of passages, many pairs at a time.

A sample is a row of weights over the passages. Its rates are a product of matrices, and a cosine between two samples
needs only the passages' Gram matrix, so thousands of samples cost little more than one.

A z-score is taken from a centre that no measured sample has a part in. Were it the mean of the texts compared, two
halves of one text would lie on opposite sides of it, and look farther from each other than from a third.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from persona.evaluate.style.counting import OTHER, Counts


@dataclass(frozen=True)
class Measure:
    """A distance: its family of features, its kind, and its weight in the headline."""

    name: str
    label: str
    family: str
    kind: str  # "jensen-shannon", "tf-idf", "delta", "cosine-delta"
    weight: float


UNITS = {
    "jensen-shannon": "Jensen-Shannon divergence in bits, 0 to 1",
    "tf-idf": "cosine distance, 0 to 1",
    "delta": "mean absolute difference of z-scores",
    "cosine-delta": "cosine distance of z-scores, 0 to 2",
}
# Jensen-Shannon: Lin 1991, Divergence measures based on the Shannon entropy. TF-IDF: Salton and Buckley 1988,
# Term-weighting approaches in automatic text retrieval. Delta: Burrows 2002, 'Delta'; with a cosine Smith and Aldridge
# 2011, Improving authorship attribution, and Evert et al. 2017, Understanding and explaining Delta.
#
# The headline has one of each layer of writing; punctuation weighs more because its divergences are small numbers. No
# measure that is taken from a centre is in it: seen from any centre between author and base, or from the base, a third
# writer who is like neither looks part of the way to the author.
MEASURES = (
    Measure("words", "words", "words", "tf-idf", 1),
    Measure("character_ngrams", "character 3- to 5-grams", "characters", "tf-idf", 1),
    Measure("function_words", "function words", "function_words", "jensen-shannon", 1),
    Measure("punctuation", "punctuation", "punctuation", "jensen-shannon", 10),
    Measure("sentence_length", "sentence length", "sentence_length", "jensen-shannon", 0.5),
    Measure("text_length", "text length", "text_length", "jensen-shannon", 0),
    Measure("word_distribution", "word distribution", "frequent_words", "jensen-shannon", 0),
    Measure("burrows_delta", "function words, Burrows' Delta", "delta", "delta", 0),
    Measure("cosine_delta", "function words, cosine Delta", "delta", "cosine-delta", 0),
)


@dataclass(frozen=True)
class Scales:
    """The usual use of each feature, by family: inverse document frequency, and standard deviation of the rates."""

    idf: Mapping[str, np.ndarray]
    deviation: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Prepared:
    """All passages, ready for `Samples`: by measure the rows' totals, and the counts or their Gram matrix."""

    totals: Mapping[str, np.ndarray]  # (passages,)
    matrices: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Samples:
    """Samples in the form that one measure compares."""

    shares: np.ndarray  # (samples, passages): weights that add up to one occurrence
    image: np.ndarray  # (samples, features): rates; for a cosine (samples, passages): products with each passage
    empty: np.ndarray  # (samples,): nothing of this kind is there


def scales(
    usual: Sequence[Counts], everyone: Sequence[Counts], columns: Mapping[str, Mapping[str, int]], piece: float
) -> Scales:
    """Document frequencies of `usual` and deviations of `everyone`, each author with the same weight.

    Documents are pieces of `piece` characters. A word that none of them has weighs as one that a single piece has:
    were the author's texts among them, words that only he and the tuned model use would weigh less than his alone.
    """
    idf, deviation = {}, {}
    pieces, documents = (
        [_pieces(group, piece) for group in sets if len(group.characters)] for sets in (everyone, usual)
    )
    for family in ("words", "characters", "delta"):
        present = np.mean([(each[family] > 0).mean(axis=0) for each in documents], axis=0)
        least = 1 / max(2, sum(len(each[family]) for each in documents))
        idf[family] = np.log(1 / np.clip(present, least, 1)).astype(np.float32)
        rates = [_rates(each[family]) for each in pieces]
        mean = np.mean([rate.mean(axis=0) for rate in rates], axis=0)
        deviation[family] = np.sqrt(np.mean([((rate - mean) ** 2).mean(axis=0) for rate in rates], axis=0))
        if OTHER in columns[family]:  # no word of its own
            idf[family][columns[family][OTHER]] = deviation[family][columns[family][OTHER]] = 0
    return Scales(idf, deviation)


def _pieces(group: Counts, characters: float) -> dict[str, np.ndarray]:
    """Neighbouring passages added up to pieces of about this length, so that the texts' length makes no difference."""
    number = (np.cumsum(group.characters) / characters).astype(int)
    _, first = np.unique(number, return_index=True)
    return {family: np.add.reduceat(matrix, first, axis=0) for family, matrix in group.families.items()}


def _rates(counts: np.ndarray) -> np.ndarray:
    return counts / np.maximum(counts.sum(axis=1, keepdims=True), 1e-12)


def prepare(counts: Counts, usual: Scales) -> Prepared:
    """The passages of all sets together, for `represent`."""
    totals, matrices = {}, {}
    for measure in MEASURES:
        found = counts.families[measure.family]
        totals[measure.name] = found.sum(axis=1)
        if measure.kind == "tf-idf":
            found = found * usual.idf[measure.family]
        elif measure.kind != "jensen-shannon":
            deviation = usual.deviation[measure.family]
            found = np.divide(found, deviation, out=np.zeros_like(found), where=deviation > 0)
        matrices[measure.name] = found @ found.T if "cosine" in UNITS[measure.kind] else found
    return Prepared(totals, matrices)


def represent(measure: Measure, passages: Prepared, weights: np.ndarray) -> Samples:
    """Samples given by their weights, (samples, passages)."""
    occurrences = weights @ passages.totals[measure.name]
    empty = occurrences <= 0
    shares = weights / np.where(empty, 1, occurrences)[:, None]
    return Samples(shares, shares @ passages.matrices[measure.name], empty)


def distance(measure: Measure, first: Samples, second: Samples, middle: Samples) -> np.ndarray:
    """The distance of each pair of samples; nan where one has nothing to count. z-scores are taken from `middle`."""
    if measure.kind == "jensen-shannon":
        found = jensen_shannon(first.image, second.image)
    elif measure.kind == "delta":
        found = np.abs(first.image - second.image).mean(axis=1)
    elif measure.kind == "tf-idf":
        found = _cosine(_inner(first, second), _inner(first, first), _inner(second, second))
    else:
        one, other, at = (_inner(each, middle) for each in (first, second, middle))
        found = _cosine(
            _inner(first, second) - one - other + at,
            _inner(first, first) - 2 * one + at,
            _inner(second, second) - 2 * other + at,
        )
    return np.where(first.empty | second.empty, np.nan, found)


def _inner(first: Samples, second: Samples) -> np.ndarray:
    return np.einsum("ij,ij->i", first.image, second.shares, dtype=np.float64)


def _cosine(product: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """1 - cosine, given the inner product and the squared lengths; nan where a length is 0."""
    squares = first * second
    length = np.sqrt(np.maximum(squares, 0))
    return np.maximum(1 - np.divide(product, length, out=np.full(len(product), np.nan), where=length > 0), 0)


def jensen_shannon(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Jensen-Shannon divergence in bits of distributions in rows, 0 to 1 (Lin 1991)."""
    middle = (first + second) / 2
    return np.maximum(_entropy(middle) - (_entropy(first) + _entropy(second)) / 2, 0)


def _entropy(shares: np.ndarray) -> np.ndarray:
    return -(shares * np.log2(np.where(shares > 0, shares, 1))).sum(axis=1)


def headline(found: Mapping[str, np.ndarray]) -> np.ndarray:
    """The weighted mean of the distances, element by element; one that is nan is left out of its mean."""
    chosen = [measure for measure in MEASURES if measure.weight]
    values = np.stack([found[measure.name] for measure in chosen])
    weights = np.array([measure.weight for measure in chosen]).reshape(-1, *[1] * (values.ndim - 1))
    counted = weights * ~np.isnan(values)
    total = counted.sum(axis=0)
    return np.divide(
        (np.nan_to_num(values) * counted).sum(axis=0), total, out=np.full(total.shape, np.nan), where=total > 0
    )
