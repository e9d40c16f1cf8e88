"""The forecast of a run: how many tokens its packs have, what memory and time they take, and packs of size "auto"."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch

from persona.config import Config
from persona.console import excerpt
from persona.engine.packing import count_tokens, inputs, plan_packs
from persona.errors import PersonaError, UsageError
from persona.files import JsonObject
from persona.model.architecture import read_architecture
from persona.model.dataset import Conversation
from persona.model.render import Example
from persona.train.estimate.fit import (
    CPU_SHARE,
    EVALUATION_CODE,
    ON_CPU,
    TIGHT,
    Room,
    largest_pack,
    resident_bytes,
    room_here,
    with_losses,
)
from persona.train.estimate.memory import GIB, OnPaper, Setup, Step
from persona.train.loop import conversations_of, total_updates

SAMPLED = 512  # conversations that fill packs on paper
LOOKED_AT = 64  # updates whose packs are planned, spread evenly over the run


@dataclass(frozen=True)
class Work:
    """The updates of a run, as far as memory and time depend on them."""

    updates: int
    computed: float
    """Tokens that all updates compute, prefixes once a pack."""
    heaviest: Sequence[Example]
    """The pack with the most tokens."""
    largest_update: int
    """Tokens of the update with the most, in one pack."""
    longest: int
    """Tokens of the longest example."""


def work_of(config: Config, train: Sequence[Conversation], limit: int, share: bool) -> Work:
    """The work of the run's updates with packs of up to `limit` tokens."""
    batch, training = config.training.train_batch_size, config.training
    total = total_updates(len(train), batch, training.num_train_epochs)
    steps = range(total)[:: 1 + total // LOOKED_AT]
    computed = largest = most = 0
    heaviest: Sequence[Example] = ()
    for step in steps:
        examples = _examples(config, train, step)
        largest = max(largest, count_tokens(_ordered(examples, share), share))
        for group in plan_packs(examples, limit, share):
            tokens = count_tokens(group, share)
            computed += tokens
            if tokens > most:
                most, heaviest = tokens, group
    longest = max(len(one.prompt_ids) + len(one.reply_ids) - 1 for conversation in train for one in conversation)
    return Work(total, computed * total / len(steps), heaviest, largest, longest)


def forecast_here(
    config: Config, base: Path, train: Sequence[Conversation], device: torch.device, precision: str, optimizer: str
) -> Callable[[], "Forecast"]:
    """A function that gives the forecast for `device` as it is now, and the same one whenever it is called."""
    resident = resident_bytes()
    room = room_here(device, resident)

    @cache
    def forecast() -> Forecast:
        try:
            return Forecast(config, train, read_architecture(base), room, precision, optimizer, resident)
        except PersonaError:
            raise
        except Exception as error:  # of an architecture that does not run without numbers; any library may raise it
            raise UsageError(
                f"A step of this model cannot be counted on paper ({excerpt(str(error))}). Set "
                "training.max_tokens_per_pack to a number."
            ) from error

    return forecast


def compared(forecast: Callable[[], "Forecast"], limit: int, measured: float) -> JsonObject:
    """The memory of a finished run with packs of up to `limit` tokens, in GiB: on paper, measured, and the error.

    On a GPU both are those of torch's tensors in training, on the CPU those of the whole process.
    """
    try:
        plan = forecast()
        plan.limit = limit
        on_gpu = plan.room.kind == "cuda"
        paper = (plan.step.peak if on_gpu else max(plan.need, plan.loading)) / GIB
    except Exception as error:  # the run is done, and its adapter must not be lost to the lack of an estimate
        return {"text": f"none: {excerpt(str(error), 120)}"}
    error = paper / measured - 1
    of = "of tensors" if on_gpu else "of the process"
    text = f"{paper:.1f} GiB {of} on paper, {abs(error):.0%} {'more' if error > 0 else 'less'} than the measured peak"
    return {"paper_gib": round(paper, 3), "measured_gib": round(measured, 3), "error": round(error, 3), "text": text}


class Forecast:
    """A run on paper: the largest of its packs, and the memory that a step with it needs."""

    def __init__(
        self,
        config: Config,
        train: Sequence[Conversation],
        model_config: Any,
        room: Room,
        precision: str,
        optimizer: str,
        resident: float,
    ) -> None:
        """`resident` is the memory of this process before the model is loaded."""
        self.config, self.train, self.room = config, train, room
        self.resident = resident + (EVALUATION_CODE if config.data.validation_file else 0.0)
        checkpointing = config.training.gradient_checkpointing
        self.setup = Setup(
            model_config, config.lora, config.quantization, precision, room.kind, optimizer, checkpointing
        )
        self.paper = OnPaper(self.setup)
        auto = config.training.max_tokens_per_pack == "auto"
        self.limit = self._automatic() if auto else config.training.pack_limit

    @cached_property
    def work(self) -> Work:
        """The updates of the run."""
        return work_of(self.config, self.train, self.limit, self.paper.share)

    @cached_property
    def step(self) -> Step:
        """A step with the largest pack."""
        return self.paper.step(self.work.heaviest)

    @cached_property
    def trial(self) -> float:
        """Bytes at the peak of the trial before the first update."""
        return self.paper.trial(self.work.heaviest)

    @property
    def loading(self) -> float:
        """Bytes on the device when the model is loaded: on a CPU its 4-bit weights beside all files of 16 bits."""
        if self.room.kind != "cpu" or not self.setup.quantization.load_in_4bit:
            return 0.0
        weights = self.step.parts["weights in 4 bits"] + self.step.parts["other weights"]
        return self.resident + 2.0 * self.paper.weights + weights

    @property
    def lost(self) -> float:
        """Bytes that are needed beside the tensors of a step."""
        needed = with_losses(self.step, self.room.kind, self.resident, self.setup.precision)
        return needed - self.step.peak

    @property
    def need(self) -> float:
        """Bytes on the device at the peak of the run; the pages of files that loading reads can be taken back."""
        return max(self.step.peak, self.trial) + self.lost

    @cached_property
    def largest(self) -> int:
        """The largest pack that leaves a margin; 0 if none does."""
        room = self.room.bytes * (1 - TIGHT)
        most = max(self.work.largest_update, self.work.longest)
        limit = _largest(self.train, self.paper, room, most, self.resident)
        return limit if limit >= self.work.longest else 0

    @property
    def verdict(self) -> str:
        """`fits`, `tight` or `does not fit`."""
        left = 1 - self.need / self.room.bytes
        return "does not fit" if left < 0 else "tight" if left < TIGHT else "fits"

    def tokens_of(self, updates: Sequence[int]) -> int:
        """The tokens that these updates compute."""
        return sum(
            count_tokens(group, self.paper.share)
            for step in updates
            for group in plan_packs(_examples(self.config, self.train, step), self.limit, self.paper.share)
        )

    def _automatic(self) -> int:
        """The limit for "auto": the largest that leaves a margin, and no more than an update needs.

        It is never below the longest example, which is not cut.
        """
        work = work_of(self.config, self.train, ON_CPU, self.paper.share)
        free, cpu = self.room.bytes - self.resident, self.room.kind == "cpu"
        most = min(work.largest_update, ON_CPU) if cpu else work.largest_update
        room = free * CPU_SHARE + self.resident if cpu else self.room.bytes * (1 - TIGHT)
        return max(work.longest, _largest(self.train, self.paper, room, most, self.resident))


def _examples(config: Config, train: Sequence[Conversation], step: int) -> list[Example]:
    chosen = conversations_of(step, len(train), config.training.train_batch_size, config.seed)
    return [example for index in chosen for example in train[index]]


def _largest(train: Sequence[Conversation], paper: OnPaper, room: float, most: int, resident: float) -> int:
    """The largest pack up to `most` tokens of the run's examples that fits `room` bytes; 0 if none does."""
    examples = [one for conversation in train[:SAMPLED] for one in conversation]

    def filled(limit: int) -> Sequence[Example]:
        low, high = 1, len(examples)
        while low < high:
            middle = (low + high + 1) // 2
            fits = count_tokens(_ordered(examples[:middle], paper.share), paper.share) <= limit
            low, high = (middle, high) if fits else (low, middle - 1)
        return _ordered(examples[:low], paper.share)

    return largest_pack(paper, room, filled, most, resident)


def _ordered(examples: Sequence[Example], share: bool) -> Sequence[Example]:
    """In the order of `plan_packs`."""
    if share:
        return sorted(examples, key=inputs)
    return sorted(examples, key=lambda example: len(inputs(example)), reverse=True)
