"""The losses that a run or transformers wrote, by step, and the best evaluation among them."""

import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from persona.console import excerpt
from persona.errors import DataError, UsageError
from persona.files import JsonObject

Points = list[tuple[int, float]]

_OURS, _TRANSFORMERS = "metrics.jsonl", "trainer_state.json"
_LAST_STEP = 10**12
_EXPECTED = f"Give a run folder such as outputs/my_run, its {_OURS}, or a {_TRANSFORMERS} of transformers."


@dataclass(frozen=True)
class History:
    """Losses and learning rates of a run, by step; an evaluation at step 0 is the base model's. Values may be NaN."""

    name: str
    train: Points
    evaluations: Points
    learning_rate: Points

    @property
    def best(self) -> tuple[int, float] | None:
        """The evaluation with the lowest finite loss, the earlier of equals."""
        return min((point for point in self.evaluations if math.isfinite(point[1])), key=lambda p: p[1], default=None)

    @property
    def updates(self) -> int:
        """The last step that was measured."""
        return max(step for step, _ in self.train + self.evaluations)

    @property
    def gaps(self) -> int:
        """The number of losses that are NaN or infinite and so missing from the picture."""
        return sum(not math.isfinite(loss) for _, loss in self.train + self.evaluations)


def read_history(path: Path) -> History:
    """The history in a run folder, a metrics.jsonl or a trainer_state.json."""
    file = _history_file(path)
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}.") from error
    if file.suffix == ".jsonl":
        lines = list(_metrics_lines(file, text))
        keys = ("train/loss", "eval/loss", "train/learning_rate")
    else:
        lines = [(f"{file}: log_history[{i}]", entry) for i, entry in enumerate(_log_history(file, text))]
        keys = ("loss", "eval_loss", "learning_rate")
    train, evaluations, learning_rate = (_points(lines, key) for key in keys)
    if not train and not evaluations:
        raise DataError(
            f"{file}: no losses in it, found {len(lines)} entries without {keys[0]} or {keys[1]}. "
            "If the run has just begun, try again after its first update."
        )
    return History(_name(file), train, evaluations, learning_rate)


def _history_file(path: Path) -> Path:
    if os.path.isfile(path):  # Path.is_file() raises for a name longer than a file's may be
        return path
    if not os.path.isdir(path):
        raise UsageError(f"{path}: there is no such file or folder. {_EXPECTED}")
    for file in (path / _OURS, path / _TRANSFORMERS):
        if file.is_file():
            return file
    names = sorted(entry.name + "/" * entry.is_dir() for entry in path.iterdir())
    listing = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
    inside = sorted(file.parent for pattern in (_OURS, _TRANSFORMERS) for file in path.glob(f"*/{pattern}"))
    hint = f"Did you mean {' or '.join(map(str, inside[:3]))}?" if inside else _EXPECTED
    raise UsageError(
        f"{path}: neither {_OURS} nor {_TRANSFORMERS} in this folder, found {listing or 'nothing'}. {hint}"
    )


def _metrics_lines(file: Path, text: str) -> Iterator[tuple[str, JsonObject]]:
    """Each line's place and object; a last line that a killed run left unfinished is left out."""
    lines = text.split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            if number == len(lines) and line.startswith("{"):
                return
            raise DataError(
                f"{file}:{number}: not a line of JSON, found {excerpt(line)!r}. Remove the line. {_EXPECTED}"
            ) from error
        if not isinstance(entry, dict):
            raise DataError(f'{file}:{number}: expected an object like {{"step": 1, ...}}, found {excerpt(line)!r}.')
        yield f"{file}:{number}", entry


def _log_history(file: Path, text: str) -> list[JsonObject]:
    try:
        state = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: not JSON ({error}), begins with {excerpt(text[:200], 40)!r}. {_EXPECTED}") from error
    entries = state.get("log_history") if isinstance(state, dict) else None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        content = f"the keys {', '.join(state)}" if isinstance(state, dict) else f"a {type(state).__name__}"
        raise DataError(f'{file}: no list of objects under "log_history", found {excerpt(content)}. {_EXPECTED}')
    return entries


def _points(lines: Sequence[tuple[str, JsonObject]], key: str) -> Points:
    """The values of `key` by step. A later line for the same step counts: a resumed run repeats the steps it lost."""
    values: dict[int, float] = {}
    for place, entry in lines:
        if key not in entry:
            continue
        step, value = entry.get("step"), entry[key]
        if type(step) is not int or not 0 <= step <= _LAST_STEP:
            raise DataError(f'{place}: "step" must be a whole number from 0 to 10^12, found {excerpt(repr(step))}.')
        if value is not None and type(value) not in (int, float):  # strict JSON writers spell NaN null
            raise DataError(f'{place}: "{key}" must be a number, found {excerpt(repr(value))}.')
        values[step] = math.nan if value is None else float(str(value))  # a huge int is infinite
    return sorted(values.items())


def _name(file: Path) -> str:
    if file.name not in (_OURS, _TRANSFORMERS):
        return file.stem
    folder = file.resolve().parent
    return f"{folder.parent.name}/{folder.name}" if re.fullmatch(r"checkpoint-\d+", folder.name) else folder.name


def told_apart(histories: Sequence[History]) -> list[History]:
    """The same histories; of several runs with one name, each after the first gets a number."""
    names = [history.name for history in histories]
    counts = [names[: place + 1].count(name) for place, name in enumerate(names)]
    numbered = zip(histories, counts, strict=True)
    return [one if count == 1 else replace(one, name=f"{one.name} ({count})") for one, count in numbered]


def smooth(values: Sequence[float], factor: float) -> list[float]:
    """TensorBoard's smoothing: an exponential moving average, divided by the weight it has gathered so far so that the
    first values are not drawn towards zero. NaN and infinity stay gaps and do not enter the average."""
    if not 0 <= factor < 1:
        raise UsageError(f"smoothing must be from 0 (none) to just below 1, found {factor}; 0.9 is usual.")
    average, weight = 0.0, 0.0
    smoothed = []
    for value in values:
        if math.isfinite(value):
            average = factor * average + (1 - factor) * value
            weight = factor * weight + (1 - factor)
        smoothed.append(average / weight if math.isfinite(value) else math.nan)
    return smoothed
