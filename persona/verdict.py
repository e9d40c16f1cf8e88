"""What a run has come to, in words: every sentence with its number, and what to change where something is wrong.

Nothing is called better or worse that may be chance: losses must differ by more than `noise`, shares and ratios by
their whole interval.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from persona.history import History, Points
from persona.proportions import wilson

# Between updates 36 and 54 of the default run the loss of a single token moved by 0.14 nats (standard deviation over
# 1,197 tokens); tokens of a reply move together, so that their mean is as uncertain as with 0.20. Twice that, since
# weights move further in a run that overfits.
SPREAD = 0.4
SIGMAS = 2.0  # such a difference comes by chance about once in twenty
TOO_LITTLE = 0.02  # nats, a perplexity lower by 2 %: nobody would hear it
STILL_LEARNING = 0.05  # of the whole fall of the held-out loss, in the last third of the updates: more would be had
LEARNED_BY_HEART = 1.0  # nats by which the training loss fell further than the held-out one: e times as sure of it
COPIED = 0.15  # of the replies in spans of 8 tokens from the training data, above what the author repeats himself
FORGOTTEN = 1.1  # times the base's perplexity on other people's text; LoRA usually stays below (arXiv 2405.09673)
ENDED = 0.9  # of the replies end by themselves; authors' replies fit into the limit nearly always
OUT_OF_CHARACTER = 0.01  # of the replies: a reader notices one in a hundred
REMEMBERED = 0.5  # of the key facts about the character


@dataclass(frozen=True)
class Finding:
    """One sentence about a run."""

    kind: str
    """For programs, such as `overfitting`."""
    text: str
    advice: str | None = None
    """The setting to change, where something is wrong."""


@dataclass(frozen=True)
class Estimate:
    """A measured value with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Evaluated:
    """What was measured on the replies of the tuned model; None for what was not."""

    replies: int = 0
    style_progress: Estimate | None = None
    """How much of the way from base to author the style has gone; 1 is all of it."""
    copied: Estimate | None = None
    """Share of the replies in spans of 8 or more tokens that stand in the training data."""
    copied_by_author: float = 0.0
    """The same of the author's own held-out replies: catch-phrases are no copies."""
    longest_copy: int = 0
    """Tokens of the longest such span."""
    control_ratio: Estimate | None = None
    """Perplexity on other people's text, tuned over base."""
    ended: int | None = None
    """Replies that ended by themselves, before the limit."""
    out_of_character: int | None = None
    """Replies that step out of character."""
    facts: int = 0
    """Key facts about the character that were asked for."""
    remembered: int = 0
    """Those of them that its replies name."""


def noise(measured_tokens: int) -> float:
    """Nats by which two held-out losses over so many tokens may differ by chance."""
    return SIGMAS * SPREAD / math.sqrt(max(measured_tokens, 1))


def of_training(history: History, measured_tokens: int, per_epoch: float) -> list[Finding]:
    """What the course of the losses says.

    `measured_tokens` are those behind each held-out loss, `per_epoch` the updates of an epoch.
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
    text = "0 evaluations on held-out conversations: whether it learned the voice, or only its lines, cannot be said."
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
    """Whether the held-out loss was falling, level or rising at the end; None where one evaluation cannot say it."""
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
    """Mean of the training losses in the sixth of all updates that ends at `step`."""
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


def of_evaluation(measured: Evaluated) -> list[Finding]:
    """What the replies of the tuned model say."""
    findings = [
        _style(measured.style_progress) if measured.style_progress else None,
        _copying(measured, measured.copied) if measured.copied else None,
        _forgetting(measured.control_ratio) if measured.control_ratio else None,
        _stopping(measured.ended, measured.replies) if measured.ended is not None and measured.replies else None,
        _character(measured.out_of_character, measured.replies)
        if measured.out_of_character is not None and measured.replies
        else None,
        _memory(measured.remembered, measured.facts) if measured.facts else None,
    ]
    return [finding for finding in findings if finding is not None]


def _between(estimate: Estimate) -> str:
    return f"95 % interval {estimate.low:.0%} to {estimate.high:.0%}"


def _style(progress: Estimate) -> Finding:
    went = f"{progress.value:.0%} of the way from the base model to the author ({_between(progress)})"
    if progress.low > 0:
        return Finding("style", f"The style has gone {went}.")
    return Finding(
        "style_unproven",
        f"That the style came nearer to the author's cannot be told from chance: {went}.",
        "Raise training.num_train_epochs, or give more held-out conversations to measure with.",
    )


def _copying(measured: Evaluated, copied: Estimate) -> Finding:
    text = (
        f"{copied.value:.0%} of its replies stands word for word in the training data ({_between(copied)}; of the "
        f"author's own held-out replies {measured.copied_by_author:.0%})"
    )
    text += f"; the longest copy has {measured.longest_copy} tokens." if measured.longest_copy else "."
    if copied.low <= measured.copied_by_author + COPIED:
        return Finding("copied_share", text)
    advice = "Lower training.num_train_epochs or lora.r; more conversations help most."
    return Finding("copies", f"It copies: {text}", advice)


def _forgetting(ratio: Estimate) -> Finding:
    change = Estimate(ratio.value - 1, ratio.low - 1, ratio.high - 1)
    text = f"on other people's text its perplexity changed by {change.value:+.0%} ({_between(change)})"
    if ratio.low > FORGOTTEN:
        advice = "Lower training.learning_rate, training.num_train_epochs or lora.r."
        return Finding("forgets", f"It forgets: {text}.", advice)
    if ratio.high <= FORGOTTEN:
        return Finding("keeps", f"It has kept what it knew: {text}.")
    return Finding("forgetting_unproven", f"Whether it forgets cannot be told: {text}.")


def _stopping(ended: int, replies: int) -> Finding:
    text = f"{ended} of {replies} replies ended by themselves"
    if wilson(ended, replies)[1] >= ENDED:
        return Finding("stops", f"{text}.")
    return Finding(
        "does_not_stop",
        f"It does not stop: only {text}.",
        "Raise generation.max_new_tokens if the author's replies are longer; if it repeats itself, raise "
        "generation.repetition_penalty to 1.1 or train longer (training.num_train_epochs).",
    )


def _character(count: int, replies: int) -> Finding:
    text = f"{count} of {replies} replies step out of character"
    if wilson(count, replies)[0] <= OUT_OF_CHARACTER:
        return Finding("in_character", f"{text}.")
    return Finding(
        "breaks_character",
        f"It breaks character: {text}.",
        "Say in data.system_prompt who it is, and raise data.settings_weight or training.num_train_epochs.",
    )


def _memory(remembered: int, facts: int) -> Finding:
    text = f"{remembered} of {facts} facts about the character are in its answers"
    if wilson(remembered, facts)[1] >= REMEMBERED:
        return Finding("remembers", f"{text}.")
    return Finding("does_not_remember", f"It knows little of the character: {text}.", "Raise data.settings_weight.")


def as_text(findings: Sequence[Finding]) -> str:
    """The findings for a terminal, one a line, what to change below."""
    lines = []
    for finding in findings:
        lines.append(f"  - {finding.text}")
        if finding.advice is not None:
            lines.append(f"    To change it: {finding.advice}")
    return "\n".join(lines)
