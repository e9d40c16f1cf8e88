"""The style of three sets of texts beside each other: the author's, the base model's and the tuned model's.

Without a base, the tuned side takes its place: it is measured from the author, but there is no way to have gone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from persona.evaluate.results import Distance, Estimate, Sides, StyleReport
from persona.evaluate.style import counting
from persona.evaluate.style.counting import Columns, Corpus, Passage, count, features, joined, passages_of, vocabulary
from persona.evaluate.style.distances import (
    MEASURES,
    UNITS,
    Measure,
    Prepared,
    distance,
    headline,
    prepare,
    represent,
    scales,
)
from persona.evaluate.style.phrases import catch_phrases, diversity
from persona.evaluate.style.words import Language, Segmenter, language, segmenter, words

# --- progress ---------------------------------------------------------------------------------------------------------
# How far from base to author: the distances of many samples of equal length, and what they say of the tuned model.
#
# The headline is the share of the author's own other texts in a mixture with the base's that is as near to the author
# as the tuned model is. So it depends neither on how a distance grows, nor on how long or how many the texts are.


HEADLINE = "style"
_SAMPLE = 8000  # characters; longer samples only take time
_LEAST = 200  # characters of a sample; in less, chance hides the author
_FEWEST = 4  # passages of a set, so that its parts and bootstraps can differ
_DRAWS = 6  # samples from each bootstrapped set; their mean has little of the chance of one split
_MIXTURES = (0.0, 0.25, 0.5, 0.75, 1.0)  # share of the author's own text
_SURE = (2.5, 97.5)  # percentiles of a 95 % interval

Sets = Mapping[str, np.ndarray]  # "author", "base" and "tuned", or only one of these two: the characters by passage


@dataclass(frozen=True)
class Readings:
    """Distances from a sample of the author to mixtures (repeats, mixtures) and to the tuned model (repeats,)."""

    mixtures: np.ndarray
    tuned: np.ndarray | None


@dataclass(frozen=True)
class Drawn:
    """The samples of each purpose, as weights over the passages of all sets, (repeats, passages)."""

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


def anchor(sets: Mapping[str, object]) -> str:
    """The set that is mixed with the author's: the base, or the tuned side if it is alone."""
    return "base" if "base" in sets else "tuned"


def lack(name: str, parts: int, characters: np.ndarray) -> str | None:
    """Why this set is too small to be measured."""
    if len(characters) >= _FEWEST and _part(parts, characters) >= _LEAST:
        return None
    least = f"{_FEWEST} texts and about {(2 * parts - 1) * _LEAST} characters"
    return f"{name}: {len(characters)} texts with {int(characters.sum())} characters; {least} are needed"


def _parts(sets: Mapping[str, object]) -> dict[str, int]:
    """The disjoint samples drawn from each set; the second of the anchor is the centre of z-scores."""
    return {name: 2 if name in ("author", anchor(sets)) else 1 for name in sets}


def _part(parts: int, characters: np.ndarray) -> float:
    """Characters of each of the disjoint samples of a set; the text that ends one is in no other."""
    return (characters.sum() - (parts - 1) * characters.mean()) / parts if len(characters) else 0


def sample_length(sets: Sets) -> int:
    """Characters of each sample: as many as each set has for every sample drawn from it."""
    parts = _parts(sets)
    return int(min(_SAMPLE, *(_part(parts[name], characters) for name, characters in sets.items())))


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
) -> dict[str, Readings]:
    drawn = _draw(sets, times, sample, generator)
    found = {}
    for each in MEASURES:
        first, *mixtures = (represent(each, passages, weights) for weights in (drawn.author, *drawn.mixtures))
        middle = represent(each, passages, drawn.centre)
        values = np.stack([distance(each, first, mixture, middle) for mixture in mixtures], axis=1)
        tuned = None
        if drawn.tuned is not None:
            tuned = distance(each, first, represent(each, passages, drawn.tuned), middle)
        found[each.name] = Readings(values, tuned)
    whole = headline({name: curve.mixtures for name, curve in found.items()})
    nearness = None
    if drawn.tuned is not None:
        nearness = headline({name: curve.tuned for name, curve in found.items() if curve.tuned is not None})
    return found | {HEADLINE: Readings(whole, nearness)}


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

    other = anchor(sets)
    author = draw("author", sample, True)
    seen_from = draw(other, sample, True)
    mixtures = [draw("author", share * sample, False) + draw(other, (1 - share) * sample, False) for share in _MIXTURES]
    tuned = draw("tuned", sample, True) if {"base", "tuned"} <= sets.keys() else None
    return Drawn(author, mixtures, tuned, seen_from)


def _averaged(curve: Readings, repeats: int) -> Readings:
    """The mean of the samples of each bootstrap."""
    tuned = None if curve.tuned is None else curve.tuned.reshape(repeats, -1).mean(axis=1)
    return Readings(curve.mixtures.reshape(repeats, -1, len(_MIXTURES)).mean(axis=1), tuned)


def _complete(curve: Readings) -> Readings | None:
    """The rows without an empty sample; None if they are less than half, which is too little."""
    rows = ~np.isnan(curve.mixtures).any(axis=1)
    if curve.tuned is not None:
        rows &= ~np.isnan(curve.tuned)
    if rows.mean() < 0.5:
        return None
    return Readings(curve.mixtures[rows], None if curve.tuned is None else curve.tuned[rows])


def _found(measured: Readings, resampled: Readings) -> Found:
    points, bootstraps = _complete(measured), _complete(resampled)
    if points is None or bootstraps is None:
        nothing = Estimate(None, reason="too few texts have anything of this kind to count")
        return Found(nothing, nothing, nothing, nothing)
    middle = points.mixtures.mean(axis=0, keepdims=True)
    found = Found(
        _estimate(middle[0, -1], points.mixtures[:, -1], around=False),
        _estimate(middle[0, 0], bootstraps.mixtures[:, 0]),
        *[Estimate(None, reason="no texts of a base model")] * 2,
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
    """The share of the way that each `tuned` (rows,) has gone, by the distances of the mixtures (rows, mixtures).

    It is at most 1 and, beyond the floor, below 0 in units of the whole way; nan if the floor is not farther than the
    ceiling.
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
_PIECE = 1000  # characters of the documents that TF-IDF counts
_MEAN = Measure(HEADLINE, "weighted mean of the first five", "", "mean", 1)


def compare(author: Sequence[str], texts: Sides[list[str]], seed: int, repeats: int) -> StyleReport:
    """How far from base to author the tuned texts have gone; without a base there are distances but no headline.

    The same texts and seed give the same numbers, over `repeats` samples and bootstraps. Blank texts are not counted.
    """
    by_name = {"author": author} | ({} if texts.base is None else {"base": texts.base}) | {"tuned": texts.tuned}
    generator = np.random.default_rng(seed)
    notes: list[str] = []
    kept = {name: _passages(name, each, generator, notes) for name, each in by_name.items()}
    spoken = language([passage.text for passages in kept.values() for passage in passages])
    cut, cutter = segmenter(spoken)
    sets, columns = _corpora(kept, spoken, cut)
    found, sample, reasons = _progress(sets, columns, seed, repeats)
    nothing = Estimate(None, reason="; ".join(reasons.values()) or None)
    distances = [_distance(each, found, nothing, "base" in sets) for each in (_MEAN, *MEASURES)]
    lacking = [each for one in distances for each in (one.author, one.distance.base, one.distance.tuned) if each]
    notes += dict.fromkeys(f"not measured: {each.reason}" for each in lacking if each.reason is not None)
    spoken_words = {name: [words(text, cut) for text in each] for name, each in by_name.items()}
    whole = found.get(HEADLINE)
    return StyleReport(
        headline=nothing if whole is None or reasons else whole.progress,
        words=cutter,
        texts=len(texts.tuned),
        sample=sample,
        distances=tuple(one for one in (*distances[1:], distances[0]) if one.author.value is not None),
        levels=counting.levels(sets, spoken, cutter, seed, repeats),
        diversity=diversity(spoken_words, np.random.default_rng(seed)),
        distributions=counting.distributions(sets, columns, spoken),
        phrases=catch_phrases(by_name, spoken),
        notes=tuple(notes),
    )


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


def _corpora(kept: Mapping[str, list[Passage]], spoken: Language, cut: Segmenter) -> tuple[dict[str, Corpus], Columns]:
    found = {name: [features(passage, spoken, cut) for passage in passages] for name, passages in kept.items()}
    columns = vocabulary(found.values(), spoken)
    sets = {name: Corpus(kept[name], each, count(each, kept[name], columns)) for name, each in found.items()}
    return sets, columns


def _progress(
    sets: Mapping[str, Corpus], columns: Columns, seed: int, repeats: int
) -> tuple[dict[str, Found], int, dict[str, str]]:
    """The figures of each measure, the characters of each sample, and for each set without figures the reason."""
    parts = _parts(sets)
    characters = {name: corpus.counts.characters for name, corpus in sets.items()}
    reasons = {name: reason for name, each in characters.items() if (reason := lack(name, parts[name], each))}
    if "author" in reasons or anchor(sets) in reasons:
        return {}, 0, reasons
    usable = {name: each for name, each in characters.items() if name not in reasons}
    everyone = [sets[name].counts for name in usable]
    usual = scales([sets[anchor(sets)].counts], everyone, columns, _PIECE)
    return measure(prepare(joined(everyone), usual), usable, seed, repeats), sample_length(usable), reasons


def _distance(each: Measure, found: Mapping[str, Found], nothing: Estimate, has_base: bool) -> Distance:
    values = found.get(each.name, Found(nothing, nothing, nothing, nothing))
    tuned = nothing if has_base and nothing.reason else values.tuned
    sides = Sides(tuned, values.floor) if has_base else Sides(values.floor)
    return Distance(each.label, UNITS.get(each.kind, "mean of its parts"), values.ceiling, sides)
