"""The folder of a run: opened, set aside for a new one, and named in the commands that come next."""

import os
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

from persona.console import table
from persona.errors import UsageError


def open_run(run: Path) -> Path:
    """`run`, created when it is not there; raises `UsageError` when it cannot be the folder of a run."""
    if run.resolve().name == "" or run.resolve() in (Path.cwd(), *Path.cwd().parents):
        raise UsageError(f"training.output_dir: {run} holds the current folder; name one of its own, as outputs/NAME.")
    for folder in (run, log_folder(run)):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"The folder {folder} cannot be made: {error}. Change training.output_dir.") from None
    return run


def log_folder(run: Path) -> Path:
    """Where TensorBoard's files of `run` go: logs/ and what follows outputs/ in its path, or its last part."""
    parts = run.parts
    below = parts[1:] if len(parts) > 1 and parts[0] == "outputs" else (run.resolve().name,)
    return Path("logs", *below)


def set_aside(run: Path, report: Callable[[str], None]) -> None:
    """Move what an earlier run left in `run` to a folder beside it, so that a new one starts from nothing.

    Raises `UsageError` when the folder holds something else.
    """
    left = [path for path in run.iterdir() if path.name != ".lock"]
    if not left:
        return
    if not (run / "run.json").is_file() and not any(run.glob("checkpoint-*")):
        names = ", ".join(sorted(path.name for path in left)[:5])
        raise UsageError(f"{run} holds no run of ours but {names}; it is left alone. Change training.output_dir.")
    number = next(n for n in range(1, 10_000) if not run.with_name(f"{run.name}.{n}").exists())
    target = run.with_name(f"{run.name}.{number}")
    target.mkdir()
    for path in left:
        path.rename(target / path.name)
    logs = log_folder(run)
    if any(logs.iterdir()):
        shutil.move(logs, logs.with_name(f"{logs.name}.{number}"))
    report(f"The earlier run was set aside as {target}.")


def quoted(path: Path) -> str:
    """`path` as it has to be typed in a command."""
    name = path.as_posix()
    if os.name != "nt":
        return shlex.quote(name)
    return f'"{name}"' if " " in name else name


def next_commands(run: Path) -> str:
    """What to type after a run, ready to copy."""
    name = quoted(run)
    commands = [
        ("talk to it", f"python test_model.py {name}"),
        ("see how it learned", f"python plot_loss.py {name}"),
        ("does it sound right?", f"python evaluate_model.py report {name}"),
        ("make one model of it", f"python merge_lora_to_fp16.py {name}"),
    ]
    return "Next:\n" + table(commands)
