"""Each set of texts by itself: its plain measures with their intervals, and its distributions for a picture."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from persona.style import lexicon, sampling
from persona.style.counting import FIXED, OTHER, Columns, Corpus, Features, Passage
from persona.style.results import Estimate, Histogram, Level
from persona.style.units import Language, sentences, units

_SHOWN = 16  # marks or words in a picture
_SETS = ("author", "base", "tuned")
Ratio = tuple[float, float]  # what is counted, and what it is a share of


@dataclass(frozen=True)
class _Plain:
    name: str
    label: str
    unit: str
    source: str
    count: Callable[[Passage, Features], Ratio]


def levels(sets: Mapping[str, Corpus], language: Language, cutter: str, seed: int, repeats: int) -> tuple[Level, ...]:
    """The plain measures of each set, with bootstrap intervals over the passages (Efron 1979)."""
    generator = np.random.default_rng(seed)
    found = []
    for plain in _plain(language, cutter):
        values = {name: _value(plain, sets[name], generator, repeats) for name in _SETS if name in sets}
        missing = {name: Estimate(None, reason=f"no texts of {name}") for name in _SETS if name not in sets}
        found.append(Level(plain.name, plain.label, plain.unit, plain.source, **values, **missing))
    return tuple(found)


def _value(plain: _Plain, corpus: Corpus, generator: np.random.Generator, repeats: int) -> Estimate:
    pairs = [plain.count(passage, found) for passage, found in zip(corpus.passages, corpus.features, strict=True)]
    counted = np.array(pairs, float).reshape(-1, 2)
    above, below = counted.sum(axis=0)
    if not below:
        return Estimate(None, reason="nothing of this kind to count")
    sums = sampling.multiplicities(generator, repeats, len(counted)) @ counted
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
        _Plain("text_length", "text length", "characters", "mean", lambda p, _: (len(p.text), p.opens is not None)),
        _Plain("sentence_length", "sentence length", words, "mean", sentence_length),
        _Plain("punctuation", "punctuation marks", profile, "rate", marks(lambda mark: mark not in named)),
        _Plain("emoji", "emoji", profile, "rate", marks(lambda mark: mark == lexicon.NAMED["emoji"])),
        _Plain("latin_letters", "Latin letters", profile, "rate", marks(lambda mark: mark == lexicon.NAMED["latin"])),
        _Plain("digits", "digits", profile, "rate", marks(lambda mark: mark == lexicon.NAMED["digit"])),
        _Plain("function_words", "function words", f"share of {words}", "closed classes", of_words),
    ]  # fmt: skip
    if language == "zh":
        by_words = cutter.startswith("jieba")
        unit = "share of words (jieba)" if by_words else "share of characters (no jieba)"
        count = _stop_words if by_words else _stop_characters
        found.append(_Plain("stop_words", "the 28 stop words of older reports", unit, "lexicon.STOP_WORDS", count))
    return found


def _stop_words(_: Passage, found: Features) -> Ratio:
    return sum(word in lexicon.STOP_WORDS for word in found["words"]), len(found["words"])


def _stop_characters(passage: Passage, _: Features) -> Ratio:
    return sum(len(word) for word in lexicon.STOP_WORD.findall(passage.text)), len(units(passage.text))


def histograms(sets: Mapping[str, Corpus], columns: Columns, language: Language) -> tuple[Histogram, ...]:
    """Text and sentence lengths as shares; marks and function words as rates, the most frequent of all sets."""
    words = "characters" if language == "zh" else "words"
    marks, function = _frequent(sets, columns, "punctuation"), _frequent(sets, columns, "function_words")
    drawn = (
        ("text_length", "text length", "share of texts, by characters", FIXED["text_length"], 1),
        ("sentence_length", "sentence length", f"share of sentences, by {words}", FIXED["sentence_length"], 1),
        ("punctuation", "punctuation", "per 1,000 characters", marks, 1000),
        ("function_words", "function words", f"per 1,000 {words}", function, 1000),
    )
    return tuple(_histogram(sets, columns, *each) for each in drawn)


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


def _histogram(
    sets: Mapping[str, Corpus], columns: Columns, family: str, label: str, unit: str, bins: Sequence[str], scale: float
) -> Histogram:
    at = [columns[family][name] for name in bins]
    drawn: dict[str, tuple[float, ...] | None] = dict.fromkeys(_SETS)
    for name, corpus in sets.items():
        rates = _rates(corpus, family)
        drawn[name] = None if rates is None else tuple(float(scale * rate) for rate in rates[at])
    return Histogram(family, label, unit, tuple(bins), **drawn)
