"""The subject of an evaluation (run, merged model or file of texts) and its data, read before torch is imported."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from persona.config import Config
from persona.errors import UsageError
from persona.evaluate.predictions import Prediction, asked, read_predictions
from persona.files import check_folder
from persona.model.adapters import Persona, kind_of, locate, merged_name, read_persona, run_settings
from persona.model.dataset import choose_system_prompt
from persona.records import Record, read_records


@dataclass(frozen=True)
class Measured:
    """A file to measure on."""

    path: Path
    records: list[Record]
    system: str | None
    """System prompt of its conversations that have none."""
    own: bool
    """Whether it is the persona's held-out file; the others are controls."""


@dataclass(frozen=True)
class Subject:
    """One model, or one file of texts, with the settings and data that belong to it."""

    name: str
    config: Config
    base: Path | None
    """Folder of the base or merged model; None for texts."""
    adapter: Path | None
    run: Path | None
    """The folder of the run that made the adapter."""
    texts: list[Prediction] | None
    base_texts: list[Prediction] | None
    """Texts of another model, to compare `texts` with."""
    held_out: Measured
    trained: list[Record]
    """Training conversations and lore; empty where their files are gone."""
    output: Path
    notes: tuple[str, ...]

    @property
    def kind(self) -> Literal["adapter", "model", "texts"]:
        """The kind of the subject."""
        return "texts" if self.texts is not None else "model" if self.adapter is None else "adapter"


def read_subject(
    target: str | None,
    settings: Path | None,
    overrides: list[str],
    data: Path | None,
    output: Path | None,
    base_texts: Path | None,
) -> Subject:
    """The subject that `target` names (None: the configured run) and its data; raises `UsageError` and `DataError`."""
    config = run_settings(target, settings, overrides)
    if data is not None:
        changed = config.data.model_copy(update={"validation_file": str(data)})
        config = config.model_copy(update={"data": changed})
    if config.data.validation_file is None:
        raise UsageError("This run has no held-out conversations (data.validation_file); name some with --data FILE.")
    if output is not None:
        check_folder(output, "--output")  # before a model works for minutes
    path = Path(target).expanduser() if target is not None else None
    if path is not None and os.path.isfile(path) and path.suffix != ".gguf":
        base = adapter = run = persona = None
        name, texts = path.stem, read_predictions(path)
    else:
        base, adapter = locate(config, target, False)
        run = _run_of(adapter)
        persona = read_persona(adapter or base)
        name = run.name if run is not None else merged_name(adapter or base)
        texts = None
    trained, notes = _training_data(config)
    system = _system_prompt(config, persona, trained, named=data is not None or adapter is not None)
    held_out = Path(config.data.validation_file)
    records = read_records(held_out)
    return Subject(
        name=name,
        config=config,
        base=base,
        adapter=adapter,
        run=run,
        texts=texts and _with_targets(texts, records),
        base_texts=_with_targets(read_predictions(base_texts), records) if base_texts is not None else None,
        held_out=Measured(held_out, records, system, own=True),
        trained=trained,
        output=output or run or Path("outputs", f"{name}-evaluation"),
        notes=notes,
    )


def read_controls(paths: Sequence[Path]) -> list[Measured]:
    """Files of neutral text or of another author; they have no system prompt but their own."""
    return [Measured(path, read_records(path), None, own=False) for path in paths]


def all_replies(records: Sequence[Record]) -> list[str]:
    """The replies of all `records`, in their order."""
    return [reply for record in records for reply in record.replies]


def _with_targets(texts: list[Prediction], records: Sequence[Record]) -> list[Prediction]:
    """`texts` as replies to the held-out conversations in their order, if they have no targets and are as many."""
    if any(text.target for text in texts) or len(texts) != len(records):
        return texts
    return [replace(one, predict=text.predict) for one, text in zip(asked(records), texts, strict=True)]


def _run_of(adapter: Path | None) -> Path | None:
    """The run whose finished adapter this is; None for a checkpoint, whose figures are not those of its run."""
    if adapter is None or kind_of(adapter) == "checkpoint":
        return None
    folder = adapter.resolve().parent
    return adapter.parent if kind_of(folder) == "run" and adapter.resolve().name == "adapter" else None


def _training_data(config: Config) -> tuple[list[Record], tuple[str, ...]]:
    trained, notes = [], []
    for setting in ("train_file", "lore_file"):
        name = getattr(config.data, setting)
        if name is not None and os.path.isfile(name):
            trained += read_records(Path(name))
        elif name is not None:
            notes.append(f"{name} is not here (data.{setting}): copies from it are not found")
    return trained, tuple(notes)


def _system_prompt(config: Config, persona: Persona | None, trained: Sequence[Record], named: bool) -> str | None:
    """The system prompt as trained; raises `UsageError` if settings and model clearly belong to two personas."""
    if persona is None:
        return choose_system_prompt(config.data, trained)
    if not named and persona.system_prompt != choose_system_prompt(config.data, trained):
        raise UsageError(
            f"These settings measure on {config.data.validation_file}, but the model was trained with another system "
            "prompt. Name its own held-out file with --data FILE, or its settings with --config FILE."
        )
    return persona.system_prompt
