"""The loop: for every update of the plan, its packs forward and backward, one step, and what hangs on it.

An update's loss is the sum over its supervised tokens divided by their number, however the examples are laid out in
memory; an evaluation is weighted by tokens; a checkpoint is complete or absent; a loss or gradient that is not finite
stops the run before the weights change.
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
from persona.model.loading import peak_memory_gib, return_free_memory
from persona.model.render import Example
from persona.train.checkpoints import (
    Progress,
    StopRequest,
    latest_checkpoint,
    load_checkpoint,
    processes_of,
    prune,
    random_state,
    save_checkpoint,
)
from persona.train.devices import ALONE, Devices
from persona.train.metrics import MetricsWriter, Sampler, perplexity

# --- optimizers -------------------------------------------------------------------------------------------------------
# What moves the weights: which ones are learned, the optimizer over them, and the course of the learning rate.


def trained_weights(model: Any) -> list[nn.Parameter]:
    """The weights that are learned: the adapter's."""
    return [weight for weight in model.parameters() if weight.requires_grad]


def choose_optimizer(setting: str, device: torch.device) -> str:
    """The optimizer for `training.optim` on `device`."""
    if setting != "auto":
        return setting
    return "paged_adamw_8bit" if device.type == "cuda" else "adamw_torch"


def rate_factor(step: int, total: int, warmup_ratio: float, kind: str) -> float:
    """Share of the peak learning rate at update `step` of `total`, counted from 0; never 0, so that each one learns."""
    warmup = min(math.ceil(warmup_ratio * total), total - 1)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / (total - warmup)
    return {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}[kind]


def build_optimizer(name: str, model: Any, training: Training) -> Any:
    """AdamW (arXiv 1711.05101) over the trainable weights: torch's, or bitsandbytes' with 8-bit states."""
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


# --- plan -------------------------------------------------------------------------------------------------------------
# What stands behind every weight update, as a pure function of seed and counts: resuming is just continuing.


def updates_per_epoch(conversations: int, train_batch_size: int) -> int:
    """Weight updates in one pass; the last one of a pass may be smaller."""
    return math.ceil(conversations / train_batch_size)


def total_updates(conversations: int, train_batch_size: int, epochs: float) -> int:
    """Weight updates of the whole run; part of an epoch counts by the updates it fills, at least one."""
    return max(1, round(epochs * updates_per_epoch(conversations, train_batch_size)))


def conversations_of(update: int, conversations: int, train_batch_size: int, seed: int) -> Sequence[int]:
    """Indices of the conversations behind weight update number `update`, counted from 0."""
    epoch, place = divmod(update, updates_per_epoch(conversations, train_batch_size))
    return _order(epoch, conversations, seed)[place * train_batch_size : (place + 1) * train_batch_size]


@lru_cache(maxsize=1)  # every update of an epoch asks for the same
def _order(epoch: int, conversations: int, seed: int) -> tuple[int, ...]:
    order = list(range(conversations))
    random.Random(f"order {seed} {epoch}").shuffle(order)
    return tuple(order)


SKIPPED_STEPS_LIMIT = 20  # fp16 lowers its loss scale after an overflow; from 65,536 it is at 0.06 after twenty


@dataclass
class Trainer:
    """Everything the loop works on; what changes is in model, optimizer, scheduler and `progress`."""

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
    sampler: Sampler | None = None
    devices: Devices = ALONE
    peak_memory_gib: float = 0.0
    """Of the device with the most."""

    def __post_init__(self) -> None:
        self.per_epoch = updates_per_epoch(len(self.train), self.training.train_batch_size)
        self.total = total_updates(len(self.train), self.training.train_batch_size, self.training.num_train_epochs)
        optimizer = build_optimizer(choose_optimizer(self.training.optim, self.device), self.model, self.training)
        kind, warmup_ratio, total = self.training.lr_scheduler_type, self.training.warmup_ratio, self.total
        scheduler = LambdaLR(optimizer, lambda step: rate_factor(step, total, warmup_ratio, kind))
        self.optimizer: Any = self.accelerator.prepare_optimizer(optimizer)
        self.scheduler = scheduler

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.accelerator.device

    def resume(self, checkpoint: Path) -> list[str]:
        """Go back to the state in `checkpoint`; returns what a person should know about it."""
        rank, count, before = self.devices.rank, self.devices.count, processes_of(checkpoint)
        progress = self.progress = load_checkpoint(
            checkpoint, self.model, self.optimizer.optimizer, self.scheduler, self.accelerator.scaler, rank
        )
        said = [f"Continuing after update {progress.step} ({checkpoint})."]
        if before != count:
            said.append(
                f"Until there {before} processes trained, now {count}: dropout draws other random numbers from here on."
            )
        if progress.best_step is not None and (fault := fault_in(self.run / f"checkpoint-{progress.best_step}")):
            said.append(f"The best checkpoint so far, of update {progress.best_step}, is lost: {fault}.")
            progress.best_step = progress.best_loss = None
        return said


def run_training(trainer: Trainer) -> None:
    """All updates that are left, or until early stopping; raises `Interrupted` after a signal, with the state saved."""
    progress = trainer.progress
    started = time.perf_counter() - progress.seconds
    with StopRequest(trainer.devices.main) as stop:
        if progress.step == 0 and trainer.held_out:
            progress.base_loss = _evaluate_and_log(trainer)
            _speak(trainer)
        while progress.step < trainer.total and not stopped_early(trainer):
            _one_update(trainer)
            progress.seconds = time.perf_counter() - started
            improved = _evaluate_if_due(trainer)
            progress.seconds = time.perf_counter() - started
            signal_number = int(trainer.devices.largest(stop.number or 0))  # all stop after the same update
            if improved or signal_number or _is_due(trainer, trainer.training.save_steps):
                _save(trainer)
            if signal_number and progress.step < trainer.total:
                raise Interrupted(
                    f"Stopped after update {progress.step} of {trainer.total}; the state is saved. "
                    "Run the same command again to continue.",
                    signal_number,
                )
    trainer.peak_memory_gib = trainer.devices.largest(peak_memory_gib(trainer.device))


def best_checkpoint(trainer: Trainer) -> Path:
    """The complete checkpoint with the lowest held-out loss, or the newest where nothing was measured or it is lost."""
    best = trainer.run / f"checkpoint-{trainer.progress.best_step}"
    if trainer.progress.best_step is not None and fault_in(best) is None:
        return best
    newest, _ = latest_checkpoint(trainer.run)
    if newest is None:
        raise EnvironmentFault(f"No checkpoint in {trainer.run} is complete any more; was the folder changed?")
    return newest


def stopped_early(trainer: Trainer) -> bool:
    """Whether the held-out loss has not improved for `early_stopping_patience` evaluations in a row."""
    patience = trainer.evaluation.early_stopping_patience
    return patience is not None and trainer.progress.evaluations_without_improvement >= patience


def _one_update(trainer: Trainer) -> None:
    progress = trainer.progress
    begun = time.perf_counter()
    examples = _examples_of(trainer, progress.step)
    trainer.model.train()
    loss, tokens = _backward(trainer, examples)
    rate = trainer.scheduler.get_last_lr()[0]
    norm = _step(trainer, loss)
    progress.step += 1
    progress.tokens += tokens
    if progress.step % trainer.training.logging_steps == 0 or progress.step in (1, trainer.total):
        values = {
            "train/loss": loss,
            "train/perplexity": perplexity(loss),
            "train/learning_rate": rate,
            "train/grad_norm": norm,
            "train/tokens_per_second": tokens / (time.perf_counter() - begun),
            "train/peak_memory_gib": trainer.devices.largest(peak_memory_gib(trainer.device)),
        }
        _write_metrics(trainer, values)
        left = (progress.seconds + time.perf_counter() - begun) / progress.step * (trainer.total - progress.step)
        trainer.report(
            f"update {progress.step:>4}/{trainer.total}  loss {loss:6.3f}  grad {norm:6.2f}  "
            f"lr {rate:.1e}  {values['train/tokens_per_second']:6.0f} tokens/s  "
            f"about {left / 60:.0f} min left"
        )


def _examples_of(trainer: Trainer, update: int) -> list[Example]:
    chosen = conversations_of(update, len(trainer.train), trainer.training.train_batch_size, trainer.seed)
    return [example for index in chosen for example in trainer.train[index]]


def _backward(trainer: Trainer, examples: Sequence[Example]) -> tuple[float, int]:
    """Gradients of the update's mean loss per supervised token; returns that loss and the tokens of its examples."""
    supervised = sum(len(example.reply_ids) for example in examples)
    total = torch.zeros((), device=trainer.device)
    if trainer.accelerator.scaler is not None:
        trainer.accelerator.scaler.scale(total)  # sets it up, also in a process that gets no pack
    mine = portion(examples, trainer.devices.rank, trainer.devices.count, trainer.share)
    groups = plan_packs(mine, trainer.training.max_tokens_per_pack, trainer.share)
    for group, weight in trainer.devices.passes(groups, examples[:1]):
        packed = pack(group, trainer.device, trainer.share)
        with trainer.accelerator.autocast():
            loss = negative_log_likelihood(trainer.model, packed) * weight / supervised
        trainer.accelerator.backward(loss)
        return_free_memory(trainer.device)
        total += loss.detach()
    total = trainer.devices.sum_gradients(trained_weights(trainer.model), total)
    return total.item(), sum(len(example.prompt_ids) + len(example.reply_ids) for example in examples)


def _step(trainer: Trainer, loss: float) -> float:
    """Clip and step; returns the gradient's norm before clipping. Raises `Diverged` with the weights untouched."""
    norm = float(trainer.accelerator.clip_grad_norm_(trained_weights(trainer.model), trainer.training.max_grad_norm))  # pyright: ignore
    overflow = trainer.accelerator.scaler is not None and not math.isfinite(norm)
    overflows = trainer.progress.overflows = trainer.progress.overflows + 1 if overflow else 0
    if not math.isfinite(loss) or (not math.isfinite(norm) and not overflow) or overflows > SKIPPED_STEPS_LIMIT:
        raise Diverged(
            f"The {'gradient' if math.isfinite(loss) else 'loss'} is not finite at update {trainer.progress.step + 1}; "
            "the weights were not changed and the checkpoints are good. Lower training.learning_rate (now "
            f"{trainer.training.learning_rate}), or use training.precision bf16 or fp32 instead of fp16, and start "
            "over with --resume never or in another training.output_dir."
        )
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    if not overflow:
        trainer.scheduler.step()
    return norm


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


def _evaluate_and_log(trainer: Trainer) -> float:
    progress = trainer.progress
    limit = trainer.evaluation.max_tokens_per_pack
    loss = mean_loss(trainer.model, trainer.held_out, limit, trainer.accelerator, trainer.share, trainer.devices)
    if not math.isfinite(loss):
        raise Diverged(
            f"The held-out loss is not finite after update {progress.step}. Earlier checkpoints are good; lower "
            "training.learning_rate or use training.precision bf16 or fp32."
        )
    _write_metrics(trainer, {"eval/loss": loss, "eval/perplexity": perplexity(loss)})
    return loss


def _write_metrics(trainer: Trainer, values: dict[str, float]) -> None:
    if trainer.metrics is not None:
        step = trainer.progress.step
        trainer.metrics.write(step, step / trainer.per_epoch, values)


def _evaluate_if_due(trainer: Trainer) -> bool:
    """Evaluate when it is time; returns whether the held-out loss is the best so far."""
    progress = trainer.progress
    if not trainer.held_out or not _is_due(trainer, trainer.evaluation.eval_steps):
        return False
    loss = _evaluate_and_log(trainer)
    improved = progress.best_loss is None or loss < progress.best_loss
    if improved:
        progress.best_loss, progress.best_step, progress.evaluations_without_improvement = loss, progress.step, 0
    else:
        progress.evaluations_without_improvement += 1
    note = "best so far" if improved else f"no improvement ({progress.evaluations_without_improvement} in a row)"
    trainer.report(f"  held-out loss {loss:.4f}  perplexity {perplexity(loss):.2f}  {note}")
    _speak(trainer)
    return improved


def _speak(trainer: Trainer) -> None:
    """Write down how the model answers its few prompts now; the main process alone, while the others go on."""
    if trainer.metrics is not None and trainer.sampler is not None:
        with trainer.accelerator.autocast():
            samples = trainer.sampler.answer(trainer.model)
        trainer.metrics.write_samples(trainer.progress.step, samples)
        trainer.report(f"  says: {excerpt(samples[0]['predict'], 110)}")


def _is_due(trainer: Trainer, every: int | None) -> bool:
    step = trainer.progress.step
    return step % (every or trainer.per_epoch) == 0 or step == trainer.total


def _save(trainer: Trainer) -> None:
    random = trainer.devices.gather(random_state())
    if trainer.metrics is None:
        return
    trainer.progress.history_bytes, trainer.progress.sample_bytes = trainer.metrics.size, trainer.metrics.sample_size
    save_checkpoint(
        trainer.run,
        trainer.model,
        trainer.optimizer.optimizer,
        trainer.scheduler,
        trainer.accelerator.scaler,
        random,
        trainer.progress,
    )
    prune(trainer.run, trainer.progress.best_step)
