"""The style of three sets of texts beside each other: the author's, the base model's and the tuned model's."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from persona.evaluate.style import counting
from persona.evaluate.style.counting import (
    Columns,
    Corpus,
    Passage,
    count,
    features,
    joined,
    passages_of,
    summed,
    vocabulary,
)
from persona.evaluate.style.distances import (
    MEASURES,
    UNITS,
    Measure,
    Prepared,
    centre,
    distance,
    headline,
    prepare,
    represent,
    scales,
)
from persona.evaluate.style.phrases import catch_phrases, diversity
from persona.evaluate.style.results import Comparison, Distance, Estimate, Texts
from persona.evaluate.style.words import Language, Segmenter, language, segmenter, words

# --- progress ---------------------------------------------------------------------------------------------------------
# How far from base to author: the distances of many samples of equal length, and what they say of the tuned model.
#
# The headline asks which mixture of the author's own other texts and the base's would be as near to the author as the
# tuned model is. Asked so, it depends neither on how a distance grows, nor on how long or how many the texts are.


HEADLINE = "style"
_SAMPLE = 8000  # characters; longer samples only take time
_LEAST = 200  # characters of a sample; in less, chance hides the author
_FEWEST = 4  # passages of a set, so that its parts and bootstraps can differ
# Disjoint samples; the base's second is the centre of z-scores
_PARTS = {"author": 2, "base": 2}
_DRAWS = 6  # samples from each bootstrapped set; their mean has little of the chance of one split
_MIXTURES = (0.0, 0.25, 0.5, 0.75, 1.0)  # share of the author's own text
_SURE = (2.5, 97.5)  # percentiles of a 95 % interval

Sets = Mapping[str, np.ndarray]  # "author", "base", perhaps "tuned": the characters of each passage


@dataclass(frozen=True)
class Curve:
    """Distances from a sample of the author to mixtures (repeats, mixtures) and to the tuned model (repeats,)."""

    mixtures: np.ndarray
    tuned: np.ndarray | None


@dataclass(frozen=True)
class Drawn:
    """Weights over the passages of all sets, (repeats, passages) each, by what the samples are for."""

    author: np.ndarray
    mixtures: list[np.ndarray]
    tuned: np.ndarray | None
    centre: np.ndarray


@dataclass(frozen=True)
class Found:
    """Ceiling, floor, tuned and progress of one measure."""

    ceiling: Estimate
    floor: Estimate
    tuned: Estimate
    progress: Estimate


def lack(name: str, characters: np.ndarray) -> str | None:
    """Why this set is too small to be measured."""
    if len(characters) >= _FEWEST and _part(name, characters) >= _LEAST:
        return None
    least = f"{_FEWEST} texts and about {(2 * _PARTS.get(name, 1) - 1) * _LEAST} characters"
    return f"{name}: {len(characters)} texts with {int(characters.sum())} characters; {least} are needed"


def _part(name: str, characters: np.ndarray) -> float:
    """Characters of each of the disjoint samples that are drawn from a set; the text that ends one is in no other."""
    parts = _PARTS.get(name, 1)
    return (characters.sum() - (parts - 1) * characters.mean()) / parts if len(characters) else 0


def sample_length(sets: Sets) -> int:
    """Characters of each sample: as many as each set has for every sample drawn from it."""
    return int(min(_SAMPLE, *(_part(name, characters) for name, characters in sets.items())))


def measure(passages: Prepared, sets: Sets, seed: int, repeats: int) -> dict[str, Found]:
    """Every measure and the headline, over `repeats` samples of the texts and as many bootstraps of them."""
    generator = np.random.default_rng(seed)
    sample = sample_length(sets)
    once = {name: np.ones((repeats, len(characters))) for name, characters in sets.items()}
    drawn = {
        name: np.repeat(counting.multiplicities(generator, repeats, len(characters)), _DRAWS, axis=0)
        for name, characters in sets.items()
    }
    points = _curves(passages, sets, once, sample, generator)
    bootstraps = _curves(passages, sets, drawn, sample, generator)
    return {name: _found(points[name], _averaged(bootstraps[name], repeats)) for name in points}


def _curves(
    passages: Prepared, sets: Sets, times: Sets, sample: int, generator: np.random.Generator
) -> dict[str, Curve]:
    drawn = _draw(sets, times, sample, generator)
    found = {}
    for each in MEASURES:
        first, *mixtures = (represent(each, passages, weights) for weights in (drawn.author, *drawn.mixtures))
        middle = represent(each, passages, drawn.centre)
        values = np.stack([distance(each, first, mixture, middle) for mixture in mixtures], axis=1)
        tuned = None
        if drawn.tuned is not None:
            tuned = distance(each, first, represent(each, passages, drawn.tuned), middle)
        found[each.name] = Curve(values, tuned)
    whole = headline({name: curve.mixtures for name, curve in found.items()})
    nearness = None
    if drawn.tuned is not None:
        nearness = headline({name: curve.tuned for name, curve in found.items() if curve.tuned is not None})
    return found | {HEADLINE: Curve(whole, nearness)}


def _draw(sets: Sets, times: Sets, sample: int, generator: np.random.Generator) -> Drawn:
    """Samples of each set, those of one set without a text in common."""
    repeats = len(times["author"])
    sizes = [len(characters) for characters in sets.values()]
    order = {name: counting.orders(generator, repeats, len(characters)) for name, characters in sets.items()}
    rest = dict(times)

    def draw(name: str, length: float, used: bool) -> np.ndarray:
        blocks = [np.zeros((repeats, size), np.float32) for size in sizes]
        at = list(sets).index(name)
        blocks[at] = counting.weights(order[name], rest[name], sets[name], length)
        if used:
            rest[name] = rest[name] * (blocks[at] == 0)
        return np.concatenate(blocks, axis=1)

    author = draw("author", sample, True)
    seen_from = draw("base", sample, True)
    mixtures = [
        draw("author", share * sample, False) + draw("base", (1 - share) * sample, False) for share in _MIXTURES
    ]
    return Drawn(author, mixtures, draw("tuned", sample, True) if "tuned" in sets else None, seen_from)


def _averaged(curve: Curve, repeats: int) -> Curve:
    """The mean of the samples of each bootstrap."""
    tuned = None if curve.tuned is None else curve.tuned.reshape(repeats, -1).mean(axis=1)
    return Curve(curve.mixtures.reshape(repeats, -1, len(_MIXTURES)).mean(axis=1), tuned)


def _complete(curve: Curve) -> Curve | None:
    """The rows in which no sample was empty; None if that is less than half, so that little can be said."""
    rows = ~np.isnan(curve.mixtures).any(axis=1)
    if curve.tuned is not None:
        rows &= ~np.isnan(curve.tuned)
    if rows.mean() < 0.5:
        return None
    return Curve(curve.mixtures[rows], None if curve.tuned is None else curve.tuned[rows])


def _found(measured: Curve, resampled: Curve) -> Found:
    points, bootstraps = _complete(measured), _complete(resampled)
    if points is None or bootstraps is None:
        nothing = Estimate(None, reason="too few texts have anything of this kind to count")
        return Found(nothing, nothing, nothing, nothing)
    middle = points.mixtures.mean(axis=0, keepdims=True)
    found = Found(
        _estimate(middle[0, -1], points.mixtures[:, -1], around=False),
        _estimate(middle[0, 0], bootstraps.mixtures[:, 0]),
        *[Estimate(None, reason="no texts of a tuned model")] * 2,
    )
    if points.tuned is None or bootstraps.tuned is None:
        return found
    tuned = points.tuned.mean()
    found = replace(found, tuned=_estimate(tuned, bootstraps.tuned))
    way = bootstraps.mixtures[:, 0] - bootstraps.mixtures[:, -1]
    if middle[0, 0] <= middle[0, -1] or np.percentile(way, _SURE[0]) <= 0:
        near = "the base is not measurably farther from the author than the author is from himself"
        return replace(found, progress=Estimate(None, reason=near))
    value = float(along(middle, np.array([tuned]))[0])
    scores = along(bootstraps.mixtures, bootstraps.tuned)
    low, high = np.percentile(scores[~np.isnan(scores)], _SURE)
    return replace(found, progress=Estimate(value, min(float(low), value), max(float(high), value)))


def along(mixtures: np.ndarray, tuned: np.ndarray) -> np.ndarray:
    """Where on the way each `tuned` (rows,) is, given the distances of the mixtures (rows, mixtures): up to 1.

    Beyond the floor it is below 0, in units of the whole way; nan where the floor is not farther than the ceiling.
    """
    found = np.full(len(tuned), np.nan)
    for row, (curve, value) in enumerate(zip(mixtures, tuned, strict=True)):
        floor, ceiling = curve[0], curve[-1]
        if floor > ceiling:
            falling = np.minimum.accumulate(np.clip(curve, ceiling, floor))
            beyond = max(value - floor, 0) / (floor - ceiling)
            found[row] = np.interp(-value, -falling, _MIXTURES) - beyond
    return found


def _estimate(value: float, resampled: np.ndarray, around: bool = True) -> Estimate:
    """The percentile interval; `around` a value, moved by what the bootstrap's repeated texts add to a distance."""
    low, high = np.percentile(resampled, _SURE) + (value - resampled.mean() if around else 0)
    return Estimate(float(value), max(float(low), 0.0), float(high))


_MOST = 600  # passages of a set; time grows with the square
_PIECE = 1000  # characters of the documents that TF-IDF counts where there are few authors
_MANY = 10  # authors, each of whom is one document then
_LABEL = "style: the mean of the distances that have a weight"

Words = Literal["auto", "jieba", "bigrams"]


def compare(
    author: Sequence[str],
    base: Sequence[str],
    tuned: Sequence[str] | None = None,
    *,
    seed: int,
    reference: Sequence[Sequence[str]] = (),
    segmentation: Words = "auto",
    repeats: int = 200,
) -> Comparison:
    """How far from `base` to `author` the texts of `tuned` have gone; without `tuned`, only the two anchors.

    `reference` are the texts of other authors, one sequence each, for whoever has them: what is usual is then judged
    by them too. The same texts and seed give the same numbers; blank texts are not counted.
    """
    given = {"author": author, "base": base} | ({} if tuned is None else {"tuned": tuned})
    generator = np.random.default_rng(seed)
    notes: list[str] = []
    kept = {name: _passages(name, texts, generator, notes) for name, texts in given.items()}
    spoken = language([passage.text for passages in kept.values() for passage in passages])
    cut, cutter = segmenter(segmentation) if spoken == "zh" else segmenter("bigrams")
    sets, others, columns = _corpora(kept, reference, spoken, cut)
    found, sample, reasons = _progress(sets, others, columns, seed, repeats)
    whole, *distances = (
        _distance(measure, found, reasons) for measure in (Measure(HEADLINE, _LABEL, "", "mean", 1, ""), *MEASURES)
    )
    spoken_words = {name: [words(text, cut) for text in texts] for name, texts in given.items()}
    return Comparison(
        score=whole.progress,
        distance=whole,
        distances=tuple(distances),
        levels=counting.levels(sets, spoken, cutter, seed, repeats),
        diversity=diversity(spoken_words, np.random.default_rng(seed)),
        histograms=counting.histograms(sets, columns, spoken),
        phrases=catch_phrases(given, spoken),
        language=spoken,
        words=cutter if spoken == "zh" else "words",
        sample=sample,
        seed=seed,
        author=_texts(sets["author"]),
        base=_texts(sets["base"]),
        tuned=_texts(sets["tuned"]) if "tuned" in sets else None,
        notes=tuple(notes),
    )


def distance_matrix(
    rows: Sequence[Sequence[str]], columns: Sequence[Sequence[str]], reference: Sequence[Sequence[str]] = ()
) -> dict[str, np.ndarray]:
    """Every distance of each set of texts in `rows` from each in `columns`, and the headline's, as (rows, columns).

    What is usual is judged by all of them and `reference`. The sets are taken whole; mind that chance makes short
    texts look far from all others.
    """
    passages = [passages_of(texts) for texts in (*rows, *columns, *reference)]
    spoken = language([passage.text for group in passages for passage in group])
    cut, _ = segmenter("auto") if spoken == "zh" else segmenter("bigrams")
    found = [[features(passage, spoken, cut) for passage in group] for group in passages]
    known = vocabulary(found, spoken)
    counts = [count(group, there, known) for group, there in zip(found, passages, strict=True)]
    piece = math.inf if len(counts) >= _MANY else _PIECE
    one = prepare(joined([summed(part) for part in counts]), scales(counts, counts, known, piece))
    first = np.repeat(np.arange(len(rows)), len(columns))
    second = np.tile(np.arange(len(rows), len(rows) + len(columns)), len(rows))
    values = {}
    for measure in MEASURES:
        every = represent(measure, one, np.eye(len(counts), dtype=np.float32))
        there = np.flatnonzero(~every.empty)
        middle = centre([every.take(np.array([at])) for at in there]).take(np.zeros(len(first), int))
        values[measure.name] = distance(measure, every.take(first), every.take(second), middle)
    values[HEADLINE] = headline(values)
    return {name: value.reshape(len(rows), len(columns)) for name, value in values.items()}


def _passages(name: str, texts: Sequence[str], generator: np.random.Generator, notes: list[str]) -> list[Passage]:
    found = passages_of(texts)
    blank = sum(not text.strip() for text in texts)
    if blank:
        notes.append(f"{name}: {blank} of {len(texts)} texts are blank and were left out")
    parts = sum(passage.opens is None for passage in found)
    if parts:
        notes.append(f"{name}: long texts were cut into passages, {len(found)} in all; intervals are over passages")
    if len(found) > _MOST:
        notes.append(f"{name}: {_MOST} of {len(found)} passages were drawn at random and compared")
        found = [found[at] for at in sorted(generator.permutation(len(found))[:_MOST])]
    return found


def _corpora(
    kept: Mapping[str, list[Passage]], reference: Sequence[Sequence[str]], spoken: Language, cut: Segmenter
) -> tuple[dict[str, Corpus], list[Corpus], Columns]:
    groups = [*kept.values(), *(passages_of(texts) for texts in reference)]
    found = [[features(passage, spoken, cut) for passage in group] for group in groups]
    columns = vocabulary(found, spoken)
    made = [Corpus(group, each, count(each, group, columns)) for group, each in zip(groups, found, strict=True)]
    return dict(zip(kept, made, strict=False)), made[len(kept) :], columns


def _progress(
    sets: Mapping[str, Corpus], others: Sequence[Corpus], columns: Columns, seed: int, repeats: int
) -> tuple[dict[str, Found], int, dict[str, str]]:
    """What was measured, on samples of how many characters, and for which sets not, and why."""
    characters = {name: corpus.counts.characters for name, corpus in sets.items()}
    reasons = {name: reason for name, each in characters.items() if (reason := lack(name, each))}
    if "author" in reasons or "base" in reasons:
        return {}, 0, reasons
    usable = {name: each for name, each in characters.items() if name not in reasons}
    reference = [other.counts for other in others]
    everyone = [sets[name].counts for name in usable]
    usual = scales([sets["base"].counts, *reference], [*everyone, *reference], columns, _PIECE)
    passages = prepare(joined([sets[name].counts for name in usable]), usual)
    return measure(passages, usable, seed, repeats), sample_length(usable), reasons


def _distance(measure: Measure, found: Mapping[str, Found], reasons: Mapping[str, str]) -> Distance:
    why = "; ".join(reasons.values()) or None
    nothing = Estimate(None, reason=why)
    values = found.get(measure.name, Found(nothing, nothing, nothing, nothing))
    tuned, way = (nothing, nothing) if "tuned" in reasons else (values.tuned, values.progress)
    unit = UNITS.get(measure.kind, "mean of its parts")
    return Distance(
        measure.name, measure.label, unit, measure.source, measure.weight, values.ceiling, values.floor, tuned, way
    )


def _texts(corpus: Corpus) -> Texts:
    texts = sum(passage.opens is not None for passage in corpus.passages)
    return Texts(texts, int(corpus.counts.characters.sum()), len(corpus.passages))
