"""The verdict on a tuned model, from the figures of its evaluation."""

from pathlib import Path

from persona.config import Config
from persona.evaluate.intervals import wilson
from persona.evaluate.results import Copying, Estimate, Evaluation, Recall, Replies
from persona.train.history import read_history
from persona.train.schedule import updates_per_epoch
from persona.train.verdict import Finding, of_training

COPIED = 0.15  # share of the replies in copied spans, above the share that the author repeats himself
FORGOTTEN = 1.1  # times the base's perplexity on other people's text; LoRA usually stays below (arXiv 2405.09673)
ENDED = 0.9  # share of the replies that end by themselves; authors' replies fit into the limit nearly always
OUT_OF_CHARACTER = 0.01  # share of the replies: a reader notices one in a hundred
REMEMBERED = 0.5  # share of the key facts about the character


def on_training(run: Path | None, config: Config, conversations: int, tokens: int) -> list[Finding]:
    """The findings from the losses of `run`; none without a history.

    It was trained on `conversations`; each held-out loss was measured on `tokens` tokens.
    """
    if run is None or not (run / "metrics.jsonl").is_file():
        return []
    per_epoch = updates_per_epoch(conversations, config.training.train_batch_size)
    return of_training(read_history(run), tokens, per_epoch)


def on_replies(evaluation: Evaluation) -> list[Finding]:
    """The findings from the figures of the tuned side; each is judged by its whole interval."""
    replies = evaluation.replies.tuned if evaluation.replies is not None else None
    controls = [score.ratio for score in evaluation.scores if score.role == "control" and score.ratio is not None]
    worst = max(controls, key=lambda ratio: ratio.value or 0.0, default=None)
    findings = [
        _style(evaluation.style.headline) if evaluation.style is not None else None,
        _copying(evaluation.copying) if evaluation.copying is not None else None,
        _forgetting(worst) if worst is not None else None,
        _stopping(replies, replies.stops) if replies is not None and replies.stops is not None else None,
        _character(replies) if replies is not None else None,
        _memory(evaluation.recall) if evaluation.recall is not None else None,
    ]
    return [finding for finding in findings if finding is not None]


def _between(low: float, high: float) -> str:
    return f"95 % interval {low:.0%} to {high:.0%}"


def _style(progress: Estimate) -> Finding | None:
    if progress.value is None or progress.low is None or progress.high is None:
        return None
    way = f"{progress.value:.0%} of the way from the base model to the author ({_between(progress.low, progress.high)})"
    if progress.low > 0:
        return Finding("style", f"The style has gone {way}.")
    return Finding(
        "style_unproven",
        f"The style may not have come nearer to the author's: {way}, which may be chance.",
        "Raise training.num_train_epochs, or give more held-out conversations to measure with.",
    )


def _copying(copying: Copying) -> Finding | None:
    copied, author = copying.side.tuned, copying.author
    share = copied.share
    if share.value is None or share.low is None or share.high is None:
        return None
    text = (
        f"{share.value:.0%} of its replies is word for word in the training data ({_between(share.low, share.high)}; "
        f"of the author's own held-out replies {author:.0%})"
    )
    text += f"; the longest copy has {copied.longest} tokens." if copied.longest else "."
    if share.low <= author + COPIED:
        return Finding("copied_share", text)
    advice = "Lower training.num_train_epochs or lora.r; more conversations help most."
    return Finding("copies", f"It copies: {text}", advice)


def _forgetting(ratio: Estimate) -> Finding | None:
    if ratio.value is None or ratio.low is None or ratio.high is None:
        return None
    between = _between(ratio.low - 1, ratio.high - 1)
    text = f"on other people's text its perplexity changed by {ratio.value - 1:+.0%} ({between})"
    if ratio.low > FORGOTTEN:
        advice = "Lower training.learning_rate, training.num_train_epochs or lora.r."
        return Finding("forgets", f"It forgets: {text}.", advice)
    if ratio.high <= FORGOTTEN:
        return Finding("keeps", f"It has not forgotten: {text}.")
    return Finding("forgetting_unproven", f"It may have forgotten, or not: {text}.")


def _stopping(replies: Replies, stops: float) -> Finding:
    ended = round(stops * replies.count)
    text = f"{ended} of {replies.count} replies ended by themselves"
    if wilson(ended, replies.count)[1] >= ENDED:
        return Finding("stops", f"{text}.")
    return Finding(
        "does_not_stop",
        f"It does not stop: only {text}.",
        "Raise generation.max_new_tokens if the author's replies are longer; if it repeats itself, raise "
        "generation.repetition_penalty to 1.1 or train longer (training.num_train_epochs).",
    )


def _character(replies: Replies) -> Finding:
    broken = round(replies.breaks_character * replies.count)
    text = f"{broken} of {replies.count} replies break character"
    if wilson(broken, replies.count)[0] <= OUT_OF_CHARACTER:
        return Finding("in_character", f"{text}.")
    return Finding(
        "breaks_character",
        f"It breaks character: {text}.",
        "Say in data.system_prompt who it is, and raise data.lore_weight or training.num_train_epochs.",
    )


def _memory(recall: Recall) -> Finding | None:
    facts = sum(len(question.facts) for question in recall.questions)
    remembered = sum(len(question.with_system.tuned.found) for question in recall.questions)
    if not facts:
        return None
    text = f"{remembered} of {facts} facts about the character are in its answers"
    if wilson(remembered, facts)[1] >= REMEMBERED:
        return Finding("remembers", f"{text}.")
    return Finding("does_not_remember", f"It knows little of the character: {text}.", "Raise data.lore_weight.")
