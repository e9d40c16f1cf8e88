"""The verbs of evaluate_model.py: read the data, load the model, measure, write, and report the figures.

torch is imported only after all data was read, so that a wrong file is an error at once.
"""

import os
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from persona.console import progress, safe
from persona.errors import UsageError
from persona.evaluate import tables
from persona.evaluate.copying import copied
from persona.evaluate.predictions import (
    BASE_PREDICTIONS,
    PREDICTIONS,
    Prediction,
    exchanges,
    other_speakers,
    reply_figures,
    write_predictions,
)
from persona.evaluate.results import (
    NAME,
    Copying,
    Curve,
    DataStatistics,
    Evaluation,
    Replies,
    Sides,
    Span,
    write_evaluation,
)
from persona.evaluate.style.compare import compare
from persona.evaluate.style.words import language
from persona.evaluate.subject import Measured, Subject, all_replies, read_controls, read_subject
from persona.files import ADAPTER_WEIGHTS, file_sha256
from persona.model.folders import fingerprint
from persona.records import Record, read_records
from persona.train.history import read_history
from persona.train.verdict import as_text

if TYPE_CHECKING:
    from persona.evaluate.loaded import Loaded

PAGE = "report.html"
BATCH = 8  # replies at a time, unless --batch-size says another number
REPEATS = 200  # samples, and bootstraps, of a comparison of styles
Report = Callable[[str], None]


@dataclass(frozen=True)
class Request:
    """The command line of one verb; a verb that has no such option leaves it as it is here."""

    verb: Literal["score", "predict", "style", "report"]
    paths: Sequence[str] | str | None
    data: Path | None = None
    control: Sequence[Path] = ()
    base_texts: Path | None = None
    limit: int | None = None
    batch_size: int | None = None
    output: Path | None = None
    config: Path | None = None
    overrides: Sequence[str] = ()
    load_in_4bit: bool = False


def evaluate(request: Request, report: Report) -> None:
    """Do what `request` says; raises `UsageError` and `DataError` before a model is loaded."""
    subjects = [
        read_subject(path, request.config, list(request.overrides), request.data, request.output, request.base_texts)
        for path in ([request.paths] if isinstance(request.paths, str) else request.paths or [None])
    ]
    _refuse_unused(request, subjects)
    controls = read_controls(request.control)
    for note in dict.fromkeys(note for subject in subjects for note in subject.notes):
        report(f"  note: {note}")

    from persona.model.device import enough_memory

    batch_size = request.batch_size or BATCH
    with enough_memory("Close other programs that use it, or take a smaller model; see also --load-in-4bit."):
        if request.verb == "score":
            run_score(subjects, controls, request.load_in_4bit, report)
        elif request.verb == "predict":
            run_predict(subjects[0], request.load_in_4bit, batch_size, report)
        elif request.verb == "style":
            run_style(subjects[0], request.load_in_4bit, batch_size, request.limit, report)
        else:
            run_report(subjects[0], controls, request.load_in_4bit, batch_size, request.limit, report)


def _refuse_unused(request: Request, subjects: Sequence[Subject]) -> None:
    """Raise `UsageError` for an option that would do nothing with these subjects."""
    texts = subjects[0].texts is not None
    unused = {
        "--base-texts": not texts and request.base_texts,
        "--control": texts and request.control,
        "--limit": texts and request.limit,
        "--batch-size": texts and request.batch_size,
        "--load-in-4bit": request.load_in_4bit and all(subject.kind != "model" for subject in subjects),
        "--output": texts and request.verb == "predict" and request.output,
    }
    kind = "a file of replies" if texts else "a model, which writes the base's replies itself"
    if unused["--load-in-4bit"] and not texts:
        kind = "an adapter, whose base is held as in training"
    for option in (option for option, value in unused.items() if value):
        raise UsageError(f"{option} does nothing for {request.verb} with {kind}. Leave it out.")


def run_score(subjects: Sequence[Subject], controls: Sequence[Measured], in_4bit: bool, report: Report) -> None:
    """Perplexity and bits per character; of several models on each other's files as a matrix."""
    from persona.evaluate.loaded import load
    from persona.evaluate.perplexity import matrix, score

    if len(subjects) > 1:
        report(tables.matrix(matrix(subjects, controls, in_4bit, progress, report)))
        return
    loaded = load(subjects[0], in_4bit, 1, progress, False, report)
    report(tables.scores(score(loaded, [subjects[0].held_out, *controls], progress)))


def run_predict(subject: Subject, in_4bit: bool, batch_size: int, report: Report) -> None:
    """Replies to the held-out prompts, written in the file's order, and their figures."""
    _predicted(subject, _loaded(subject, in_4bit, batch_size, report), report)


def run_style(subject: Subject, in_4bit: bool, batch_size: int, limit: int | None, report: Report) -> None:
    """How far from base to author, by style."""
    texts = _samples(subject, _loaded(subject, in_4bit, batch_size, report), limit)
    report(tables.style(compare(all_replies(subject.held_out.records), texts, subject.config.seed, REPEATS)))


def run_report(
    subject: Subject, controls: Sequence[Measured], in_4bit: bool, batch_size: int, limit: int | None, report: Report
) -> Evaluation:
    """Everything: evaluation.json, predictions and a page to read."""
    from persona.evaluate.lore_recall import remembered
    from persona.evaluate.page import report_page
    from persona.evaluate.perplexity import score
    from persona.evaluate.verdict import on_replies, on_training
    from persona.files import write_text

    author, seed = all_replies(subject.held_out.records), subject.config.seed
    loaded = _loaded(subject, in_4bit, batch_size, report)
    scores = () if loaded is None else score(loaded, [subject.held_out, *controls], progress)
    if scores:
        report(tables.scores(scores))
    predictions, replies, copying, spans = _predicted(subject, loaded, report)
    recall = None if loaded is None else remembered(loaded, limit)
    if recall is not None:
        report(tables.recall(recall))
    style = compare(author, _samples(subject, loaded, limit), seed, REPEATS)
    report(tables.style(style))
    data = _data(subject)
    found = Evaluation(
        name=subject.name,
        kind=subject.kind,
        seed=seed,
        language=language(author),
        scores=scores,
        replies=replies,
        rounding=None if loaded is None else loaded.kept_rounding(),
        recall=recall,
        copying=copying,
        style=style,
        exchanges=exchanges(predictions, spans),
        curve=_curve(subject.run),
        data=data,
        settings=subject.config.model_dump(),
        versions=_versions(),
        hashes=_hashes(subject) | {one.file: one.sha256 for one in data},
    )
    training = on_training(subject.run, subject.config, len(subject.trained), scores[0].tokens if scores else 0)
    found = replace(found, verdict=(*training, *on_replies(found)))
    report(as_text(found.verdict))
    subject.output.mkdir(parents=True, exist_ok=True)
    write_evaluation(subject.output / NAME, found)
    write_text(subject.output / PAGE, report_page(found))
    report(f"written to {safe((subject.output / PAGE).as_posix())}, for programs {NAME}")
    return found


def _loaded(subject: Subject, in_4bit: bool, batch_size: int, report: Report) -> "Loaded | None":
    """The subject's model, to write replies with; None for a file of texts."""
    from persona.evaluate.loaded import load

    return None if subject.texts is not None else load(subject, in_4bit, batch_size, progress, True, report)


def _predicted(
    subject: Subject, loaded: "Loaded | None", report: Report
) -> tuple[Sides[list[Prediction]], Sides[Replies] | None, Copying | None, list[tuple[Span, ...]] | None]:
    """The predictions, which a model writes to the output folder, their figures, their copies and the copied spans."""
    if loaded is None:
        predictions, ended = Sides(subject.texts or [], subject.base_texts), None
    else:
        from persona.evaluate.loaded import predict

        predictions, ended = predict(loaded)
        for name, side in ((PREDICTIONS, predictions.tuned), (BASE_PREDICTIONS, predictions.base)):
            if side is not None:
                write_predictions(subject.output / name, side)
                report(f"{len(side)} predictions written to {safe((subject.output / name).as_posix())}")
    others = other_speakers([*subject.held_out.records, *subject.trained])
    replies = reply_figures(predictions, ended, language(all_replies(subject.held_out.records)), others)
    if replies is not None:
        report(tables.replies(replies))
    copying, spans = copied(subject, _texts(predictions)) or (None, None)
    if copying is not None:
        report(tables.copying(copying))
    return predictions, replies, copying, spans


def _samples(subject: Subject, loaded: "Loaded | None", limit: int | None) -> Sides[list[str]]:
    """The texts whose style is compared: the file's, or samples of the model."""
    if loaded is None:
        return _texts(Sides(subject.texts or [], subject.base_texts))
    from persona.evaluate.loaded import samples

    return samples(loaded, limit)


def _texts(predictions: Sides[list[Prediction]]) -> Sides[list[str]]:
    return predictions.each(lambda side: [one.predict for one in side])


# --- provenance -------------------------------------------------------------------------------------------------------


def _curve(run: Path | None) -> Curve | None:
    """The losses that the run measured; None without a history."""
    if run is None or not (run / "metrics.jsonl").is_file():
        return None
    history = read_history(run)
    train, held_out = (
        tuple((step, loss) for step, loss in points if loss == loss and abs(loss) != float("inf"))
        for points in (history.train, history.evaluations)
    )
    return Curve(train, held_out, history.best[0] if history.best is not None else None)


def _data(subject: Subject) -> tuple[DataStatistics, ...]:
    """Counts of the files that were trained and measured on."""
    data = subject.config.data
    paths = [Path(name) for name in (data.train_file, data.lore_file) if name is not None and os.path.isfile(name)]
    files = [(path, read_records(path)) for path in paths]
    return tuple(_statistics(*file) for file in [*files, (subject.held_out.path, subject.held_out.records)])


def _statistics(path: Path, records: Sequence[Record]) -> DataStatistics:
    replies = list(map(len, all_replies(records)))
    types = Counter(str(record.meta.get("type", "dialogue")) for record in records)
    median = round(statistics.median(replies))
    return DataStatistics(path.name, file_sha256(path), len(records), len(replies), sum(replies), median, dict(types))


def _versions() -> dict[str, str]:
    """The libraries that the figures depend on."""
    from persona.train.run_folder import LIBRARIES

    return {name: version(name) for name in (*LIBRARIES, "sacrebleu")}


def _hashes(subject: Subject) -> dict[str, str]:
    """SHA-256 of base and adapter."""
    hashes = {} if subject.base is None else {"base": fingerprint(subject.base)}
    if subject.adapter is not None:
        hashes["adapter"] = file_sha256(subject.adapter / ADAPTER_WEIGHTS)
    return hashes
