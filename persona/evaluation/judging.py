"""The verdict on a model: what its training and its replies come to in words, from the figures of the evaluation."""

from pathlib import Path

from persona.config import Config
from persona.evaluation.figures import Estimate, FileScore, Recall, Replies
from persona.evaluation.results import Finding
from persona.evaluation.whole import Copied
from persona.history import read_history
from persona.plan import updates_per_epoch
from persona.verdict import Estimate as Known
from persona.verdict import Evaluated, of_evaluation, of_training
from persona.verdict import Finding as Said


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
