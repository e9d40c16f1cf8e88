"""The loop: one update of the weights after the other, with evaluations and checkpoints in between.

An update learns from a few conversations. Which ones is a pure function of its number and the seed: each epoch shuffles
all conversations anew and cuts them into batches. So there is no position in the data to save, and resuming is counting
on from the checkpoint's update. The examples of an update may go through the model in any number of packs, on any
number of devices: its loss is the sum over all supervised tokens divided by their number, so the layout never changes
what is learned. After the update the observers are called, then the held-out loss is measured if it is due, and then
the state is saved. A loss or a gradient that is not finite ends the run before the weights change.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
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
from persona.engine.memory import Limit
from persona.engine.packing import pack, portion
from persona.errors import Diverged, EnvironmentFault, Interrupted, OutOfMemory
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
from persona.train.memory import LOOKED_AT, STATES, TRIED_ON, start_over, sum_over_packs, try_heaviest
from persona.train.metrics import MetricsWriter, Sampler, perplexity
from persona.train.schedule import conversations_of, rate_factor, total_updates, updates_per_epoch

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
    packs: Limit
    held_out_packs: Limit
    samples_at_once: Limit
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
        if trainer.device.type in TRIED_ON and progress.step < trainer.total:
            _try_heaviest(trainer)
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
    examples = _examples_of(trainer, trainer.progress.step)
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
    if trainer.accelerator.scaler is not None:
        # sets it up, also in a process that gets no pack
        trainer.accelerator.scaler.scale(torch.zeros((), device=trainer.device))
    own = portion(examples, trainer.devices.rank, trainer.devices.count, trainer.share)
    weights = trained_weights(trainer.model)
    total = sum_over_packs(
        partial(_learn, trainer, supervised), own, examples[:1], trainer.packs, trainer.share, trainer.device,
        trainer.devices, partial(start_over, weights, random_state()),
    )  # fmt: skip
    return trainer.devices.sum_gradients(weights, total).item()


def _learn(trainer: Trainer, supervised: int, group: Sequence[Example], weight: float) -> torch.Tensor:
    """Add the gradients of one pack, of an update with so many supervised tokens; returns its part of the loss."""
    packed = pack(group, trainer.device, trainer.share)
    with trainer.accelerator.autocast():
        loss = negative_log_likelihood(trainer.model, packed) * weight / supervised
    trainer.accelerator.backward(loss)
    return_free_memory(trainer.device)
    return loss.detach()


def _try_heaviest(trainer: Trainer) -> None:
    """See to it that the heaviest pack of the updates that are left fits the memory."""
    left = range(trainer.progress.step, trainer.total)
    chosen = left[:: 1 + len(left) // LOOKED_AT]
    rank, count = trainer.devices.rank, trainer.devices.count

    def updates() -> Iterator[Sequence[Example]]:
        for step in chosen:
            yield portion(_examples_of(trainer, step), rank, count, trainer.share)

    optimizer = choose_optimizer(trainer.training.optim, trainer.device)
    known = bool(trainer.optimizer.optimizer.state)  # of a run that is continued
    states = 0 if known else STATES[optimizer] * sum(weight.numel() for weight in trained_weights(trainer.model))
    trainer.model.train()
    try_heaviest(
        partial(_learn, trainer, 1), trainer.model, updates, states, trainer.train[0][:1], trainer.packs,
        trainer.share, trainer.device, trainer.devices,
    )  # fmt: skip


def _examples_of(trainer: Trainer, step: int) -> list[Example]:
    """The examples that update number `step` learns from, counted from 0."""
    conversations = conversations_of(step, len(trainer.train), trainer.training.train_batch_size, trainer.seed)
    return [example for index in conversations for example in trainer.train[index]]


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
    loss = mean_loss(
        trainer.model, trainer.held_out, trainer.held_out_packs, trainer.accelerator, trainer.share, trainer.devices
    )
    if not math.isfinite(loss):
        raise _diverged(trainer, f"held-out loss after update {trainer.progress.step}")
    _write_metrics(trainer, {"eval/loss": loss, "eval/perplexity": perplexity(loss)})
    return loss


def mean_loss(
    model: Any,
    conversations: Sequence[Conversation],
    limit: Limit,
    accelerator: Accelerator,
    share: bool,
    devices: Devices = ALONE,
) -> float:
    """Mean negative log-likelihood in nats per supervised token over `conversations`, whatever the packs."""
    examples = [example for conversation in conversations for example in conversation]
    device = accelerator.device

    def measure(group: Sequence[Example], weight: float) -> torch.Tensor:
        return weight * negative_log_likelihood(model, pack(group, device, share)).double()

    was_training = model.training
    model.eval()
    with torch.no_grad(), accelerator.autocast():
        own = portion(examples, devices.rank, devices.count, share)
        total = sum_over_packs(measure, own, examples[:1], limit, share, device, devices).item()
    model.train(was_training)
    return devices.total(total) / sum(len(example.reply_ids) for example in examples)


def stopped_early(trainer: Trainer) -> bool:
    """Whether the held-out loss has not improved for `early_stopping_patience` evaluations in a row."""
    patience = trainer.evaluation.early_stopping_patience
    return patience is not None and trainer.progress.evaluations_without_improvement >= patience


def _write_samples(trainer: Trainer) -> None:
    """Write the model's answers to its few prompts; the main process does it alone, while the others go on."""
    if trainer.metrics is not None and trainer.sampler is not None:
        try:
            with trainer.accelerator.autocast():
                samples = trainer.sampler.answer(trainer.model, trainer.samples_at_once)
        except OutOfMemory as full:
            trainer.sampler = None
            trainer.report(f"  no samples: {full}")
            return
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
