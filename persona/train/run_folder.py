"""The folder of a run: opened, set aside for a new one, and named in the commands that come next."""

import json
import os
import platform
import shlex
import shutil
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from persona.config import Config
from persona.console import table
from persona.errors import UsageError
from persona.files import file_sha256
from persona.model.adapters import TOKENIZER_FILES, public_name
from persona.model.folders import fingerprint


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


# --- identity ---------------------------------------------------------------------------------------------------------
# What a run is, so that only the same run is continued: settings, data, base model, system prompt.


# Settings that may differ when a run is continued: they change what is written or used afterwards, not what is learned.
FREE_SETTINGS = (
    "training.max_tokens_per_pack",
    "training.gradient_checkpointing",
    "training.logging_steps",
    "training.save_steps",
    "training.output_dir",
    "evaluation.max_tokens_per_pack",
    "evaluation.sample_prompts",
)
FREE_SECTIONS = ("generation", "export")
LIBRARIES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes")


def read_identity(run: Path) -> dict[str, Any] | None:
    """The identity that an earlier start left in `run`, or None; raises `UsageError` when it is damaged."""
    path = run / "run.json"
    if not path.is_file():
        return None
    try:
        identity = json.loads(path.read_text(encoding="utf-8"))
        if {"date", "settings", "base", "data_sha256"} <= identity.keys():
            return identity
    except (ValueError, AttributeError):
        pass
    raise UsageError(f"{path} is damaged. Start over with --resume never, which sets the earlier run aside.")


def identity_of(config: Config, base: Path, system: str | None, day: date, resolved: dict[str, str]) -> dict[str, Any]:
    """What must be the same when a run is continued, and the versions it was made with.

    `resolved` is what `auto` means here: device, precision and optimizer.
    """
    learned = {
        name: dict(values) if isinstance(values, dict) else values for name, values in config.model_dump().items()
    }
    for section in FREE_SECTIONS:
        del learned[section]
    for setting in FREE_SETTINGS:
        section, _, key = setting.partition(".")
        del learned[section][key]
    data = config.data
    files = (data.train_file, data.validation_file, data.lore_file, config.model.chat_template)
    return {
        "date": day.isoformat(),
        "settings": learned,
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


def check_same(run: Path, before: dict[str, Any] | None, now: dict[str, Any]) -> None:
    """Raise `UsageError` listing what differs from the run whose checkpoints lie in `run`."""
    if before is None:
        raise UsageError(
            f"{run} holds checkpoints but no run.json that says what they belong to. Choose another "
            "training.output_dir, or start over with --resume never, which sets them aside."
        )
    differences = [
        f"{name}: was {before.get('resolved', {}).get(name)}, is {value}"
        for name, value in now["resolved"].items()
        if before.get("resolved", {}).get(name) != value
    ]
    if before.get("tokenizer_sha256") != now["tokenizer_sha256"]:
        differences.append("the base model's tokenizer or chat template")
    for section, values in now["settings"].items():
        old = before["settings"].get(section)
        pairs = [(section, old, values)]
        if isinstance(values, dict):
            pairs = [(f"{section}.{key}", (old or {}).get(key), value) for key, value in values.items()]
        differences += [f"{name}: was {json.dumps(a)}, is {json.dumps(b)}" for name, a, b in pairs if a != b]
    if before["base"]["fingerprint"] != now["base"]["fingerprint"]:
        differences.append("the base model's weights")
    if before["system_prompt"] != now["system_prompt"]:
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
            + "\n"
            "Choose another folder (--set training.output_dir=outputs/NAME), or start over with --resume never, which "
            "sets the earlier run aside."
        )
