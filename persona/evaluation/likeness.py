"""A comparison of styles as the report shows it."""

from persona.evaluation.figures import Distance, Distribution, Diversity, Estimate, Phrase, Sides, StyleReport
from persona.style.results import Comparison, Level
from persona.style.results import Estimate as Measured


def style_report(found: Comparison) -> StyleReport:
    """The figures of `found` for the page and for programs; those that could not be measured become notes."""
    by_name = {level.name: level for level in found.diversity}
    sides = [_diversity(by_name, side) for side in ("tuned", "base", "author")]
    unmeasured = [
        f"{far.label}: {reason}"
        for far in found.distances
        if (reason := far.tuned.reason or far.ceiling.reason) is not None
    ]
    return StyleReport(
        headline=_estimate(found.score),
        words=found.words,
        texts=found.tuned.texts if found.tuned is not None else 0,
        distances=tuple(
            Distance(far.label, author, Sides(far.tuned.value, far.floor.value))
            for far in found.distances
            if far.tuned.value is not None and (author := _estimate(far.ceiling)) is not None
        ),
        distributions=tuple(
            Distribution(one.label, one.bins, one.author, Sides(one.tuned, one.base))
            for one in found.histograms
            if one.author is not None and one.tuned is not None
        ),
        phrases=tuple(
            Phrase(phrase.text, phrase.author, Sides(phrase.tuned, phrase.base))
            for phrase in found.phrases
            if phrase.tuned is not None
        ),
        diversity=Sides(sides[0], sides[1] if found.base.texts else None),
        author_diversity=sides[2],
        notes=(*found.notes, *([f"No headline: {found.score.reason}"] if found.score.reason else []), *unmeasured),
    )


def _estimate(found: Measured) -> Estimate | None:
    return None if found.value is None else Estimate(found.value, found.low, found.high)


def _diversity(levels: dict[str, Level], side: str) -> Diversity:
    values = {
        name: getattr(levels[name], side).value if name in levels else None
        for name in ("distinct_1", "distinct_2", "mattr", "self_bleu")
    }
    return Diversity(**values)
