"""Examples -> packs: what goes through the model at a time, and the loss of it.

Where the architecture allows it, the examples of an update form a prefix tree: what they have in common, such as the
character's card and the earlier turns of a conversation, is computed once, and every token attends to its ancestors
and itself. Otherwise a pack is rows of one example each. Loss and gradients are the same either way.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from persona.render import Example

# Architectures whose attention takes any mask and whose rotary positions take any numbers, each held to the rows'
# loss and gradients by tests/test_packing.py. The others get one example a row.
SHARING = frozenset({"llama", "mistral", "qwen2", "qwen3"})


@dataclass(frozen=True)
class Pack:
    """Input of one pass through the model, and which of its positions are supervised by which token."""

    input_ids: torch.Tensor  # (rows, length)
    position_ids: torch.Tensor | None  # (rows, length), None where they just count
    mask: torch.Tensor | None  # (1, 1, length, length), True where a token attends; None is plain causal attention
    positions: torch.Tensor  # (supervised,) index into the flattened input: where the logits are
    targets: torch.Tensor  # (supervised,) the token that should come there; a position may have several


def can_share(config: Any, longest: int) -> bool:
    """Whether a model of this configuration may be given prefix trees of up to `longest` positions."""
    # eager attention would add the mask to the scores instead of choosing by it
    if config.model_type not in SHARING or config._attn_implementation != "sdpa":
        return False
    window = getattr(config, "sliding_window", None)
    layers = getattr(config, "layer_types", None)
    slides = "sliding_attention" in layers if layers is not None else window is not None
    return not slides or (window is not None and window >= longest)


def inputs(example: Example) -> tuple[int, ...]:
    """The tokens that the model reads for an example; its last one is only a target."""
    return (*example.prompt_ids, *example.reply_ids[:-1])


def plan_packs(examples: Sequence[Example], max_tokens: int, share: bool) -> list[list[Example]]:
    """Examples grouped so that each pack stays within `max_tokens`; a longer example goes alone.

    The sum of the packs' losses does not depend on the grouping.
    """
    return _plan_trees(examples, max_tokens) if share else _plan_rows(examples, max_tokens)


def _plan_rows(examples: Sequence[Example], max_tokens: int) -> list[list[Example]]:
    groups: list[list[Example]] = []
    # sorted by length, so that the rows of a pack need little filling
    for example in sorted(examples, key=lambda example: len(inputs(example)), reverse=True):
        if groups and (len(groups[-1]) + 1) * len(inputs(groups[-1][0])) <= max_tokens:
            groups[-1].append(example)
        else:
            groups.append([example])
    return groups


def _plan_trees(examples: Sequence[Example], max_tokens: int) -> list[list[Example]]:
    groups: list[list[Example]] = []
    size = 0
    # in sorted order an example shares with its neighbour all that it shares with any example before it
    for example in sorted(examples, key=inputs):
        ids = inputs(example)
        new = len(ids) - (_common(inputs(groups[-1][-1]), ids) if groups else 0)
        if groups and size + new <= max_tokens:
            groups[-1].append(example)
            size += new
        else:
            groups.append([example])
            size = len(ids)
    return groups


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    """Length of the common beginning."""
    limit = min(len(left), len(right))
    return next((i for i in range(limit) if left[i] != right[i]), limit)


def pack(examples: Sequence[Example], device: torch.device, share: bool) -> Pack:
    """One pack of `examples`, in the order of `plan_packs`, on `device`."""
    return _tree(examples, device) if share and len(examples) > 1 else _rows(examples, device)


def _rows(examples: Sequence[Example], device: torch.device) -> Pack:
    # Filled up on the right: with causal attention nothing attends to what stands right of it, so the filling needs no
    # mask and no token of its own.
    width = max(len(inputs(example)) for example in examples)
    rows, positions, targets = [], [], []
    for row, example in enumerate(examples):
        ids = inputs(example)
        rows.append([*ids, *[0] * (width - len(ids))])
        first = row * width + len(example.prompt_ids) - 1
        positions += range(first, first + len(example.reply_ids))
        targets += example.reply_ids
    ids, where, what = (torch.tensor(values, device=device) for values in (rows, positions, targets))
    return Pack(ids, None, None, where, what)


def _tree(examples: Sequence[Example], device: torch.device) -> Pack:
    ids: list[int] = []
    depths: list[int] = []
    positions: list[int] = []
    targets: list[int] = []
    path: list[int] = []  # nodes from the root to the end of the example before
    branches: list[tuple[list[int], int, int]] = []  # shared ancestors, first new node, end of the new nodes
    previous: tuple[int, ...] = ()
    for example in examples:
        tokens = inputs(example)
        shared = _common(previous, tokens)
        begin = len(ids)
        ids += tokens[shared:]
        depths += range(shared, len(tokens))
        path = [*path[:shared], *range(begin, len(ids))]
        branches.append((path[:shared], begin, len(ids)))
        positions += path[len(example.prompt_ids) - 1 :]
        targets += example.reply_ids
        previous = tokens
    mask = torch.zeros(len(ids), len(ids), dtype=torch.bool, device=device)
    for ancestors, begin, end in branches:
        mask[begin:end, ancestors] = True
        mask[begin:end, begin:end] = torch.ones(end - begin, end - begin, dtype=torch.bool, device=device).tril()
    return Pack(
        torch.tensor([ids], device=device),
        torch.tensor([depths], device=device),
        mask[None, None],
        torch.tensor(positions, device=device),
        torch.tensor(targets, device=device),
    )


def supervised_logits(model: Any, packed: Pack) -> torch.Tensor:
    """Logits (supervised, vocabulary) of a pack; the output layer runs on the supervised positions only.

    The positions are picked in front of the output layer, whatever the architecture does behind it (soft caps, scales).
    """
    head = model.get_output_embeddings()
    picked = head.register_forward_pre_hook(
        lambda _, inputs: (inputs[0].flatten(0, 1).index_select(0, packed.positions).unsqueeze(0), *inputs[1:])
    )
    placed = {} if packed.mask is None else {"attention_mask": packed.mask, "position_ids": packed.position_ids}
    try:
        return model(input_ids=packed.input_ids, use_cache=False, **placed).logits[0]
    finally:
        picked.remove()


def negative_log_likelihood(model: Any, packed: Pack) -> torch.Tensor:
    """Sum over the pack's supervised tokens of -ln p(token), in float32."""
    return F.cross_entropy(supervised_logits(model, packed).float(), packed.targets, reduction="sum")
