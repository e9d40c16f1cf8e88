"""How far from base to author: the distances of many samples of equal length, and what they say of the tuned model.

The headline asks which mixture of the author's own other texts and the base's would be as near to the author as the
tuned model is. Asked so, it depends neither on how a distance grows, nor on how long or how many the texts are.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from persona.style import sampling
from persona.style.distances import MEASURES, Prepared, distance, headline, represent
from persona.style.results import Estimate

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
        name: np.repeat(sampling.multiplicities(generator, repeats, len(characters)), _DRAWS, axis=0)
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
    order = {name: sampling.orders(generator, repeats, len(characters)) for name, characters in sets.items()}
    rest = dict(times)

    def draw(name: str, length: float, used: bool) -> np.ndarray:
        blocks = [np.zeros((repeats, size), np.float32) for size in sizes]
        at = list(sets).index(name)
        blocks[at] = sampling.weights(order[name], rest[name], sets[name], length)
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
