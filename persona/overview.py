"""What a run says of itself: the arithmetic before it begins, and the figures at its end."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from persona.config import Config
from persona.console import duration, table
from persona.dataset import Dataset
from persona.memory import peak_memory_gib
from persona.metrics import perplexity
from persona.optimizers import choose_optimizer
from persona.run_folder import log_folder
from persona.training import Trainer


def arithmetic(
    config: Config,
    train: Dataset,
    held_out: Dataset,
    notes: Sequence[str],
    trainer: Trainer,
    precision: str,
    unshared: str | None,
) -> str:
    """What the run will do, as a table, and what a person should know before; `unshared` says why it takes rows."""
    trainable = sum(weight.numel() for weight in trainer.model.parameters() if weight.requires_grad)
    share = train.supervised / train.tokens
    bits = f"4 bits ({config.quantization.bnb_4bit_quant_type})" if config.quantization.load_in_4bit else "16 bits"
    if not config.quantization.load_in_4bit and precision == "fp32":
        bits = "32 bits"
    per_update = train.supervised / trainer.per_epoch
    rows = [
        ("base model", f"{config.model.name_or_path} in {bits}"),
        ("device", f"{_device(trainer)} in {precision}, {torch.get_num_threads()} threads"),
        ("training", f"{len(train.conversations)} conversations, {len(train.examples)} examples (one a reply)"),
        ("tokens", f"{train.tokens:,}, of which {train.supervised:,} ({share:.0%}) are learned: replies, end tokens"),
        ("computed", _layout(unshared)),
        ("held out", f"{len(held_out.examples)} examples, {held_out.supervised:,} measured tokens"),
        ("updates", f"{trainer.per_epoch} an epoch of {config.training.train_batch_size} conversations, "
         f"about {per_update:.0f} learned tokens each; {trainer.total} in all"),
        ("adapter", f"r={config.lora.r} on {len(set(_adapted(trainer.model)))} kinds of layers, {trainable:,} weights"),
        ("optimizer", f"{choose_optimizer(config.training.optim, trainer.device)}, "
         f"{config.training.lr_scheduler_type}, peak {config.training.learning_rate:g}"),
        ("TensorBoard", f"tensorboard --logdir logs  (this run: {log_folder(trainer.run).as_posix()})"),
    ]  # fmt: skip
    return "\n".join([table(rows), *(f"  note: {note}" for note in notes)])


def _device(trainer: Trainer) -> str:
    count = trainer.devices.count
    kind = f"{trainer.device.type} sharing out the base" if trainer.devices.sharded else trainer.device.type
    return str(trainer.device) if count == 1 else f"{count} of {kind}"


def _layout(unshared: str | None) -> str:
    if unshared is not None:
        return f"one example a row: {unshared}"
    return "shared beginnings once a pack: the card, and earlier turns where the template leaves them alone"


def _adapted(model: Any) -> list[str]:
    return sorted(model.peft_config["default"].target_modules)


def summary(trainer: Trainer, best: Path, precision: str) -> dict[str, str]:
    """What came of the run, by name."""
    progress = trainer.progress
    facts = {"best": f"update {best.name.removeprefix('checkpoint-')} of {trainer.total}"}
    if progress.base_loss is not None and progress.best_loss is not None:
        base, tuned = perplexity(progress.base_loss), perplexity(progress.best_loss)
        facts["held-out loss"] = f"{progress.base_loss:.4f} base, {progress.best_loss:.4f} tuned"
        facts["held-out perplexity"] = f"{base:.2f} base, {tuned:.2f} tuned ({tuned / base:.0%})"
    facts["time"] = f"{duration(progress.seconds)}, {progress.tokens / max(progress.seconds, 1e-9):.0f} tokens/s"
    peak = max(trainer.peak_memory_gib, peak_memory_gib(trainer.device))
    facts["peak memory"] = f"{peak:.1f} GiB ({_device(trainer)}, {precision})"
    return facts
