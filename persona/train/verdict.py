"""The verdict on a run in words: every sentence with its number, and advice if something is wrong.

It reports a difference only when it is too large to be chance: losses must differ by more than `noise`, shares and
ratios by their whole interval.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from persona.train.history import History, Points

# Between updates 36 and 54 of the default run the loss of a single token moved by 0.14 nats (standard deviation over
# 1,197 tokens); tokens of a reply move together, so that their mean is as uncertain as with 0.20. Twice that, since
# weights move further in a run that overfits.
SPREAD = 0.4
SIGMAS = 2.0  # such a difference comes by chance about once in twenty
TOO_LITTLE = 0.02  # nats, a perplexity lower by 2 %: nobody would hear it
STILL_LEARNING = 0.05  # of the whole fall of the held-out loss, in the last third of the updates: more would be had
LEARNED_BY_HEART = 1.0  # nats by which the training loss fell further than the held-out one: e times as sure of it


@dataclass(frozen=True)
class Finding:
    """One sentence of the verdict, with its number in it."""

    kind: str
    """For programs, such as `overfitting`."""
    text: str
    advice: str | None = None
    """Advice if something is wrong: a sentence that names the settings."""


def noise(measured_tokens: int) -> float:
    """Nats by which two held-out losses over this many tokens may differ by chance."""
    return SIGMAS * SPREAD / math.sqrt(max(measured_tokens, 1))


def of_training(history: History, measured_tokens: int, per_epoch: float) -> list[Finding]:
    """The findings from the losses of a run.

    Each held-out loss was measured on `measured_tokens` tokens; an epoch has `per_epoch` updates.
    """
    measured = [point for point in history.evaluations if math.isfinite(point[1])]
    base = next((loss for step, loss in measured if step == 0), None)
    tuned = [point for point in measured if point[0] > 0]
    if not tuned:
        return [_not_measured(history)]
    chance = noise(measured_tokens)
    best = min(tuned, key=lambda point: point[1])
    if base is not None and base - best[1] <= (least := max(chance, TOO_LITTLE)):
        return [
            Finding(
                "not_learned",
                f"It has not learned the voice: the held-out loss was {base:.3f} before training and {best[1]:.3f} at "
                f"best (update {best[0]}); a fall of {least:.3f} may be chance or is too little to hear.",
                "Double training.learning_rate, or raise training.num_train_epochs.",
            )
        ]
    findings = [_best(base, best, history.updates), _end(base, best, tuned, history.train, chance, per_epoch)]
    findings.append(_by_heart(base, tuned[-1], history.train))
    return [finding for finding in findings if finding is not None]


def _not_measured(history: History) -> Finding:
    text = "0 evaluations on held-out conversations: they would show whether it learned the voice or only its lines."
    train = [point for point in history.train if math.isfinite(point[1])]
    if len(train) > 1:
        text += f" The training loss went from {train[0][1]:.2f} to {train[-1][1]:.2f} in {train[-1][0]} updates."
    return Finding("not_measured", text, "Set data.validation_file; convert_dataset.py writes one.")


def _best(base: float | None, best: tuple[int, float], updates: int) -> Finding:
    text = f"Best at update {best[0]} of {updates}: held-out perplexity {math.exp(best[1]):.1f}"
    if base is not None:
        text += f", from {math.exp(base):.1f} before training ({math.exp(best[1] - base):.0%} of it)"
    return Finding("best", f"{text}.")


def _end(
    base: float | None, best: tuple[int, float], tuned: Points, train: Points, chance: float, per_epoch: float
) -> Finding | None:
    """Whether the held-out loss was falling, level or rising at the end; None if one evaluation is all there is."""
    last = tuned[-1]
    if last[1] - best[1] > chance:
        return _overfitting(best, last, train, per_epoch)
    before = [point for point in tuned if point[0] <= last[0] * 2 / 3]
    if not before:
        return None
    enough = max(chance, STILL_LEARNING * (base - best[1]) if base is not None else 0.0)
    gain = before[-1][1] - last[1]
    if gain > enough:
        return Finding(
            "still_learning",
            f"Still learning: over the last {last[0] - before[-1][0]} updates the held-out loss fell by {gain:.3f}, "
            f"from {before[-1][1]:.3f} to {last[1]:.3f}.",
            f"Raise training.num_train_epochs (this run did {last[0] / per_epoch:.1f}).",
        )
    apart = [place for place, point in enumerate(tuned) if abs(point[1] - last[1]) > enough]
    since = tuned[apart[-1] + 1 if apart else 0]
    return Finding(
        "levelled_off",
        f"Levelled off: since update {since[0]} the held-out loss has stayed within {enough:.3f} of {last[1]:.3f}.",
    )


def _overfitting(best: tuple[int, float], last: tuple[int, float], train: Points, per_epoch: float) -> Finding:
    text = (
        f"Overfitting since update {best[0]}: the held-out loss rose from {best[1]:.3f} to {last[1]:.3f} at update "
        f"{last[0]}"
    )
    then, now = _mean_around(train, best[0]), _mean_around(train, last[0])
    if then is not None and now is not None and now < then:
        text += f", while the training loss went on falling, from {then:.2f} to {now:.2f}"
    return Finding(
        "overfitting",
        f"{text}. The adapter of update {best[0]} was kept.",
        f"Set training.num_train_epochs to about {best[0] / per_epoch:.1f}; more conversations, a smaller lora.r or "
        "lora.lora_dropout 0.1 help more.",
    )


def _mean_around(train: Points, step: int) -> float | None:
    """The mean training loss over the last sixth of all updates before `step`."""
    width = max(train[-1][0] // 6, 1) if train else 0
    losses = [loss for at, loss in train if step - width < at <= step and math.isfinite(loss)]
    return sum(losses) / len(losses) if losses else None


def _by_heart(base: float | None, last: tuple[int, float], train: Points) -> Finding | None:
    first, now = next((loss for step, loss in train if step == 1), None), _mean_around(train, last[0])
    if base is None or first is None or now is None or (first - now) - (base - last[1]) <= LEARNED_BY_HEART:
        return None
    return Finding(
        "memorised",
        f"Learning by heart: on its training lines the loss fell by {first - now:.2f}, on held-out lines "
        f"{'by only' if last[1] < base else 'it rose by'} {abs(base - last[1]):.2f}.",
        "Lower training.num_train_epochs or training.learning_rate, and check for copied lines with evaluate_model.py.",
    )


def as_text(findings: Sequence[Finding]) -> str:
    """The findings for a terminal, one a line, each with its advice below."""
    lines = []
    for finding in findings:
        lines.append(f"  - {finding.text}")
        if finding.advice is not None:
            lines.append(f"    To change it: {finding.advice}")
    return "\n".join(lines)
