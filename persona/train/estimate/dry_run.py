"""finetune.py --dry-run: the memory and time of a run from its data and the model's config, and advice that fits it."""

import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from persona.config import Config
from persona.console import duration, table
from persona.errors import UsageError
from persona.model.architecture import read_architecture
from persona.model.device import choose_device, choose_precision
from persona.model.folders import missing_parts
from persona.train.estimate.fit import CUDA_CONTEXT, GAPS, HOLES, TIGHT, Room, resident_bytes, room_here, room_on
from persona.train.estimate.forecast import Forecast
from persona.train.estimate.gpus import WINDOWS_KEEPS, find_gpu
from persona.train.estimate.memory import GIB
from persona.train.estimate.speed import ASSUMED, seconds
from persona.train.loop import Trainer, Update, choose_optimizer, updates_per_epoch
from persona.train.run import Material, finetune
from persona.train.run_folder import log_folder

BAR, BINS = 40, 8  # signs of the longest bar of the histogram, and its bars
WARM_UP, MEASURED = 1, 2  # updates; the first one also makes the optimizer's states and loads libraries' code


class _Enough(Exception):
    """Ends a run whose first updates were to be measured."""


@dataclass(frozen=True)
class _Time:
    """Seconds of the parts of a run."""

    token: float
    """One token that is computed in training."""
    evaluation: float
    """One evaluation with its samples."""


def dry_run(config: Config, material: Material, for_gpu: str | None) -> str:
    """The report on a run that `config` describes, on this device or on the GPU that is called `for_gpu`."""
    resident = resident_bytes()
    room = _room(config, for_gpu, resident)
    model_config = read_architecture(material.base)
    optimizer = choose_optimizer(config.training.optim, torch.device(room.kind))

    def forecast(one: Config) -> Forecast:
        return Forecast(
            one, material.train.conversations, model_config, room, _precision(one, room), optimizer, resident
        )

    run = forecast(config)
    there = not missing_parts(material.base)
    time = _measured(config, run) if for_gpu is None and there else _on_paper(run)
    held_out, train = material.held_out, material.train
    rows = [
        ("base model", f"{config.model.name_or_path}, {run.paper.weights / 1e9:.1f} x 10^9 weights"),
        ("device", f"{room.device} in {run.setup.precision}, {room.bytes / GIB:.1f} GiB for the run"),
        ("training", f"{len(train.conversations)} conversations, {len(train.examples)} examples (one a reply), "
         f"{train.tokens:,} tokens, of which {train.supervised:,} are learned"),
        ("updates", f"{run.work.updates}, which compute about {run.work.computed:,.0f} tokens"),
        ("packs", f"up to {run.limit:,} tokens, the largest has {run.step.tokens:,}; {_largest(run)}"),
        ("disk", _disk(run, there)),
        ("time", _time(run, time, room, _evaluations(config, run) if held_out.records else 0)),
    ]  # fmt: skip
    parts = [(name, f"{size / GIB:6.2f} GiB") for name, size in run.step.parts.items()]
    together = (run.step.peak + run.lost) / GIB
    parts += [(_losses(room), f"{run.lost / GIB:6.2f} GiB"), ("together", f"{together:6.2f} GiB")]
    lengths = [len(one.prompt_ids) + len(one.reply_ids) for one in train.examples]
    lines = ["Dry run: nothing is trained, and nothing is written.", table(rows)]
    lines += ["\nMemory on paper, at the peak of a step with the largest pack:", table(parts)]
    lines += [f"\nTokens of the examples (at most {config.data.max_length}):", histogram(lengths)]
    return "\n".join([*lines, "", f"Verdict: {_verdict(run)}", *_advice(config, run, forecast)])


def _room(config: Config, for_gpu: str | None, resident: float) -> Room:
    if for_gpu is not None:
        return room_on(find_gpu(for_gpu))
    if config.model.device == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            "model.device is cuda, and there is no usable GPU here. Name the GPU that will train, such as --dry-run "
            '--for-gpu 8GB, or set model.device to "auto".'
        )
    return room_here(choose_device(config.model.device), resident)


def _precision(config: Config, room: Room) -> str:
    setting = config.training.precision
    if setting != "auto" or room.gpu is None and room.kind == "cpu" or torch.cuda.is_available():
        return choose_precision(setting, torch.device(room.kind))
    return "bf16" if room.gpu is None or room.gpu.capability >= (8, 0) else "fp16"


def _losses(room: Room) -> str:
    if room.kind == "cuda":
        return f"gaps and CUDA (a guess: {GAPS - 1:.0%} and {CUDA_CONTEXT / GIB:.1f} GiB)"
    return f"Python, libraries, holes in the heap ({HOLES:.0%} of what comes and goes)"


def _largest(run: Forecast) -> str:
    if not run.largest:
        return "no pack fits"
    if run.largest >= run.work.largest_update:
        return f"a whole update ({run.work.largest_update:,} tokens) would fit into one, with {TIGHT:.0%} left over"
    return f"up to {run.largest:,} would fit, with {TIGHT:.0%} left over"


def _disk(run: Forecast, there: bool) -> str:
    adapter, states = run.step.parts["adapter"], run.step.parts["optimizer states"]
    text = f"{(4 * adapter + 3 * states) / 1e9:.2f} GB for three checkpoints and the adapter"
    return text if there else f"{text}; {2 * run.paper.weights / 1e9:.1f} GB for the model, which is not here yet"


def _evaluations(config: Config, run: Forecast) -> int:
    every = config.evaluation.eval_steps or updates_per_epoch(len(run.train), config.training.train_batch_size)
    return 1 + -(-run.work.updates // every)


def _on_paper(run: Forecast) -> _Time | None:
    if run.room.gpu is None:
        return None
    forward, backward = (seconds(kernels, run.room.gpu) for kernels in (run.step.forward, run.step.backward))
    return _Time((forward + backward) / run.step.tokens, 0.0)


def _measured(config: Config, run: Forecast) -> _Time:
    """The time of the updates after the first of a real run in a folder of its own, and of the evaluation before."""
    updates: list[Update] = []
    before = 0.0

    def watch(trainer: Trainer, update: Update) -> None:
        nonlocal before
        updates.append(update)
        before = before or trainer.progress.seconds - update.seconds
        if len(updates) == min(WARM_UP + MEASURED, trainer.total):
            raise _Enough

    with tempfile.TemporaryDirectory(prefix="persona-dry-run-") as folder:
        training = config.training.model_copy(update={"output_dir": folder, "max_tokens_per_pack": run.limit})
        try:
            finetune(config.model_copy(update={"training": training}), True, lambda _: None, observers=[watch])
        except _Enough:
            pass
        finally:
            shutil.rmtree(log_folder(Path(folder)), ignore_errors=True)
    measured = range(min(WARM_UP, len(updates) - 1), len(updates))
    return _Time(sum(updates[step].seconds for step in measured) / run.tokens_of(measured), before)


def _time(run: Forecast, time: _Time | None, room: Room, evaluations: int) -> str:
    if time is None:
        return "not known for this device; name a GPU, such as --for-gpu rtx4060"
    training = run.work.computed * time.token
    if not time.evaluation:
        return f"about {duration(training)} without evaluations, on paper ({ASSUMED})"
    whole = training + evaluations * time.evaluation
    return (
        f"about {duration(whole)}, of which {evaluations} evaluations take {duration(evaluations * time.evaluation)}; "
        f"measured on {MEASURED} updates here"
    )


def histogram(lengths: Sequence[int]) -> str:
    """A bar for each range of `lengths`, as text."""
    width = -(-(max(lengths) + 1) // BINS)
    counts = [sum(at * width <= length < (at + 1) * width for length in lengths) for at in range(BINS)]
    rows = [
        (f"{at * width:>6,} to {(at + 1) * width - 1:>6,}", f"{'█' * round(BAR * count / max(counts))} {count}".strip())
        for at, count in enumerate(counts)
    ]
    return table(rows)


def _verdict(run: Forecast) -> str:
    need, room = run.need / GIB, run.room.bytes / GIB
    kept = f" (of {(run.room.bytes + WINDOWS_KEEPS) / GIB:.1f}; Windows keeps about {WINDOWS_KEEPS / GIB:.1f})"
    text = f"{run.verdict}: {need:.1f} GiB of {room:.1f} GiB{kept if run.room.named else ''}, on paper."
    if run.trial > run.step.peak:
        text += " The peak is that of the trial before the first update."
    if run.loading > run.need:
        text += f" Loading shows up to {run.loading / GIB:.1f} GiB for a moment, with pages of the model's files."
    return text


def _advice(config: Config, run: Forecast, forecast: Callable[[Config], Forecast]) -> Iterator[str]:
    """Lines with changes that were tried on paper."""
    if run.verdict == "fits":
        return
    for change in _changes(config, run):
        words = [f"--set {name}={str(value).lower()}" for name, value in change.items()]
        other = forecast(_changed(config, change))
        if other.verdict == "fits":
            yield f"  It fits ({other.need / GIB:.1f} GiB) with {' '.join(words)}"
            return
    yield "  Nothing of it makes the run fit: smaller packs, checkpointing, 4 bits, lora.r 8, shorter examples."
    yield "  Take a smaller model (config/README.md lists them by GPU), or a larger GPU."


def _changes(config: Config, run: Forecast) -> Iterator[dict[str, Any]]:
    """Changes to try, from what changes nothing that is learned to what changes more, each on top of those before."""
    change: dict[str, Any] = {}
    if run.largest and run.largest < run.limit:
        yield {"training.max_tokens_per_pack": run.largest}
    if not config.training.gradient_checkpointing:
        change["training.gradient_checkpointing"] = True
        yield dict(change)
    if run.work.longest < run.limit:
        change["training.max_tokens_per_pack"] = run.work.longest
        yield dict(change)
    if not config.quantization.load_in_4bit:
        change["quantization.load_in_4bit"] = True
        yield dict(change)
    if config.lora.r > 8:
        change["lora.r"] = 8
        yield dict(change)


def _changed(config: Config, change: dict[str, Any]) -> Config:
    values = config.model_dump()
    for name, value in change.items():
        section, _, key = name.partition(".")
        values[section][key] = value
    return Config.model_validate(values)
