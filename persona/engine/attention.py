"""Attention over a prefix tree: every token attends to its ancestors and itself, and to nothing else.

A mask over the whole tree is exact too, but nearly all of it is zeros. Here a tree is cut into blocks of neighbouring
branches, and a block attends only to the ancestors of its branches, whose keys are taken once for all of them, and to
itself. It consists of matrix products and softmax alone, so the same code runs on every device; the weights are never
kept but computed again in the backward pass, as in FlashAttention (arXiv 2205.14135).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

NAME = "prefix_tree"


@dataclass(frozen=True)
class Block:
    """Tokens begin..end of a pack, and the tokens they attend to."""

    begin: int
    end: int
    sources: Sequence[tuple[int, int]]
    """Stretches of the pack that some of the block's tokens attend to; the last is the block itself."""
    bias: torch.Tensor
    """(tokens, last of the sources' tokens) float32, added to the scores: 0 where a token attends, else -inf; to the
    sources' tokens before these, all attend."""


Tree = Sequence[Block]


def tree_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, tree: Tree, scale: float
) -> torch.Tensor:
    """Attention output (tokens, heads, size) of queries of that shape over keys and values (tokens, groups, size).

    `heads` is a multiple of `groups` (grouped-query attention, arXiv 2305.13245).
    """
    out: Any = _TreeAttention.apply(query, key, value, tree, scale)
    return out


class _TreeAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, tree: Tree, scale: float
    ) -> torch.Tensor:
        keys, values = (x.transpose(0, 1).contiguous() for x in (key, value))
        ctx.save_for_backward(query, keys, values)
        ctx.tree, ctx.scale = tree, scale
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        for block in tree:
            weights = _weights(_rows(query, block, len(keys)), _sources(keys, block), block, scale)
            _put(out, block, weights.to(query.dtype) @ _sources(values, block))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        query, keys, values = ctx.saved_tensors
        grad_query = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        # float32, since a token's gradient is the sum over all that attend to it
        grad_keys, grad_values = (torch.zeros(keys.shape, dtype=torch.float32, device=keys.device) for _ in range(2))
        for block in ctx.tree:
            rows, received = (_rows(x, block, len(keys)) for x in (query, grads[0]))
            block_keys, block_values = (_sources(x, block) for x in (keys, values))
            weights = _weights(rows, block_keys, block, ctx.scale).to(query.dtype)
            _add_to_sources(grad_values, block, weights.transpose(1, 2) @ received)
            through = _products(received, block_values, ctx.scale)
            through = torch.ops.aten._softmax_backward_data(through, weights, -1, weights.dtype)
            _put(grad_query, block, through @ block_keys)
            _add_to_sources(grad_keys, block, through.transpose(1, 2) @ rows)
        return grad_query, *(x.transpose(0, 1).to(keys.dtype) for x in (grad_keys, grad_values)), None, None


def _rows(x: torch.Tensor, block: Block, groups: int) -> torch.Tensor:
    """The block's part of `x` (tokens, heads, size) as (groups, heads / groups x tokens, size)."""
    return x[block.begin : block.end].unflatten(1, (groups, -1)).permute(1, 2, 0, 3).flatten(1, 2)


def _put(into: torch.Tensor, block: Block, rows: torch.Tensor) -> None:
    """The reverse of `_rows`."""
    place = into[block.begin : block.end].unflatten(1, (len(rows), -1))
    place.copy_(rows.unflatten(1, (-1, block.end - block.begin)).permute(2, 0, 1, 3))


def _sources(x: torch.Tensor, block: Block) -> torch.Tensor:
    return torch.cat([x[:, begin:end] for begin, end in block.sources], 1)


def _add_to_sources(into: torch.Tensor, block: Block, values: torch.Tensor) -> None:
    start = 0
    for begin, end in block.sources:
        into[:, begin:end] += values[:, start : start + end - begin]
        start += end - begin


def _products(rows: torch.Tensor, keys: torch.Tensor, scale: float) -> torch.Tensor:
    return torch.baddbmm(rows.new_empty(1, 1, 1), rows, keys.transpose(1, 2), beta=0, alpha=scale)


def _weights(rows: torch.Tensor, keys: torch.Tensor, block: Block, scale: float) -> torch.Tensor:
    """Attention weights (groups, heads / groups x tokens, sources' tokens) in float32.

    Scores of 16 bits are not enough: with the large biases of Qwen2's keys they cost 0.9 in perplexity (transformers
    #33317).
    """
    with torch.autocast(rows.device.type, enabled=False):  # autocast turns a product of float32 into one of 16 bits
        scores = _products(rows.float(), keys.float(), scale)
    tokens, last = block.bias.shape
    scores[..., scores.shape[2] - last :].unflatten(1, (-1, tokens)).add_(block.bias)  # masked_fill_ takes 8 times that
    return torch.softmax(scores, -1)


def _attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    tree: Tree | None = None,
    scaling: float | None = None,
    **rest: Any,
) -> tuple[torch.Tensor, None]:
    if tree is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **rest)
    query, key, value = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    out = tree_attention(query, key, value, tree, query.shape[2] ** -0.5 if scaling is None else scaling)
    return out.unsqueeze(0), None


# Without a tree, such as in generation, it is scaled-dot-product attention with the masks that belong to it.
AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
