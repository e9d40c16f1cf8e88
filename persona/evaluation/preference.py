"""What readers preferred on a blind sheet, each and together, and whether they agree."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from persona.console import excerpt, safe, table
from persona.evaluation.answers import Answers, Key, read_answers, read_key
from persona.proportions import Preference, binomial_p, cohen_kappa, preference

_POSITION_P = 0.01  # below it a reader's habit of one side is worth a line


@dataclass(frozen=True)
class Rater:
    """One reader's preference, and how often the reply on the left was taken."""

    name: str
    preference: Preference
    left: int
    """Of the wins and losses, those of the reply on the left; half of them by chance."""


@dataclass(frozen=True)
class Agreement:
    """Two readers on the same pairs, by what they clicked: left, right or tie."""

    raters: tuple[str, str]
    share: float
    """Of the pairs, those with the same answer."""
    kappa: float | None
    """Cohen's kappa; by left and right, which are random, so that readers who agree on one side are not taken for
    readers who agree by chance. None where both gave one and the same answer throughout."""


@dataclass(frozen=True)
class Comment:
    """What a reader wrote to a pair."""

    rater: str
    prediction: int
    """The pair's place in the predictions, from 0."""
    preferred: str
    """The side's name, or `tie`."""
    text: str


@dataclass(frozen=True)
class SheetScore:
    """A scored sheet. With several readers a pair counts once, by their majority, so that counts are independent."""

    sheet: str
    names: tuple[str, str]
    pairs: int
    identical: int
    """Pairs of the same two replies, which were not asked; they are in no figure."""
    overall: Preference
    raters: tuple[Rater, ...]
    agreement: tuple[Agreement, ...]
    comments: tuple[Comment, ...]

    def as_json(self) -> dict[str, Any]:
        """For programs: everything in plain values."""
        return asdict(self)


def score_sheet(answers: Sequence[Path], key: Path) -> SheetScore:
    """Score readers' answers to one sheet; raises `UsageError` and `DataError` as `answers` does."""
    solution = read_key(key)
    readers = read_answers(answers, solution)
    sides = [_sides(reader, solution) for reader in readers]
    raters = tuple(
        Rater(reader.rater, _preference(list(side.values()), solution.names), Counter(reader.choices.values())["left"])
        for reader, side in zip(readers, sides, strict=True)
    )
    majorities = [_majority([side[pair] for side in sides]) for pair in solution.left]
    comments = (
        Comment(reader.rater, solution.predictions[pair], side[pair], text)
        for reader, side in zip(readers, sides, strict=True)
        for pair, text in reader.comments.items()
    )
    return SheetScore(
        solution.sheet,
        solution.names,
        len(solution.left),
        solution.identical,
        _preference(majorities, solution.names),
        raters,
        tuple(_agreement(one, other, solution) for one, other in combinations(readers, 2)),
        tuple(sorted(comments, key=lambda comment: comment.prediction)),
    )


def _sides(reader: Answers, key: Key) -> dict[str, str]:
    """The preferred side's name, or `tie`, by pair."""
    first, second = key.names
    other = {first: second, second: first}
    return {
        pair: choice if choice == "tie" else key.left[pair] if choice == "left" else other[key.left[pair]]
        for pair, choice in reader.choices.items()
    }


def _preference(sides: Sequence[str], names: tuple[str, str]) -> Preference:
    return preference(sides.count(names[0]), sides.count(names[1]), sides.count("tie"))


def _majority(sides: Sequence[str]) -> str:
    """The side that most readers chose; a tie where the first two places are equal."""
    ranked = Counter(sides).most_common(2)
    return "tie" if len(ranked) == 2 and ranked[0][1] == ranked[1][1] else ranked[0][0]


def _agreement(one: Answers, other: Answers, key: Key) -> Agreement:
    first, second = ([reader.choices[pair] for pair in key.left] for reader in (one, other))
    same = sum(a == b for a, b in zip(first, second, strict=True))
    return Agreement((one.rater, other.rater), same / len(first), cohen_kappa(first, second))


# --- in words --------------------------------------------------------------------------------------------------------


def describe(score: SheetScore) -> str:
    """The score as a person reads it."""
    first, second = map(safe, score.names)
    lines = [sentence(score.overall, first, second)]
    if len(score.raters) > 1:
        lines[0] += f" A pair counts once, by the majority of the {len(score.raters)} readers."
        lines.append(table((excerpt(rater.name, 30), _counts(rater.preference)) for rater in score.raters))
    if score.identical:
        lines.append(f"{score.identical} more pairs were the same two replies and were not asked.")
    lines += [_agreed(agreement) for agreement in score.agreement]
    lines += filter(None, map(_habit, score.raters))
    lines += [
        f"  pair {said.prediction + 1}, {excerpt(said.rater, 30)} ({safe(said.preferred)}): {excerpt(said.text, 200)}"
        for said in score.comments
    ]
    return "\n".join(lines)


def sentence(found: Preference, first: str, second: str) -> str:
    """One preference with its numbers; the only place where they are put into words."""
    decided = found.wins + found.losses
    if found.rate is None or found.rate_low is None or found.rate_high is None:
        return f"All {found.ties} pairs are ties: readers could not tell {first} from {second}."
    interval = f"{_percent(found.rate_low)} to {_percent(found.rate_high)}"
    odds = f"{found.log_odds:+.2f} ({found.log_odds_low:+.2f} to {found.log_odds_high:+.2f})"
    sure = "" if found.p < 0.05 else " That may be chance: more pairs or readers would tell."
    return (
        f"{first} was preferred to {second} in {found.wins} of {decided} decided pairs: {_percent(found.rate)}, 95 % "
        f"interval {interval}, exact p = {_p(found.p)}; {found.ties} ties. "
        f"Log odds {odds}, odds {math.exp(found.log_odds):.2f}."
        f"{sure}"
    )


def _counts(found: Preference) -> str:
    rate = "" if found.rate is None else f", {_percent(found.rate)} (p = {_p(found.p)})"
    return f"{found.wins} won, {found.losses} lost, {found.ties} ties{rate}"


def _agreed(agreement: Agreement) -> str:
    first, second = (excerpt(name, 30) for name in agreement.raters)
    kappa = "not defined, as both gave one answer only" if agreement.kappa is None else f"{agreement.kappa:.2f}"
    return (
        f"{first} and {second} gave the same answer to {_percent(agreement.share)} of the pairs; Cohen's kappa {kappa}."
    )


def _habit(rater: Rater) -> str | None:
    decided = rater.preference.wins + rater.preference.losses
    p = binomial_p(rater.left, decided)
    if p >= _POSITION_P:
        return None
    return (
        f"note: {excerpt(rater.name, 30)} took the left reply in {rater.left} of {decided} decided pairs "
        f"(p = {_p(p)}): a habit that hides a preference; sides are balanced, so it favours neither."
    )


def _p(value: float) -> str:
    return f"{value:.4f}" if value >= 0.0001 else f"{value:.1e}"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
