"""Checkpoints that are complete or absent, the way back from them, and stopping without losing work.

A checkpoint is written aside and renamed, COMPLETE.json with the size and SHA-256 of every file last, so that one that
a crash cut short is never taken for a whole one. Tensors are safetensors and the rest is JSON: there is no pickle, so a
checkpoint of somebody else cannot run code.
"""

import os
import re
import shutil
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from persona.errors import EnvironmentFault, UsageError
from persona.files import ADAPTER_WEIGHTS, MARKER, JsonObject, appearing, fault_in, read_json, rename, write_json

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
    """Length of metrics.jsonl; the lines that a crash left behind it are cut off on resume."""
    sample_bytes: int = 0
    """Length of samples.jsonl."""


def save_checkpoint(
    run: Path,
    model: PeftModel,
    optimizer: Any,
    scheduler: Any,
    scaler: Any,
    random: Sequence[dict[str, torch.Tensor]],
    progress: Progress,
) -> None:
    """Write `checkpoint-<step>` in `run`, or nothing of it: `EnvironmentFault` when the disk is full.

    `random` is the `random_state` of every process.
    """
    states = {_of_process(name, rank): state for rank, own in enumerate(random) for name, state in own.items()}
    scaling = scaler.state_dict() if scaler is not None else None
    state = {"progress": asdict(progress), "scheduler": scheduler.state_dict(), "scaler": scaling}
    try:
        with appearing(run / f"checkpoint-{progress.step}", marked=True) as folder:
            _save_adapter(model, folder)
            _save_optimizer(optimizer, folder)
            save_file(states, folder / _RANDOM)
            write_json(folder / "progress.json", state)
    except (OSError, SafetensorError) as error:
        raise EnvironmentFault(
            f"The checkpoint of step {progress.step} could not be written to {run}: {error}. "
            "Earlier checkpoints are untouched; make space and run the same command again to continue."
        ) from None


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
        rename(folder, broken)
        skipped.append(f"{folder.name} passed over: {fault}")
    return None, skipped


def checkpoints(run: Path) -> list[Path]:
    """The checkpoint folders of `run`, oldest first, complete or not."""
    numbered = [(int(match[1]), path) for path in run.glob("checkpoint-*") if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(numbered)]


def prune(run: Path, best_step: int | None) -> None:
    """Delete all checkpoints but the best and the two newest, of which one may break."""
    for folder in checkpoints(run)[:-2]:
        if folder.name != f"checkpoint-{best_step}":
            shutil.rmtree(folder, ignore_errors=True)  # a file that another program holds goes at the next save


def read_progress(folder: Path) -> Progress:
    """The progress of the run when the checkpoint in `folder` was written."""
    values = _state(folder)["progress"]
    if not isinstance(values, dict) or values.keys() != {field.name for field in fields(Progress)}:
        raise UsageError(f'{folder / "progress.json"}: "progress" has other keys than are written. {_advice(folder)}')
    return Progress(**values)


def processes_of(folder: Path) -> int:
    """How many processes trained when the checkpoint in `folder` was written."""
    return sum(name.partition(".")[0] == "cpu" for name in load_file(folder / _RANDOM))


def load_checkpoint(folder: Path, model: PeftModel, optimizer: Any, scheduler: Any, scaler: Any, rank: int) -> None:
    """Put weights, optimizer, schedule and the random state of process `rank` back as when `folder` was written.

    A process that did not exist then keeps its random state.
    """
    load_weights(model, folder)
    _load_optimizer(optimizer, folder)
    state = _state(folder)
    scheduler.load_state_dict(state["scheduler"])
    if scaler is not None and state["scaler"] is not None:
        scaler.load_state_dict(state["scaler"])
    states = load_file(folder / _RANDOM)
    put_random_state_back({n: states[key] for n in ("cpu", "cuda") if (key := _of_process(n, rank)) in states})


def load_weights(model: PeftModel, folder: Path) -> None:
    """Put the adapter weights of `folder` into `model`'s own adapter."""
    set_peft_model_state_dict(model, load_file(folder / ADAPTER_WEIGHTS))


def random_state() -> dict[str, torch.Tensor]:
    """The state of this process's random numbers."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def put_random_state_back(state: dict[str, torch.Tensor]) -> None:
    """The reverse of `random_state`; a device that `state` does not know goes on as it is."""
    if "cpu" in state:
        torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _of_process(name: str, rank: int) -> str:
    return f"{name}.{rank}" if rank else name


def _state(folder: Path) -> JsonObject:
    path = folder / "progress.json"
    state = read_json(path, _advice(folder))
    if missing := {"progress", "scheduler", "scaler"} - state.keys():
        raise UsageError(f"{path}: {', '.join(sorted(missing))} missing. {_advice(folder)}")
    return state


def _advice(folder: Path) -> str:
    return f"Delete {folder} to continue from the checkpoint before it, or start over with --resume never."


def _save_adapter(model: PeftModel, folder: Path) -> None:
    """Write the adapter in PEFT's form."""
    weights = get_peft_model_state_dict(model, save_embedding_layers=False)
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}, folder / ADAPTER_WEIGHTS)
    config: Any = model.peft_config["default"]
    values = config.to_dict() | {"inference_mode": True}
    # JSON has no sets, and their order changes from run to run; that of target_parameters is empty for some experts
    values |= {name: sorted(value) or None for name, value in values.items() if isinstance(value, set)}
    write_json(folder / "adapter_config.json", values)


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
    stored = read_json(folder / "optimizer.json", _advice(folder))
    nested: dict[str, Any] = {}
    # copied, since torch's AdamW keeps the tensors it gets and the file would stay mapped: Windows would not delete it
    tensors = {name: value.clone() for name, value in load_file(folder / "optimizer.safetensors").items()}
    for key, value in [*tensors.items(), *stored["scalars"].items()]:
        *path, name = key.split("/")
        place = nested
        for part in path:
            place = place.setdefault(part, {})
        place[name] = value
    state = {int(index): entries for index, entries in nested.items()}
    optimizer.load_state_dict({"state": state, "param_groups": stored["param_groups"]})


@contextmanager
def stop_requests(speaks: bool) -> Iterator[list[int]]:
    """A list that gets the first SIGINT, SIGTERM, SIGHUP or SIGBREAK inside; a second one ends the program at once.

    With `speaks`, a line on standard error says that the signal was heard.
    """
    heard: list[int] = []

    def remember(number: int, frame: FrameType | None) -> None:
        if heard:
            raise KeyboardInterrupt
        heard.append(number)
        # written past Python's buffers, which the signal may have interrupted
        if speaks:
            os.write(2, b"\nStopping after this update ... (again to stop at once, without saving)\n")

    names = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")  # SIGHUP is on POSIX only, SIGBREAK on Windows only
    known = [getattr(signal, name) for name in names if hasattr(signal, name)]
    # nohup ignores SIGHUP so that the run outlives its terminal
    watched = [number for number in known if signal.getsignal(number) is not signal.SIG_IGN]
    is_main = threading.current_thread() is threading.main_thread()  # Python allows handlers only there
    previous = {number: signal.signal(number, remember) for number in watched} if is_main else {}
    try:
        yield heard
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
