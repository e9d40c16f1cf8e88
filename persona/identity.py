"""What a run is, so that only the same run is continued: settings, data, base model, system prompt."""

import json
import platform
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from persona.artifacts import TOKENIZER_FILES, public_name
from persona.config import Config
from persona.errors import UsageError
from persona.folders import file_sha256, fingerprint

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
    files = (data.train_file, data.validation_file, data.settings_file, config.model.chat_template)
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
