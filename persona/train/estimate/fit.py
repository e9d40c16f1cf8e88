"""Whether a run fits a device: its need with what is lost beside tensors, the room there, and the largest pack."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import psutil
import torch

from persona.model.device import return_free_memory
from persona.model.render import Example
from persona.train.estimate.gpus import GPUS, WINDOWS_KEEPS, Gpu, known_name
from persona.train.estimate.memory import GIB, OnPaper, Step

# A guess: gaps between the blocks that torch's allocator hands out, and CUDA's own context.
# benchmarks/gpu_session.py on a GPU gives the true figures.
GAPS, CUDA_CONTEXT = 1.05, 0.5 * GIB
# On the CPU: holes of glibc's heap between tensors that come and go (31 to 41 % of them in packs of 1,000 tokens, with
# checkpointing too, where each layer leaves its holes before it is computed again); code of libraries that training
# loads, and that only evaluations and their samples load; and the code for 16-bit products of 64 shapes, which torch
# and oneDNN keep (persona/model/sources.py), 0.65 MiB each
HOLES = 0.33
TRAINING_CODE, EVALUATION_CODE = 0.04 * GIB, 0.05 * GIB
PRODUCTS = 64 * 0.65 * 2**20
TIGHT = 0.1  # of the room: with less left over, another program or a longer example may be too much
CPU_SHARE = 0.5  # of the free memory that packs of size "auto" may fill: other programs run beside
STEPS_OF = 64  # packs of size "auto" are a multiple of so many tokens
ON_CPU = 2048  # a CPU gains nothing from larger packs


@dataclass(frozen=True)
class Room:
    """Memory for a run on a device."""

    device: str
    """In words."""
    kind: str
    """`cuda` or `cpu`."""
    bytes: float
    """Bytes that a run may take."""
    gpu: Gpu | None
    """Its data sheet, if it is a GPU in the list."""
    named: bool = False
    """Whether it need not be here."""


def room_on(gpu: Gpu) -> Room:
    """The memory that Windows leaves on `gpu`, which need not be here."""
    return Room(gpu.name, "cuda", gpu.memory - WINDOWS_KEEPS, gpu if gpu.bandwidth else None, True)


def room_here(device: torch.device, resident: float = 0.0) -> Room:
    """The memory that is free on `device` now, and `resident` bytes that this process has already."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        name = torch.cuda.get_device_name(device)
        known = known_name(name)
        return Room(name, "cuda", float(free), GPUS[known] if known else None)
    return Room("this CPU", "cpu", psutil.virtual_memory().available + resident, None)


def resident_bytes() -> float:
    """Bytes of this process in memory. What reading a large tokenizer left free in glibc's heap is given back."""
    return_free_memory(torch.device("cpu"))
    return float(psutil.Process().memory_info().rss)


def with_losses(step: Step, kind: str, resident: float = 0.0, precision: str = "bf16") -> float:
    """Bytes that `step` takes on the device: its tensors, and what is lost beside them.

    On the CPU they are those of the whole process, which had `resident` bytes before the model was loaded.
    """
    if kind == "cuda":
        return step.peak * GAPS + CUDA_CONTEXT
    code = TRAINING_CODE + (PRODUCTS if precision == "bf16" else 0)
    return resident + code + step.peak + HOLES * step.passing


def largest_pack(
    paper: OnPaper, room: float, filled: Callable[[int], Sequence[Example]], most: int, resident: float
) -> int:
    """The largest number of tokens in a pack that fits `room` bytes, up to `most`; 0 if no pack of two examples fits.

    `filled` gives examples for a pack of up to so many tokens. Memory grows evenly with them, so a line through two
    packs tells the number, and a third pack proves it.
    """

    def need(limit: int) -> tuple[int, float]:
        step = paper.step(filled(limit))
        return step.tokens, with_losses(step, paper.setup.device, resident, paper.setup.precision)

    (few, little), (many, much) = need(most // 4), need(most)
    if much <= room:
        return most
    slope = (much - little) / max(many - few, 1)
    if slope <= 0:
        return 0
    limit = int(few + (room - little) / slope) // STEPS_OF * STEPS_OF
    while limit > 0 and need(limit)[1] > room:
        limit = int(limit * 0.95) // STEPS_OF * STEPS_OF
    return max(limit, 0)
