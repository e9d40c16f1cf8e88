"""What stands behind every weight update, as a pure function of seed and counts: resuming is just continuing."""

import math
import random
from collections.abc import Sequence
from functools import lru_cache


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
