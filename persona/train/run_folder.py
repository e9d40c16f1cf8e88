"""The folder of a run: opened, set aside for a new run, and continued only by the same run.

run.json says what a run is: its settings, the hashes of its data, its base model and its system prompt. Only a run that
agrees in all that is learned may continue from the checkpoints beside it.
"""

import json
import os
import platform
import shlex
from collections.abc import Callable
from contextlib import suppress
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from persona.config import Config
from persona.console import table
from persona.errors import EnvironmentFault, UsageError
from persona.files import JsonObject, file_sha256, read_json, rename
from persona.model.adapters import TOKENIZER_FILES, public_name
from persona.model.folders import fingerprint

# Settings that may differ when a run is continued: they change files or later use, not the weights
_NOT_LEARNED: Any = {
    "model": {"device"},  # what it means here is in `resolved`
    "training": {"max_tokens_per_pack", "gradient_checkpointing", "logging_steps", "save_steps", "output_dir"},
    "evaluation": {"max_tokens_per_pack", "sample_prompts"},
    **{"generation": True, "export": True},
}
LIBRARIES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes")
_START_OVER = "Start over with --resume never, which sets the earlier run aside"


def open_run(run: Path) -> Path:
    """`run`, created if it is missing; raises `UsageError` when it cannot be the folder of a run."""
    if run.resolve().name == "" or run.resolve() in (Path.cwd(), *Path.cwd().parents):
        raise UsageError(f"training.output_dir: {run} holds the current folder; name one of its own, as outputs/NAME.")
    for folder in (run, log_folder(run)):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"The folder {folder} cannot be made: {error}. Change training.output_dir.") from None
    return run


def log_folder(run: Path) -> Path:
    """The folder of TensorBoard's files: logs/, then the path of `run` below outputs/, or its last part."""
    parts = run.parts
    below = parts[1:] if len(parts) > 1 and parts[0] == "outputs" else (run.resolve().name,)
    return Path("logs", *below)


def set_aside(run: Path, report: Callable[[str], None]) -> None:
    """Move the files of an earlier run to a folder beside `run`, all or none.

    Raises `UsageError` when `run` holds other files than a run's, and `EnvironmentFault` when one cannot be moved.
    """
    left = [path for path in run.iterdir() if path.name != ".lock"]
    if not left:
        return
    if not (run / "run.json").is_file() and not any(run.glob("checkpoint-*")):
        names = ", ".join(sorted(path.name for path in left)[:5])
        raise UsageError(
            f"{run} holds other files than a run's ({names}); it is left alone. Change training.output_dir."
        )
    logs = log_folder(run)
    number = next(n for n in range(1, 10_000) if not any(_numbered(path, n).exists() for path in (run, logs)))
    target = _numbered(run, number)
    moves = [(path, target / path.name) for path in left]
    if any(logs.iterdir()):
        moves.insert(0, (logs, _numbered(logs, number)))
    target.mkdir()
    moved = []
    try:
        for source, goal in moves:
            rename(source, goal)
            moved.append((source, goal))
    except OSError as error:
        with suppress(OSError):
            for source, goal in reversed(moved):
                rename(goal, source)
            target.rmdir()
        raise EnvironmentFault(
            f"The earlier run in {run} cannot be set aside: {error}. Close the program that holds the file "
            "(TensorBoard, an editor, a window on the folder) and run the same command again, or choose another "
            "folder with --set training.output_dir=outputs/NAME."
        ) from None
    report(f"The earlier run was set aside as {target}.")


def _numbered(path: Path, number: int) -> Path:
    return path.with_name(f"{path.name}.{number}")


def read_identity(run: Path) -> JsonObject | None:
    """The identity that an earlier start wrote to run.json, or None; raises `UsageError` when it cannot be read."""
    path = run / "run.json"
    if not path.is_file():
        return None
    identity = read_json(path, f"{_START_OVER}.")
    objects = ("settings", "base", "data_sha256")
    try:
        date.fromisoformat(identity["date"])
        if "fingerprint" in identity["base"] and all(isinstance(identity[name], dict) for name in objects):
            return identity
    except (KeyError, TypeError, ValueError):
        pass
    raise UsageError(f"{path}: expected a date and the objects {', '.join(objects)}. {_START_OVER}.")


def read_fitted(run: Path, settings: str) -> JsonObject:
    """The sizes that an earlier start with the same `settings` had to go down to, by the names of their settings."""
    file = run / "config.json"
    if not file.is_file() or file.read_text(encoding="utf-8", errors="replace") != settings:
        return {}
    fitted = (read_identity(run) or {}).get("fitted")
    return fitted if isinstance(fitted, dict) else {}


def identity_of(config: Config, base: Path, system: str | None, day: date, resolved: dict[str, str]) -> JsonObject:
    """Everything that must be the same when a run is continued, and the versions it was made with.

    `resolved` says what `auto` means here: device, precision and optimizer.
    """
    data = config.data
    files = (data.train_file, data.validation_file, data.lore_file, config.model.chat_template)
    return {
        "date": day.isoformat(),
        "settings": config.model_dump(exclude=_NOT_LEARNED),
        "data_sha256": {name: file_sha256(Path(name)) for name in files if name is not None},
        "system_prompt": system,
        "resolved": resolved,
        "tokenizer_sha256": {
            name: file_sha256(base / name)
            for name in (*TOKENIZER_FILES, "chat_template.jinja")
            if (base / name).is_file()
        },
        "base": {"name": public_name(config.model.name_or_path), "fingerprint": fingerprint(base)},
        "versions": {"python": platform.python_version()} | {name: version(name) for name in LIBRARIES},
    }


def check_same(run: Path, before: JsonObject | None, now: JsonObject) -> None:
    """Raise `UsageError` that lists the differences from the run whose checkpoints are in `run`."""
    if before is None:
        raise UsageError(
            f"{run} holds checkpoints but no run.json that says which run they belong to. {_START_OVER}, or choose "
            "another training.output_dir."
        )
    was, wanted = ({**_by_name(one["settings"]), **one.get("resolved", {})} for one in (before, now))
    differences = [
        f"{name}: was {json.dumps(was.get(name))}, is {json.dumps(value)}"
        for name, value in wanted.items()
        if was.get(name) != value
    ]
    if before.get("tokenizer_sha256") != now["tokenizer_sha256"]:
        differences.append("the base model's tokenizer or chat template")
    if before["base"]["fingerprint"] != now["base"]["fingerprint"]:
        differences.append("the base model's weights")
    if before.get("system_prompt") != now["system_prompt"]:
        differences.append("the system prompt's text")
    differences += [
        f"the contents of {name}"
        for name, digest in now["data_sha256"].items()
        if before["data_sha256"].get(name, digest) != digest
    ]
    if differences:
        raise UsageError(
            f"{run} holds a run that differs from this one in:\n"
            + "\n".join(f"  - {line}" for line in differences)
            + f"\n{_START_OVER}, or choose another folder (--set training.output_dir=outputs/NAME)."
        )


def _by_name(settings: JsonObject) -> JsonObject:
    """Settings of all sections by their dotted names."""
    sections = {name: values if isinstance(values, dict) else {"": values} for name, values in settings.items()}
    return {f"{name}.{key}".rstrip("."): value for name, keys in sections.items() for key, value in keys.items()}


def quoted(path: Path) -> str:
    """`path` as it has to be typed in a command."""
    name = path.as_posix()
    if os.name != "nt":
        return shlex.quote(name)
    return f'"{name}"' if " " in name else name


def next_commands(run: Path) -> str:
    """The commands that come after a run, ready to copy."""
    name = quoted(run)
    commands = [
        ("talk to it", f"python test_model.py {name}"),
        ("see how it learned", f"python plot_loss.py {name}"),
        ("does it sound right?", f"python evaluate_model.py report {name}"),
        ("make one model of it", f"python merge_lora_to_fp16.py {name}"),
    ]
    return "Next:\n" + table(commands)
