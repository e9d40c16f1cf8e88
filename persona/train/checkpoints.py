"""Checkpoints that are complete or absent, and the way back from them.

Everything is written into a staging folder whose name does not begin with `checkpoint-`, flushed to the disk,
COMPLETE.json with the size and SHA-256 of every file last, and then the folder is renamed. Tensors are safetensors and
the rest is JSON: there is no pickle, so a checkpoint of somebody else cannot run code.
"""

import json
import os
import re
import shutil
import signal
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from persona.errors import EnvironmentFault, UsageError
from persona.files import ADAPTER_WEIGHTS, MARKER, fault_in, publish, write_json

_RANDOM = "random.safetensors"
_NAME = re.compile(r"checkpoint-(\d+)")


@dataclass
class Progress:
    """How far a run has come: all that the loop knows besides weights, optimizer and random state."""

    step: int = 0
    """Updates done."""
    best_step: int | None = None
    best_loss: float | None = None
    evaluations_without_improvement: int = 0
    overflows: int = 0
    """Updates in a row that fp16 could not represent."""
    base_loss: float | None = None
    """Held-out loss before the first update."""
    tokens: int = 0
    seconds: float = 0.0
    history_bytes: int = 0
    """Length of metrics.jsonl; what a crash wrote after it is cut off on resume."""
    sample_bytes: int = 0
    """The same of samples.jsonl."""


def save_adapter(model: PeftModel, folder: Path) -> None:
    """Write the adapter in PEFT's form."""
    weights = get_peft_model_state_dict(model, save_embedding_layers=False)
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}, folder / ADAPTER_WEIGHTS)
    config: Any = model.peft_config["default"]
    values = config.to_dict() | {"inference_mode": True}
    values["target_modules"] = sorted(config.target_modules)  # a set, whose order changes from run to run
    write_json(folder / "adapter_config.json", values)


def load_weights(model: PeftModel, folder: Path) -> None:
    """Put the adapter weights of `folder` into `model`'s own adapter."""
    set_peft_model_state_dict(model, load_file(folder / ADAPTER_WEIGHTS))


def random_state() -> dict[str, torch.Tensor]:
    """The state of this process's random numbers."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def save_checkpoint(
    run: Path,
    model: PeftModel,
    optimizer: Any,
    scheduler: Any,
    scaler: Any,
    random: Sequence[dict[str, torch.Tensor]],
    progress: Progress,
) -> Path:
    """Write `checkpoint-<step>` in `run`, or nothing of it: `EnvironmentFault` when the disk is full.

    `random` is the `random_state` of every process.
    """
    folder = run / f"checkpoint-{progress.step}"
    staging = run / f".staging-{progress.step}"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        save_adapter(model, staging)
        _save_optimizer(optimizer, staging)
        states = {_of_process(name, rank): state for rank, own in enumerate(random) for name, state in own.items()}
        save_file(states, staging / _RANDOM)
        scaling = scaler.state_dict() if scaler is not None else None
        write_json(
            staging / "progress.json",
            {"progress": asdict(progress), "scheduler": scheduler.state_dict(), "scaler": scaling},
        )
        publish(staging, folder, marked=True)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(staging, ignore_errors=True)
        raise EnvironmentFault(
            f"The checkpoint of step {progress.step} could not be written to {run}: {error}. "
            "Earlier checkpoints are untouched; make space and run the same command again to continue."
        ) from None
    return folder


def checkpoints(run: Path) -> list[Path]:
    """The checkpoint folders of `run`, oldest first, complete or not."""
    found = [(int(match[1]), path) for path in run.glob("checkpoint-*") if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def latest_checkpoint(run: Path) -> tuple[Path | None, list[str]]:
    """The newest complete checkpoint of `run`, and why newer ones were put out of the way.

    Raises `UsageError` when the folder holds checkpoints of another tool.
    """
    skipped = []
    for folder in reversed(checkpoints(run)):
        if (folder / "trainer_state.json").is_file() and not (folder / MARKER).is_file():
            raise UsageError(
                f"{folder} is a checkpoint of another tool (it has trainer_state.json); it cannot be continued here. "
                "Choose another training.output_dir."
            )
        fault = fault_in(folder)
        if fault is None:
            return folder, skipped
        broken = folder.with_name(f".broken-{folder.name}")  # out of the way of counting and of the next save
        shutil.rmtree(broken, ignore_errors=True)
        folder.rename(broken)
        skipped.append(f"{folder.name} passed over: {fault}")
    return None, skipped


def processes_of(folder: Path) -> int:
    """How many processes trained when the checkpoint in `folder` was written."""
    return sum(name.partition(".")[0] == "cpu" for name in load_file(folder / _RANDOM))


def _of_process(name: str, rank: int) -> str:
    return f"{name}.{rank}" if rank else name


def load_checkpoint(folder: Path, model: PeftModel, optimizer: Any, scheduler: Any, scaler: Any, rank: int) -> Progress:
    """Put weights, optimizer, schedule and the random state of process `rank` back as when `folder` was written.

    A process that did not exist then keeps its random state.
    """
    load_weights(model, folder)
    _load_optimizer(optimizer, folder)
    state = json.loads((folder / "progress.json").read_text(encoding="utf-8"))
    scheduler.load_state_dict(state["scheduler"])
    if scaler is not None and state["scaler"] is not None:
        scaler.load_state_dict(state["scaler"])
    random = load_file(folder / _RANDOM)
    if (cpu := random.get(_of_process("cpu", rank))) is not None:
        torch.set_rng_state(cpu)
    if (cuda := random.get(_of_process("cuda", rank))) is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(cuda)
    return Progress(**state["progress"])


def prune(run: Path, best_step: int | None, keep: int = 2) -> None:
    """Delete all but the `keep` newest checkpoints and the best; never fewer than two stay, since one may break."""
    for folder in checkpoints(run)[:-keep]:
        if folder.name != f"checkpoint-{best_step}":
            shutil.rmtree(folder)


def _save_optimizer(optimizer: Any, folder: Path) -> None:
    state = optimizer.state_dict()
    flat = _flat(state["state"])
    tensors = {name: value.detach().cpu().clone() for name, value in flat.items() if isinstance(value, torch.Tensor)}
    scalars = {name: value for name, value in flat.items() if not isinstance(value, torch.Tensor)}
    save_file(tensors, folder / "optimizer.safetensors")
    write_json(folder / "optimizer.json", {"param_groups": state["param_groups"], "scalars": scalars})


def _flat(state: dict[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one, with keys joined by a slash; bitsandbytes nests its quantization state one level deeper."""
    flat = {}
    for key, value in state.items():
        flat |= _flat(value, f"{prefix}{key}/") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _load_optimizer(optimizer: Any, folder: Path) -> None:
    stored = json.loads((folder / "optimizer.json").read_text(encoding="utf-8"))
    nested: dict[str, Any] = {}
    for key, value in [*load_file(folder / "optimizer.safetensors").items(), *stored["scalars"].items()]:
        *path, name = key.split("/")
        place = nested
        for part in path:
            place = place.setdefault(part, {})
        place[name] = value
    state = {int(index): entries for index, entries in nested.items()}
    optimizer.load_state_dict({"state": state, "param_groups": stored["param_groups"]})


# --- signals ----------------------------------------------------------------------------------------------------------
# Stopping a run from outside without losing work: the first signal asks, the second insists.


class StopRequest:
    """While entered, remembers the first SIGINT, SIGTERM, SIGHUP or SIGBREAK; a second one ends the program at once."""

    def __init__(self, speaks: bool) -> None:
        """With `speaks`, a line on standard error says that the signal was heard."""
        self._speaks = speaks
        self.number: int | None = None
        """The signal that asked to stop, or None."""
        names = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")  # the last but one is POSIX only, the last Windows only
        known = [getattr(signal, name) for name in names if hasattr(signal, name)]
        # nohup ignores SIGHUP so that the run outlives its terminal
        self._watched = [number for number in known if signal.getsignal(number) is not signal.SIG_IGN]
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():  # Python allows handlers only there
            self._previous = {number: signal.signal(number, self._remember) for number in self._watched}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.number is not None:
            raise KeyboardInterrupt
        self.number = number
        # written past Python's buffers, which the signal may have interrupted
        if self._speaks:
            os.write(2, b"\nStopping after this update ... (again to stop at once, without saving)\n")
