"""The updates of a run from numbers alone: how many there are, what each learns from, and at which rate."""

import math
import random
from collections.abc import Sequence
from functools import lru_cache


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
