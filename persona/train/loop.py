"""The loop: one update of the weights after the other, with evaluations and checkpoints in between.

An update learns from a few conversations. Which ones is a pure function of its number and the seed: each epoch shuffles
all conversations anew and cuts them into batches. So there is no position in the data to save, and resuming is counting
on from the checkpoint's update. The examples of an update may go through the model in any number of packs, on any
number of devices: its loss is the sum over all supervised tokens divided by their number, so the layout never changes
what is learned. After the update the observers are called, then the held-out loss is measured if it is due, and then
the state is saved. A loss or a gradient that is not finite ends the run before the weights change.
"""

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from persona.config import Evaluation, Training
from persona.console import excerpt
from persona.engine.loss import negative_log_likelihood
from persona.engine.packing import pack, plan_packs, portion
from persona.errors import Diverged, EnvironmentFault, Interrupted
from persona.files import fault_in
from persona.model.dataset import Conversation
from persona.model.device import peak_memory_gib, return_free_memory
from persona.model.render import Example
from persona.train.checkpoints import (
    Progress,
    latest_checkpoint,
    load_checkpoint,
    processes_of,
    prune,
    random_state,
    save_checkpoint,
    stop_requests,
)
from persona.train.devices import ALONE, Devices
from persona.train.metrics import MetricsWriter, Sampler, perplexity

OVERFLOWS_LIMIT = 20  # fp16 lowers its loss scale after an overflow; from 65,536 it is at 0.06 after twenty


@dataclass(frozen=True)
class Update:
    """The figures of one update."""

    loss: float
    learning_rate: float
    grad_norm: float
    """Before clipping."""
    tokens: int
    """The tokens of its examples, each in its full context."""
    seconds: float


Observer = Callable[["Trainer", Update], None]


@dataclass
class Trainer:
    """Everything the loop works on; the model, the optimizer, the scheduler and `progress` change."""

    run: Path
    model: PeftModel
    train: Sequence[Conversation]
    held_out: Sequence[Conversation]
    share: bool
    """Whether packs are prefix trees."""
    training: Training
    evaluation: Evaluation
    seed: int
    accelerator: Accelerator
    metrics: MetricsWriter | None
    """None in all processes but the main one."""
    report: Callable[[str], None]
    progress: Progress
    observers: Sequence[Observer]
    """Called after each update, in all processes, before anything is measured or saved."""
    sampler: Sampler | None
    devices: Devices
    peak_memory_gib: float = 0.0
    """The peak of the device with the most."""

    def __post_init__(self) -> None:
        self.per_epoch = updates_per_epoch(len(self.train), self.training.train_batch_size)
        self.total = total_updates(len(self.train), self.training.train_batch_size, self.training.num_train_epochs)
        optimizer = build_optimizer(choose_optimizer(self.training.optim, self.device), self.model, self.training)
        kind, warmup_ratio, total = self.training.lr_scheduler_type, self.training.warmup_ratio, self.total
        self.scheduler = LambdaLR(optimizer, lambda step: rate_factor(step, total, warmup_ratio, kind))
        self.optimizer: Any = self.accelerator.prepare_optimizer(optimizer)

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return self.accelerator.device

    def resume(self, checkpoint: Path) -> list[str]:
        """Put everything but `progress` back as it was in `checkpoint`; returns messages about it for the user."""
        rank, count, before = self.devices.rank, self.devices.count, processes_of(checkpoint)
        scaler, progress = self.accelerator.scaler, self.progress
        load_checkpoint(checkpoint, self.model, self.optimizer.optimizer, self.scheduler, scaler, rank)
        messages = [f"Continuing after update {progress.step} ({checkpoint})."]
        if before != count:
            messages.append(
                f"Until there {before} processes trained, now {count}: dropout draws other random numbers from here on."
            )
        if progress.best_step is not None and (fault := fault_in(self.run / f"checkpoint-{progress.best_step}")):
            messages.append(f"The best checkpoint so far, of update {progress.best_step}, is lost: {fault}.")
            progress.best_step = progress.best_loss = None
        return messages


def run_training(trainer: Trainer) -> None:
    """All updates that are left, or until early stopping; raises `Interrupted` after a signal, with the state saved."""
    progress = trainer.progress
    started = time.perf_counter() - progress.seconds
    with stop_requests(trainer.devices.main) as signals:
        if progress.step == 0 and trainer.held_out:
            progress.base_loss = _evaluate(trainer)
            _write_samples(trainer)
        while progress.step < trainer.total and not stopped_early(trainer):
            update = _one_update(trainer)
            progress.seconds = time.perf_counter() - started
            for observe in trainer.observers:
                observe(trainer, update)
            improved = _evaluate_if_due(trainer)
            progress.seconds = time.perf_counter() - started
            signal_number = int(trainer.devices.largest(sum(signals)))  # all stop after the same update
            if improved or signal_number or _is_due(trainer, trainer.training.save_steps):
                _save(trainer)
            if signal_number and progress.step < trainer.total:
                raise Interrupted(
                    f"Stopped after update {progress.step} of {trainer.total}; the state is saved. "
                    "Run the same command again to continue.",
                    signal_number,
                )
    trainer.peak_memory_gib = trainer.devices.largest(peak_memory_gib(trainer.device))


def _one_update(trainer: Trainer) -> Update:
    begun = time.perf_counter()
    conversations = conversations_of(
        trainer.progress.step, len(trainer.train), trainer.training.train_batch_size, trainer.seed
    )
    examples = [example for index in conversations for example in trainer.train[index]]
    trainer.model.train()
    loss = _backward(trainer, examples)
    rate = float(trainer.scheduler.get_last_lr()[0])
    norm = _step(trainer, loss)
    tokens = sum(len(example.prompt_ids) + len(example.reply_ids) for example in examples)
    trainer.progress.step += 1
    trainer.progress.tokens += tokens
    return Update(loss, rate, norm, tokens, time.perf_counter() - begun)


def _backward(trainer: Trainer, examples: Sequence[Example]) -> float:
    """The mean loss per supervised token of `examples`, whose gradients it leaves in the weights."""
    supervised = sum(len(example.reply_ids) for example in examples)
    total = torch.zeros((), device=trainer.device)
    if trainer.accelerator.scaler is not None:
        trainer.accelerator.scaler.scale(total)  # sets it up, also in a process that gets no pack
    own = portion(examples, trainer.devices.rank, trainer.devices.count, trainer.share)
    groups = plan_packs(own, trainer.training.max_tokens_per_pack, trainer.share)
    for group, weight in trainer.devices.passes(groups, examples[:1]):
        packed = pack(group, trainer.device, trainer.share)
        with trainer.accelerator.autocast():
            loss = negative_log_likelihood(trainer.model, packed) * weight / supervised
        trainer.accelerator.backward(loss)
        return_free_memory(trainer.device)
        total += loss.detach()
    return trainer.devices.sum_gradients(trained_weights(trainer.model), total).item()


def _step(trainer: Trainer, loss: float) -> float:
    """Clip the gradients and step; returns their norm before. Raises `Diverged` with the weights untouched."""
    norm = float(trainer.accelerator.clip_grad_norm_(trained_weights(trainer.model), trainer.training.max_grad_norm))  # pyright: ignore
    overflow = trainer.accelerator.scaler is not None and not math.isfinite(norm)
    overflows = trainer.progress.overflows = trainer.progress.overflows + 1 if overflow else 0
    if not math.isfinite(loss):
        raise _diverged(trainer, f"loss of update {trainer.progress.step + 1}")
    if (not math.isfinite(norm) and not overflow) or overflows > OVERFLOWS_LIMIT:
        raise _diverged(trainer, f"gradient of update {trainer.progress.step + 1}")
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    if not overflow:
        trainer.scheduler.step()
    return norm


def _diverged(trainer: Trainer, figure: str) -> Diverged:
    return Diverged(
        f"The {figure} is not finite; the checkpoints before it are good. Lower training.learning_rate (now "
        f"{trainer.training.learning_rate}), or use training.precision bf16 or fp32 instead of fp16, and start over "
        "with --resume never or in another training.output_dir."
    )


def log_update(trainer: Trainer, update: Update) -> None:
    """Write the figures of an update and report them in one line, every `logging_steps` updates."""
    progress = trainer.progress
    if progress.step % trainer.training.logging_steps and progress.step not in (1, trainer.total):
        return
    speed = update.tokens / update.seconds
    values = {
        "train/loss": update.loss,
        "train/perplexity": perplexity(update.loss),
        "train/learning_rate": update.learning_rate,
        "train/grad_norm": update.grad_norm,
        "train/tokens_per_second": speed,
        "train/peak_memory_gib": trainer.devices.largest(peak_memory_gib(trainer.device)),
    }
    _write_metrics(trainer, values)
    left = progress.seconds / progress.step * (trainer.total - progress.step)
    trainer.report(
        f"update {progress.step:>4}/{trainer.total}  loss {update.loss:6.3f}  grad {update.grad_norm:6.2f}  "
        f"lr {update.learning_rate:.1e}  {speed:6.0f} tokens/s  about {left / 60:.0f} min left"
    )


def _write_metrics(trainer: Trainer, values: dict[str, float]) -> None:
    if trainer.metrics is not None:
        step = trainer.progress.step
        trainer.metrics.write(step, step / trainer.per_epoch, values)


def _is_due(trainer: Trainer, every: int | None) -> bool:
    step = trainer.progress.step
    return step % (every or trainer.per_epoch) == 0 or step == trainer.total


def _evaluate_if_due(trainer: Trainer) -> bool:
    """Whether the held-out loss was measured now and is the best so far."""
    progress = trainer.progress
    if not trainer.held_out or not _is_due(trainer, trainer.evaluation.eval_steps):
        return False
    loss = _evaluate(trainer)
    improved = progress.best_loss is None or loss < progress.best_loss
    if improved:
        progress.best_loss, progress.best_step, progress.evaluations_without_improvement = loss, progress.step, 0
    else:
        progress.evaluations_without_improvement += 1
    note = "best so far" if improved else f"no improvement ({progress.evaluations_without_improvement} in a row)"
    trainer.report(f"  held-out loss {loss:.4f}  perplexity {perplexity(loss):.2f}  {note}")
    _write_samples(trainer)
    return improved


def _evaluate(trainer: Trainer) -> float:
    """The held-out loss, which is also written to the metrics."""
    limit = trainer.evaluation.max_tokens_per_pack
    loss = mean_loss(trainer.model, trainer.held_out, limit, trainer.accelerator, trainer.share, trainer.devices)
    if not math.isfinite(loss):
        raise _diverged(trainer, f"held-out loss after update {trainer.progress.step}")
    _write_metrics(trainer, {"eval/loss": loss, "eval/perplexity": perplexity(loss)})
    return loss


def mean_loss(
    model: Any,
    conversations: Sequence[Conversation],
    max_tokens: int,
    accelerator: Accelerator,
    share: bool,
    devices: Devices = ALONE,
) -> float:
    """Mean negative log-likelihood in nats per supervised token over `conversations`, whatever the packs."""
    examples = [example for conversation in conversations for example in conversation]
    was_training = model.training
    model.eval()
    total = 0.0
    with torch.no_grad(), accelerator.autocast():
        groups = plan_packs(portion(examples, devices.rank, devices.count, share), max_tokens, share)
        for group, weight in devices.passes(groups, examples[:1]):
            total += weight * negative_log_likelihood(model, pack(group, accelerator.device, share)).item()
    model.train(was_training)
    return devices.total(total) / sum(len(example.reply_ids) for example in examples)


def stopped_early(trainer: Trainer) -> bool:
    """Whether the held-out loss has not improved for `early_stopping_patience` evaluations in a row."""
    patience = trainer.evaluation.early_stopping_patience
    return patience is not None and trainer.progress.evaluations_without_improvement >= patience


def _write_samples(trainer: Trainer) -> None:
    """Write the model's answers to its few prompts; the main process does it alone, while the others go on."""
    if trainer.metrics is not None and trainer.sampler is not None:
        with trainer.accelerator.autocast():
            samples = trainer.sampler.answer(trainer.model)
        trainer.metrics.write_samples(trainer.progress.step, samples)
        trainer.report(f"  says: {excerpt(samples[0].predict, 110)}")


def _save(trainer: Trainer) -> None:
    random_states = trainer.devices.gather(random_state())
    if trainer.metrics is None:
        return
    progress, optimizer, scaler = trainer.progress, trainer.optimizer.optimizer, trainer.accelerator.scaler
    progress.history_bytes, progress.sample_bytes = trainer.metrics.sizes
    save_checkpoint(trainer.run, trainer.model, optimizer, trainer.scheduler, scaler, random_states, progress)
    prune(trainer.run, progress.best_step)


def best_checkpoint(trainer: Trainer) -> Path:
    """The complete checkpoint with the lowest held-out loss, or the newest if none was measured or it is lost."""
    best = trainer.run / f"checkpoint-{trainer.progress.best_step}"
    if trainer.progress.best_step is not None and fault_in(best) is None:
        return best
    newest, _ = latest_checkpoint(trainer.run)
    if newest is None:
        raise EnvironmentFault(f"No checkpoint in {trainer.run} is complete any more; was the folder changed?")
    return newest


def updates_per_epoch(conversations: int, train_batch_size: int) -> int:
    """Updates in one pass; the last one of a pass may be smaller."""
    return math.ceil(conversations / train_batch_size)


def total_updates(conversations: int, train_batch_size: int, epochs: float) -> int:
    """Updates of the whole run, at least one; a part of an epoch counts by the updates it fills."""
    return max(1, round(epochs * updates_per_epoch(conversations, train_batch_size)))


def conversations_of(update: int, conversations: int, train_batch_size: int, seed: int) -> Sequence[int]:
    """Indices of the conversations that update number `update` learns from, counted from 0."""
    epoch, place = divmod(update, updates_per_epoch(conversations, train_batch_size))
    return _order(epoch, conversations, seed)[place * train_batch_size : (place + 1) * train_batch_size]


@lru_cache(maxsize=1)  # every update of an epoch asks for the same
def _order(epoch: int, conversations: int, seed: int) -> tuple[int, ...]:
    order = list(range(conversations))
    random.Random(f"order {seed} {epoch}").shuffle(order)
    return tuple(order)


def rate_factor(step: int, total: int, warmup_ratio: float, kind: str) -> float:
    """Share of the peak learning rate at update `step` of `total`, counted from 0; never 0, so that each one learns."""
    warmup = min(math.ceil(warmup_ratio * total), total - 1)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / (total - warmup)
    return {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}[kind]


def trained_weights(model: Any) -> list[nn.Parameter]:
    """The weights that are learned: the adapter's."""
    return [weight for weight in model.parameters() if weight.requires_grad]


def choose_optimizer(setting: str, device: torch.device) -> str:
    """The optimizer for `training.optim` on `device`."""
    if setting != "auto":
        return setting
    # not the paged one: Windows cannot page, a failure of it ends the process, and the states are small
    return "adamw_8bit" if device.type == "cuda" else "adamw_torch"


def build_optimizer(name: str, model: Any, training: Training) -> Any:
    """AdamW (arXiv 1711.05101) over the trained weights: torch's, or bitsandbytes' with 8-bit states."""
    weights = trained_weights(model)
    rate, decay = training.learning_rate, training.weight_decay
    if name == "adamw_torch":
        return AdamW(weights, lr=rate, weight_decay=decay)
    try:
        from bitsandbytes.optim.adamw import AdamW8bit, PagedAdamW8bit
    except ImportError as error:
        raise EnvironmentFault(
            f'training.optim {name} needs bitsandbytes: {error}. Use --set training.optim="adamw_torch".'
        ) from None
    return (PagedAdamW8bit if name == "paged_adamw_8bit" else AdamW8bit)(weights, lr=rate, weight_decay=decay)
