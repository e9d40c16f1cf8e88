"""A comparison of styles as the report shows it."""

from collections.abc import Sequence
from typing import Literal

from persona.evaluation.figures import Distance, Distribution, Diversity, Estimate, Phrase, Sides, StyleReport
from persona.style import compare
from persona.style.results import Comparison, Level
from persona.style.results import Estimate as Measured

Side = Literal["author", "base", "tuned"]
_VARIETY = {"distinct_1": "distinct_1", "distinct_2": "distinct_2", "mattr": "moving_ttr", "self_bleu": "self_bleu"}


def likeness(author: Sequence[str], texts: Sides[list[str]], seed: int) -> StyleReport:
    """How near to `author` both sides of `texts` write; without a base there are distances but no headline."""
    if texts.base is None:
        return _report(compare(author, texts.tuned, seed=seed), "base", texts)
    return _report(compare(author, texts.base, texts.tuned, seed=seed), "tuned", texts)


def _report(found: Comparison, measured: Side, texts: Sides[list[str]]) -> StyleReport:
    """The figures of `found`, where `measured` is called what here is the tuned side."""
    has_base = measured == "tuned"
    return StyleReport(
        headline=_estimate(found.score) if has_base else None,
        words=found.words,
        texts=len(texts.tuned),
        distances=_distances(found, has_base),
        distributions=_distributions(found, measured, has_base),
        phrases=_phrases(found, measured, has_base),
        diversity=Sides(_diversity(found, measured), _diversity(found, "base") if has_base else None),
        author_diversity=_diversity(found, "author"),
        notes=(*found.notes, *_reasons(found, has_base)),
    )


def _distances(found: Comparison, has_base: bool) -> tuple[Distance, ...]:
    made = []
    for far in found.distances:
        author = _estimate(far.ceiling)
        tuned = far.tuned.value if has_base else far.floor.value
        if author is not None and tuned is not None:
            made.append(Distance(far.label, author, Sides(tuned, far.floor.value if has_base else None)))
    return tuple(made)


def _distributions(found: Comparison, measured: Side, has_base: bool) -> tuple[Distribution, ...]:
    made = []
    for one in found.histograms:
        tuned = getattr(one, measured)
        if one.author is not None and tuned is not None:
            made.append(Distribution(one.label, one.bins, one.author, Sides(tuned, one.base if has_base else None)))
    return tuple(made)


def _phrases(found: Comparison, measured: Side, has_base: bool) -> tuple[Phrase, ...]:
    made = []
    for phrase in found.phrases:
        tuned = getattr(phrase, measured)
        if tuned is not None:
            made.append(Phrase(phrase.text, phrase.author, Sides(tuned, phrase.base if has_base else None)))
    return tuple(made)


def _reasons(found: Comparison, has_base: bool) -> list[str]:
    """Why something was not measured, each reason once."""
    said: list[str] = []
    for far in (found.distance, *found.distances):
        estimates = [far.ceiling, far.floor, far.tuned] if has_base else [far.ceiling, far.floor]
        said += [f"not measured: {estimate.reason}" for estimate in estimates if estimate.reason is not None]
    return list(dict.fromkeys(said))


def _estimate(found: Measured) -> Estimate | None:
    return None if found.value is None else Estimate(found.value, found.low, found.high)


def _diversity(found: Comparison, side: Side) -> Diversity:
    levels: dict[str, Level] = {level.name: level for level in found.diversity}
    values = {name: getattr(levels[theirs], side).value for name, theirs in _VARIETY.items()}
    if values["self_bleu"] is not None:
        values["self_bleu"] *= 100
    return Diversity(**values)
