"""When the memory is full: the tensors of the failed pass are freed, and its work is done again in halves.

Neither the size of a pack nor the number of replies at a time changes a result, except for rounding. So a lack of
memory costs time and does not end the work, unless a single example or reply does not fit.
"""

import gc
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch

from persona.console import excerpt
from persona.engine.attention import form_of_model
from persona.engine.flash import BLOCKS
from persona.engine.loss import CAPPED, CHUNK, CHUNK_ON_GPU, LINEAR
from persona.engine.packing import BLOCK_ON_GPU, count_tokens, inputs, plan_packs
from persona.errors import OutOfMemory
from persona.model.device import is_out_of_memory, return_free_memory
from persona.model.render import Example

T = TypeVar("T")
LEAST_TOKENS = 16  # as in persona/config.py


@dataclass(frozen=True)
class Full:
    """The memory was full."""

    reason: str
    """The first words of the library about it."""


def attempt(work: Callable[[], T], device: torch.device) -> T | Full:
    """The result of `work`, or `Full`; then everything that `work` held on `device` is free again."""
    try:
        return work()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        full = Full(excerpt(str(error), 90) or "no memory left")
    # Behind the handler the error is gone, and with it the frames that held the tensors; the rest are cycles.
    gc.collect()
    return_free_memory(device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)  # the peak of a run is that of the passes that fitted
    return full


@dataclass
class Limit:
    """How much is computed at a time; halved when the memory is full."""

    setting: str
    """The setting or option that it begins with."""
    asked: int
    """The value of the setting."""
    size: int
    least: int
    unit: str
    """Words for the size, with {} for the number."""
    advice: str
    """A way out if a single example or reply does not fit."""
    report: Callable[[str], None]

    @property
    def halved(self) -> bool:
        """Whether the setting did not fit."""
        return self.size < self.asked

    def halve(self, full: Full, used: int, alone: str | None) -> None:
        """Halve the size until it is less than `used`, the size of the work that did not fit.

        Raises `OutOfMemory` if a half would be no less work: this was a single piece, with the name `alone`.
        """
        if alone is not None or self.size // 2 < self.least:
            raise OutOfMemory(f"The memory is full ({full.reason}) with {alone or 'the least size'}. {self.advice}")
        half = self.size // 2
        while half >= used and half // 2 >= self.least:
            half //= 2
        self.lower(half, full.reason)

    def halve_pack(self, full: Full, group: Sequence[Example], share: bool) -> None:
        """The same after a pack of `group` did not fit."""
        used = count_tokens(group, share)
        self.halve(full, used, f"a single example of {used} tokens" if len(group) == 1 else None)

    def lower(self, size: int, reason: str) -> None:
        """Take `size` from now on, and say so."""
        self.size = size
        self.report(
            f"  The memory is full ({reason}): going on with {self.unit.format(size)} ({self.setting} is "
            f"{self.asked}). This changes no result but by rounding."
        )


def answer_all(ask: Callable[[list[int], int], None], left: Callable[[], list[int]], limit: Limit, device: Any) -> None:
    """Call `ask(numbers of prompts, how many at a time)` until `left` names no prompt any more."""
    while numbers := left():
        if isinstance(full := attempt(partial(ask, numbers, limit.size), device), Full):
            at_once = min(limit.size, len(numbers))
            limit.halve(full, at_once, "a single reply" if at_once == 1 else None)


def heaviest_pack(model: Any, updates: Iterable[Sequence[Example]], max_tokens: int, share: bool) -> list[Example]:
    """The pack of `updates` that takes the most memory to learn from, on paper; empty if there is none."""
    packs = (pack for examples in updates for pack in plan_packs(examples, max_tokens, share))
    in_blocks = share and form_of_model(model).form == BLOCKS
    return max(packs, key=lambda pack: _kept_numbers(model, pack, share, in_blocks), default=[])


def _kept_numbers(model: Any, group: Sequence[Example], share: bool, in_blocks: bool) -> float:
    """Numbers of 16 bits that exist at a time for a pack, on paper: for its tokens, its logits and its largest block.

    Only the ratios of the three matter, to choose among packs. Other forms of attention than blocks keep no scores.
    """
    words, hidden = model.get_output_embeddings().weight.shape
    config = model.config.get_text_config()
    layers = config.num_hidden_layers
    width = sum(one.in_features + one.out_features for one in model.modules() if hasattr(one, "lora_A")) / layers
    kept = layers * hidden + width if model.is_gradient_checkpointing else layers * width
    learned = sum(len(example.reply_ids) for example in group)
    if config.model_type in LINEAR | CAPPED:  # the loss is computed in chunks
        chunk = CHUNK if model.device.type == "cpu" else CHUNK_ON_GPU
        logits = 3 * learned * hidden + 1.5 * min(learned * words, chunk)
    else:  # in 16 bits, and three copies in float32
        logits = 7 * learned * words
    tokens, scores = count_tokens(group, share), 0.0
    if in_blocks:
        block, longest = min(tokens, BLOCK_ON_GPU), max(len(inputs(example)) for example in group)
        scores = block * (longest + block) * hidden / 64 * 6  # a head of 64 for three copies in float32
    return tokens * kept + logits + scores
