"""The verbs ab-make and ab-score: a sheet for readers from predictions, and the score of their answers."""

import secrets
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from persona.console import safe, table
from persona.errors import UsageError
from persona.evaluate.blind.scoring import describe, score_sheet
from persona.evaluate.blind.sheet import Sheet, make_sheet
from persona.evaluate.predictions import BASE_PREDICTIONS, PREDICTIONS, read_predictions
from persona.evaluate.subject import Subject, read_subject
from persona.files import write_json
from persona.records import rank

Report = Callable[[str], None]
TRUE_LINES = 3  # of the character, for readers who do not know it


def compare_blindly(
    paths: Sequence[str],
    data: Path | None,
    limit: int | None,
    output: Path | None,
    config: Path | None,
    overrides: Sequence[str],
    report: Report,
) -> Sheet:
    """Make a sheet of a run's predictions and its base's, or of two files of predictions."""
    if len(paths) > 2:
        raise UsageError("ab-make takes a run, or two files of predictions.")
    if len(paths) == 2:
        if data or config or overrides:
            raise UsageError("--data, --config and --set are for a run: leave them out with two files of predictions.")
        first, second = map(Path, paths)
        names = (first.stem, second.stem) if first.stem != second.stem else (str(first), str(second))
        return _made((first, second), names, output or first.parent, None, [], limit, report)
    subject = read_subject(paths[0] if paths else None, config, list(overrides), data, None, None)
    return sheet_of_run(subject, output, limit, report)


def sheet_of_run(subject: Subject, output: Path | None, limit: int | None, report: Report) -> Sheet:
    """A sheet of a run's predictions and its base's; raises `UsageError` if these have not been made.

    They are in `output` if predict wrote there too, else in the folder of the run, which is also the default output.
    """
    target = output or subject.output
    source = target if (target / PREDICTIONS).is_file() else subject.output
    tuned, base = (source / name for name in (PREDICTIONS, BASE_PREDICTIONS))
    for file in (tuned, base):
        if not file.is_file():
            raise UsageError(
                f"{file} is not there. Make it with python evaluate_model.py predict, or give two files of predictions."
            )
    names = Counter(str(record.meta.get("character", "")) for record in subject.held_out.records)
    lines = {reply for record in subject.trained for reply in record.replies}
    examples = sorted(lines, key=lambda line: rank(subject.config.seed, line))[:TRUE_LINES]
    about = names.most_common(1)[0][0] or None
    return _made((tuned, base), ("tuned", "base"), target, about, examples, limit, report)


def _made(
    files: tuple[Path, Path],
    names: tuple[str, str],
    output: Path,
    about: str | None,
    examples: Sequence[str],
    limit: int | None,
    report: Report,
) -> Sheet:
    first, second = map(read_predictions, files)
    secret = secrets.token_hex(32)
    sheet = make_sheet(first, second, output, secret, names=names, about=about, examples=examples, limit=limit)
    rows = [
        ("for readers", f"{safe(sheet.sheet.as_posix())}  ({sheet.pairs} pairs, {sheet.identical} identical left out)"),
        ("keep for yourself", safe(sheet.key.as_posix())),
    ]
    report(f"{table(rows)}\n  Send the sheet, never the key; readers send back the file that its last page offers.")
    return sheet


def score_answers(answers: Sequence[Path], key: Path, report: Report) -> None:
    """Report which side readers preferred, and write ab_score.json beside the key."""
    score = score_sheet(answers, key)
    report(describe(score))
    target = key.with_name("ab_score.json")
    write_json(target, asdict(score))
    report(f"written to {safe(target.as_posix())}")
