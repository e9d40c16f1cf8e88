"""The verbs ab-make and ab-score: a sheet for readers from predictions, and what their answers say."""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from persona.console import safe, table
from persona.errors import UsageError
from persona.evaluate.blind.scoring import describe, score_sheet
from persona.evaluate.blind.sheet import Sheet, make_sheet
from persona.evaluate.predictions import BASE_PREDICTIONS, PREDICTIONS, Prediction, read_predictions
from persona.evaluate.subject import Subject
from persona.files import write_json
from persona.records import rank

Report = Callable[[str], None]
TRUE_LINES = 3  # of the character, for readers who do not know it


def sheet_of_run(subject: Subject, limit: int | None, report: Report) -> Sheet:
    """A sheet of a run's predictions against its base's; raises `UsageError` where these have not been made."""
    files = [subject.output / name for name in (PREDICTIONS, BASE_PREDICTIONS)]
    for file in files:
        if not file.is_file():
            raise UsageError(
                f"{file} is not there. Make it with python evaluate_model.py predict, or give two files of predictions."
            )
    tuned, base = map(read_predictions, files)
    names = Counter(str(record.meta.get("character", "")) for record in subject.held_out.records)
    lines = {turn["content"] for record in subject.trained for turn in record.turns if turn["role"] == "assistant"}
    examples = sorted(lines, key=lambda line: rank(subject.config.seed, line))[:TRUE_LINES]
    about = names.most_common(1)[0][0] or None
    return _made(tuned, base, subject.output, ("tuned", "base"), about, examples, limit, report)


def sheet_of_files(first: Path, second: Path, output: Path, limit: int | None, report: Report) -> Sheet:
    """A sheet of any two files of predictions of the same prompts."""
    names = (first.stem, second.stem) if first.stem != second.stem else (str(first), str(second))
    return _made(read_predictions(first), read_predictions(second), output, names, None, [], limit, report)


def _made(
    first: Sequence[Prediction],
    second: Sequence[Prediction],
    output: Path,
    names: tuple[str, str],
    about: str | None,
    examples: Sequence[str],
    limit: int | None,
    report: Report,
) -> Sheet:
    sheet = make_sheet(first, second, output, None, names=names, about=about, examples=examples, limit=limit)
    rows = [
        ("for readers", f"{safe(sheet.sheet.as_posix())}  ({sheet.pairs} pairs, {sheet.identical} identical left out)"),
        ("keep for yourself", safe(sheet.key.as_posix())),
    ]
    report(f"{table(rows)}\n  Send the sheet, never the key; readers send back the file that its last page offers.")
    return sheet


def score_answers(paths: Sequence[Path], report: Report) -> None:
    """What readers preferred, from their answers and, as the last of `paths`, the key."""
    if len(paths) < 2:
        raise UsageError("ab-score takes the answers of one reader or more, and then the key: ANSWERS... ab_key.json")
    *answers, key = paths
    found = score_sheet(answers, key)
    report(describe(found))
    target = key.with_name("ab_score.json")
    write_json(target, found.as_json())
    report(f"written to {safe(target.as_posix())}")
