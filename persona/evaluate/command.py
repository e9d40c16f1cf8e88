"""The verbs of evaluate_model.py: load once, measure, write, and say what was found."""

from collections.abc import Callable, Sequence
from pathlib import Path

from persona.console import progress, safe
from persona.evaluate import copying, measures, tables
from persona.evaluate import verdict as judging
from persona.evaluate.loaded import Loaded, load, matrix, score
from persona.evaluate.page.page import write_report_page
from persona.evaluate.predictions import BASE_PREDICTIONS, PREDICTIONS, Prediction, write_predictions
from persona.evaluate.results import NAME, Evaluation, Sides, write_evaluation
from persona.evaluate.subject import Measured, Subject

PAGE = "report.html"
Report = Callable[[str], None]


def run_score(subjects: Sequence[Subject], controls: Sequence[Measured], in_4bit: bool, report: Report) -> None:
    """Perplexity and bits per character; of several models on each other's files as a matrix."""
    if len(subjects) > 1:
        report(tables.matrix(matrix(subjects, controls, in_4bit, progress)))
        return
    loaded = load(subjects[0], in_4bit, 1, progress, writes=False)
    report(tables.scores(score(loaded, [subjects[0].held_out, *controls], progress)))


def run_predict(subject: Subject, in_4bit: bool, batch_size: int, report: Report) -> None:
    """Replies to the held-out prompts, written in the file's order, and their figures."""
    written = _written(subject, None if subject.texts is not None else load(subject, in_4bit, batch_size, progress))
    if subject.texts is None:
        _write(subject.output, written.predictions, report)
    if (found := measures.reply_figures(subject, written)) is not None:
        report(tables.replies(found))
    if (copied := copying.copied(subject, _texts(written.predictions))) is not None:
        report(tables.copying(copied.figures))


def run_style(subject: Subject, in_4bit: bool, batch_size: int, limit: int | None, report: Report) -> None:
    """How far from base to author, by style."""
    if subject.texts is not None:
        texts = _texts(measures.given(subject).predictions)
    else:
        texts = measures.samples(load(subject, in_4bit, batch_size, progress), limit)
    report(tables.style(measures.style_of(subject, texts)))


def run_report(
    subject: Subject, controls: Sequence[Measured], in_4bit: bool, batch_size: int, limit: int | None, report: Report
) -> Evaluation:
    """Everything: evaluation.json, predictions and a page to read."""
    loaded = None if subject.texts is not None else load(subject, in_4bit, batch_size, progress)
    scores = () if loaded is None else score(loaded, [subject.held_out, *controls], progress)
    if scores:
        report(tables.scores(scores))
    written = _written(subject, loaded)
    if loaded is not None:
        _write(subject.output, written.predictions, report)
    said = _texts(written.predictions)
    replies, copied = measures.reply_figures(subject, written), copying.copied(subject, said)
    if replies is not None:
        report(tables.replies(replies))
    if copied is not None:
        report(tables.copying(copied.figures))
    recall = None if loaded is None else measures.remembered(loaded, limit)
    if recall is not None:
        report(tables.recall(recall))
    style = measures.style_of(subject, said if loaded is None else measures.samples(loaded, limit))
    report(tables.style(style))
    verdict = [
        *judging.on_training(subject.run, subject.config, len(subject.trained), scores[0].tokens if scores else 0),
        *judging.on_replies(None if replies is None else replies.tuned, style.headline, copied, recall, scores),
    ]
    report("\n".join(tables.verdict(verdict)))
    found = Evaluation(
        name=subject.name,
        kind=subject.kind,
        seed=subject.config.seed,
        language=measures.spoken_language(subject),
        scores=scores,
        replies=replies,
        recall=recall,
        copying=None if copied is None else copied.figures,
        style=style,
        exchanges=measures.exchanges(written, None if copied is None else copied.spans),
        verdict=tuple(verdict),
        curve=measures.curve_of(subject.run),
        data=measures.data_of(subject),
        settings=subject.config.model_dump(),
        versions=measures.versions(),
        hashes=measures.hashes(subject),
    )
    subject.output.mkdir(parents=True, exist_ok=True)
    write_evaluation(subject.output / NAME, found)
    write_report_page(found, subject.output / PAGE)
    report(f"written to {safe((subject.output / PAGE).as_posix())}, for programs {NAME}")
    return found


def _written(subject: Subject, loaded: Loaded | None) -> measures.Written:
    return measures.given(subject) if loaded is None else measures.predict(loaded)


def _texts(predictions: Sides[list[Prediction]]) -> Sides[list[str]]:
    return predictions.each(lambda side: [one.predict for one in side])


def _write(folder: Path, predictions: Sides[list[Prediction]], report: Report) -> None:
    files = {PREDICTIONS: predictions.tuned, BASE_PREDICTIONS: predictions.base}
    for name, side in files.items():
        if side is not None:
            write_predictions(folder / name, side)
            report(f"{len(side)} predictions written to {safe((folder / name).as_posix())}")
