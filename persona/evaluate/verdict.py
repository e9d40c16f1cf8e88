"""."""

from dataclasses import dataclass
from pathlib import Path

from persona.config import Config
from persona.evaluate.copying import Copied
from persona.evaluate.intervals import wilson
from persona.evaluate.results import Estimate, FileScore, Finding, Recall, Replies
from persona.train.history import read_history
from persona.train.loop import updates_per_epoch
from persona.train.verdict import Said, of_training

COPIED = 0.15  # of the replies in spans of 8 tokens from the training data, above what the author repeats himself
FORGOTTEN = 1.1  # times the base's perplexity on other people's text; LoRA usually stays below (arXiv 2405.09673)
ENDED = 0.9  # of the replies end by themselves; authors' replies fit into the limit nearly always
OUT_OF_CHARACTER = 0.01  # of the replies: a reader notices one in a hundred
REMEMBERED = 0.5  # of the key facts about the character


@dataclass(frozen=True)
class Known:
    """A measured value with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Evaluated:
    """What was measured on the replies of the tuned model; None for what was not."""

    replies: int = 0
    style_progress: Known | None = None
    """How much of the way from base to author the style has gone; 1 is all of it."""
    copied: Known | None = None
    """Share of the replies in spans of 8 or more tokens that stand in the training data."""
    copied_by_author: float = 0.0
    """The same of the author's own held-out replies: catch-phrases are no copies."""
    longest_copy: int = 0
    """Tokens of the longest such span."""
    control_ratio: Known | None = None
    """Perplexity on other people's text, tuned over base."""
    ended: int | None = None
    """Replies that ended by themselves, before the limit."""
    out_of_character: int | None = None
    """Replies that step out of character."""
    facts: int = 0
    """Key facts about the character that were asked for."""
    remembered: int = 0
    """Those of them that its replies name."""


def of_evaluation(measured: Evaluated) -> list[Said]:
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


def _between(estimate: Known) -> str:
    return f"95 % interval {estimate.low:.0%} to {estimate.high:.0%}"


def _style(progress: Known) -> Said:
    went = f"{progress.value:.0%} of the way from the base model to the author ({_between(progress)})"
    if progress.low > 0:
        return Said("style", f"The style has gone {went}.")
    return Said(
        "style_unproven",
        f"That the style came nearer to the author's cannot be told from chance: {went}.",
        "Raise training.num_train_epochs, or give more held-out conversations to measure with.",
    )


def _copying(measured: Evaluated, copied: Known) -> Said:
    text = (
        f"{copied.value:.0%} of its replies stands word for word in the training data ({_between(copied)}; of the "
        f"author's own held-out replies {measured.copied_by_author:.0%})"
    )
    text += f"; the longest copy has {measured.longest_copy} tokens." if measured.longest_copy else "."
    if copied.low <= measured.copied_by_author + COPIED:
        return Said("copied_share", text)
    advice = "Lower training.num_train_epochs or lora.r; more conversations help most."
    return Said("copies", f"It copies: {text}", advice)


def _forgetting(ratio: Known) -> Said:
    change = Known(ratio.value - 1, ratio.low - 1, ratio.high - 1)
    text = f"on other people's text its perplexity changed by {change.value:+.0%} ({_between(change)})"
    if ratio.low > FORGOTTEN:
        advice = "Lower training.learning_rate, training.num_train_epochs or lora.r."
        return Said("forgets", f"It forgets: {text}.", advice)
    if ratio.high <= FORGOTTEN:
        return Said("keeps", f"It has kept what it knew: {text}.")
    return Said("forgetting_unproven", f"Whether it forgets cannot be told: {text}.")


def _stopping(ended: int, replies: int) -> Said:
    text = f"{ended} of {replies} replies ended by themselves"
    if wilson(ended, replies)[1] >= ENDED:
        return Said("stops", f"{text}.")
    return Said(
        "does_not_stop",
        f"It does not stop: only {text}.",
        "Raise generation.max_new_tokens if the author's replies are longer; if it repeats itself, raise "
        "generation.repetition_penalty to 1.1 or train longer (training.num_train_epochs).",
    )


def _character(count: int, replies: int) -> Said:
    text = f"{count} of {replies} replies step out of character"
    if wilson(count, replies)[0] <= OUT_OF_CHARACTER:
        return Said("in_character", f"{text}.")
    return Said(
        "breaks_character",
        f"It breaks character: {text}.",
        "Say in data.system_prompt who it is, and raise data.lore_weight or training.num_train_epochs.",
    )


def _memory(remembered: int, facts: int) -> Said:
    text = f"{remembered} of {facts} facts about the character are in its answers"
    if wilson(remembered, facts)[1] >= REMEMBERED:
        return Said("remembers", f"{text}.")
    return Said("does_not_remember", f"It knows little of the character: {text}.", "Raise data.lore_weight.")


# --- judging ----------------------------------------------------------------------------------------------------------
# The verdict on a model: what its training and its replies come to in words, from the figures of the evaluation.


def on_training(run: Path | None, config: Config, conversations: int, tokens: int) -> list[Finding]:
    """What the course of the losses in `run` says; nothing without a history.

    `conversations` were trained on, `tokens` are those behind each held-out loss.
    """
    if run is None or not (run / "metrics.jsonl").is_file():
        return []
    per_epoch = updates_per_epoch(conversations, config.training.train_batch_size)
    return _findings(of_training(read_history(run), tokens, per_epoch))


def on_replies(
    replies: Replies | None,
    style: Estimate | None,
    copied: Copied | None,
    recall: Recall | None,
    scores: tuple[FileScore, ...],
) -> list[Finding]:
    """What the figures of the tuned side say."""
    controls = [score.ratio for score in scores if score.role == "control" and score.ratio is not None]
    answers = [] if recall is None else recall.questions
    worst = max(controls, key=lambda ratio: ratio.value, default=None)
    return _findings(
        of_evaluation(
            Evaluated(
                replies=0 if replies is None else replies.count,
                style_progress=_known(style),
                copied=_known(copied.share) if copied is not None else None,
                copied_by_author=0.0 if copied is None else copied.by_author,
                longest_copy=0 if copied is None else copied.figures.tuned.longest,
                control_ratio=_known(worst),
                ended=None if replies is None or replies.stops is None else round(replies.stops * replies.count),
                out_of_character=None if replies is None else round(replies.breaks_character * replies.count),
                facts=sum(len(one.facts) for one in answers),
                remembered=sum(len(one.with_system.tuned.found) for one in answers),
            )
        )
    )


def _known(found: Estimate | None) -> Known | None:
    """An estimate with its interval; without one nothing can be said."""
    if found is None or found.low is None or found.high is None:
        return None
    return Known(found.value, found.low, found.high)


def _findings(said: list[Said]) -> list[Finding]:
    return [Finding(one.kind, one.text, one.advice) for one in said]
