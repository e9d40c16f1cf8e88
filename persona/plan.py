"""What stands behind every weight update, as a pure function of seed and counts: resuming is just continuing."""

import math
import random
from collections.abc import Sequence
from itertools import accumulate

from persona.render import Example


def updates_per_epoch(conversations: int, train_batch_size: int) -> int:
    """Weight updates in one pass; the last one of a pass may be smaller."""
    return math.ceil(conversations / train_batch_size)


def total_updates(conversations: int, train_batch_size: int, epochs: float) -> int:
    """Weight updates of the whole run; part of an epoch counts by the updates it fills, at least one."""
    return max(1, round(epochs * updates_per_epoch(conversations, train_batch_size)))


def conversations_of(update: int, conversations: int, train_batch_size: int, seed: int) -> Sequence[int]:
    """Indices of the conversations behind weight update number `update`, counted from 0."""
    epoch, place = divmod(update, updates_per_epoch(conversations, train_batch_size))
    order = list(range(conversations))
    random.Random(f"order {seed} {epoch}").shuffle(order)
    return order[place * train_batch_size : (place + 1) * train_batch_size]


def portion(examples: Sequence[Example], rank: int, count: int, share: bool) -> Sequence[Example]:
    """The examples that process `rank` of `count` computes; none, where there are fewer examples than processes.

    Those that begin alike stay together, and each process gets about as many tokens; with `share`, tokens that an
    example has in common with its neighbour count once.
    """
    if count == 1:
        return examples
    ordered = sorted(examples, key=_tokens)
    costs = [1 + len(_tokens(example)) for example in ordered]
    if share and ordered:
        # what all have in common costs every process the same; it is taken off the first one
        costs[0] -= _common(_tokens(ordered[0]), _tokens(ordered[-1]))
        for place in range(1, len(ordered)):
            costs[place] -= _common(_tokens(ordered[place - 1]), _tokens(ordered[place]))
    ends = list(accumulate(costs))
    owners = [int((end - cost / 2) * count / ends[-1]) for end, cost in zip(ends, costs, strict=True)]
    return [example for example, owner in zip(ordered, owners, strict=True) if owner == rank]


def _tokens(example: Example) -> tuple[int, ...]:
    return (*example.prompt_ids, *example.reply_ids)


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    """Length of the common beginning."""
    limit = min(len(left), len(right))
    return next((i for i in range(limit) if left[i] != right[i]), limit)
