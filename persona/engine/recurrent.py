"""Layers that carry a state from token to token, over a prefix tree: a branch goes on from the state of its beginning.

Gated DeltaNet (arXiv 2412.06464; Qwen3-Next and Qwen3.5) calls two functions of its module in transformers, a short
convolution (LFM2) one, with all that the model was handed, so with the tree too. They are replaced there by functions
that compute trees, and rows as before. The delta rule is computed in chunks, as transformers does (arXiv 2406.06484):
what happens inside a chunk depends on no state, and is computed for all chunks of the tree at once; then the states go
down the tree, those of all chunks of one level at a time.
"""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, wraps
from typing import Any

import torch
import torch.nn.functional as F
from transformers.activations import ACT2FN

from persona.engine.packing import Tree, to_device

# Types of models, and the functions of their module in transformers that carry something from token to token
_BOTH = ("causal_conv1d_fn", "torch_chunk_gated_delta_rule")
CARRYING = {"lfm2": _BOTH[:1], "qwen3_5_moe_text": _BOTH, "qwen3_5_text": _BOTH, "qwen3_next": _BOTH}
CHUNK = 64  # tokens, as in transformers and in flash-linear-attention
EPSILON = 1e-6  # in the norm of queries and keys, as in transformers


@cache
def carry_over_trees(kind: str) -> None:
    """Let the layers of models of the type `kind`, of CARRYING, compute prefix trees too."""
    family = kind.removesuffix("_text")
    module: Any = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    for name, over_tree in zip(CARRYING[kind], (_convolution, _delta_rule), strict=False):
        setattr(module, name, _either(getattr(module, name), over_tree))


def _either(over_rows: Callable[..., Any], over_tree: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(over_rows)
    def chosen(*args: Any, tree: Tree | None = None, **options: Any) -> Any:
        return over_rows(*args, **options) if tree is None else over_tree(*args, tree=tree, **options)

    return chosen


def _convolution(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    *,
    tree: Tree,
    **_rest: Any,
) -> torch.Tensor:
    """The causal convolution of `x` (1, channels, tokens) with `weight` (channels, kernel), in the layout of `x`."""
    rows, kept = tree.once(_with_context, weight.shape[1] - 1)
    wide = F.pad(x.to(weight.dtype), (0, 1)).index_select(2, rows)
    out = F.conv1d(wide, weight[:, None], bias, groups=len(weight)).index_select(2, kept)
    return (out if activation is None else ACT2FN[activation](out)).to(x.dtype)


def _delta_rule(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    g: torch.Tensor,
    beta: torch.Tensor,
    tree: Tree,
    **_rest: Any,
) -> tuple[torch.Tensor, None]:
    """The output (1, tokens, heads, value size) for queries and keys (1, tokens, key heads, size), values, the
    logarithms of decay `g` and rates `beta` (1, tokens, heads).

    Values of a head have the queries and keys of its group. Everything is computed in float32.
    """
    chunks, heads = tree.once(_cut), value.shape[2]

    def cut(x: torch.Tensor) -> torch.Tensor:
        """`x` (1, tokens, heads, ...) as (chunks, heads, CHUNK, ...), zeros behind the tokens of a chunk."""
        padded = F.pad(x[0].float(), (*[0, 0] * (x.ndim - 2), 0, 1))
        return padded[chunks.rows].transpose(1, 2)

    with torch.autocast(query.device.type, enabled=False):
        query, key = (_unit(x.float()).repeat_interleave(heads // x.shape[2], 2) for x in (query, key))
        # in float32 a sum of strong decays would cost the differences four of their seven digits
        decay = cut(g).double().cumsum(2)
        out = _scan(cut(query) * query.shape[3] ** -0.5, cut(key), cut(value), decay, cut(beta), chunks)
    return out.transpose(1, 2).flatten(0, 1).index_select(0, chunks.places)[None].to(value.dtype), None


def _unit(x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + EPSILON)


@dataclass(frozen=True)
class Chunks:
    """The nodes of a tree in chunks, those of one level together: one is as many chunks below the root as its level."""

    rows: torch.Tensor
    """(chunks, CHUNK) the tokens of each chunk; the number of all tokens where it has none."""
    places: torch.Tensor
    """(tokens,) where each token is among the flattened `rows`."""
    above: list[torch.Tensor]
    """For each level, (chunks of the level,) the places of their parents in the level before."""


def _scan(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    decay: torch.Tensor,
    beta: torch.Tensor,
    chunks: Chunks,
) -> torch.Tensor:
    """The output (chunks, heads, CHUNK, value size); `decay` is the logarithm of all since the chunk's beginning."""
    ahead = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=query.device).triu(1)
    between = (decay[..., :, None] - decay[..., None, :]).float().masked_fill(ahead, float("-inf")).exp()
    since, until = decay.float().exp()[..., None], (decay[..., -1:] - decay).float().exp()[..., None]
    rated = key * beta[..., None]
    inside = (query @ key.transpose(2, 3)) * between
    # what the tokens of a chunk write, and what they take off of the state before, with all before them in the chunk
    written = torch.cat([value * beta[..., None], rated * since], -1)
    system = (rated @ key.transpose(2, 3)) * between
    solved = torch.linalg.solve_triangular(system, written, upper=False, unitriangular=True)
    written, taken = solved.split([value.shape[3], key.shape[3]], -1)
    query, key, whole = query * since, (key * until).transpose(2, 3), since[:, :, -1:]
    state = query.new_zeros(1, query.shape[1], query.shape[3], value.shape[3])
    levels = zip(*(x.split([len(one) for one in chunks.above]) for x in (query, key, inside, written, taken, whole)),
                 chunks.above, strict=True)  # fmt: skip
    out = []
    for reading, writing, attending, new, old, left, above in levels:
        state = state.index_select(0, above)
        new = new - old @ state
        out.append(reading @ state + attending @ new)
        state = state * left + writing @ new
    return torch.cat(out)


def _cut(tree: Tree) -> Chunks:
    nodes, parents = tree.nodes
    tokens, levels = nodes[-1][1], list[list[tuple[int, int, int]]]()  # begin, end, place of the parent
    last: list[tuple[int, int]] = []  # of each node, level and place of its last chunk
    for (begin, end), parent in zip(nodes, parents, strict=True):
        level, place = (-1, 0) if parent is None else last[parent]
        for start in range(begin, end, CHUNK):
            level += 1
            levels += [[]] if level == len(levels) else []
            levels[level].append((start, min(start + CHUNK, end), place))
            place = len(levels[level]) - 1
        last.append((level, place))
    rows, places = list[int](), [0] * tokens
    for begin, end, _ in (chunk for level in levels for chunk in level):
        places[begin:end] = range(len(rows), len(rows) + end - begin)
        rows += [*range(begin, end), *[tokens] * (CHUNK - (end - begin))]
    columns = [rows, places, *([above for _, _, above in level] for level in levels)]
    laid_out, found, *above = to_device(tree.device, columns, torch.long)
    return Chunks(laid_out.view(-1, CHUNK), found, above)


def _with_context(tree: Tree, size: int) -> Sequence[torch.Tensor]:
    """The tokens of a pack, each stretch behind its last `size` ancestors, and where the pack's tokens are kept.

    The second counts from the first token with `size` tokens before it; a beginning has none, the number of all tokens.
    """
    rows, kept = list[int](), list[int]()
    tokens = tree.segments[-1][2]
    for ancestors, begin, end in tree.segments:
        before = ancestors[len(ancestors) - min(size, len(ancestors)) :]
        kept += range(len(rows), len(rows) + end - begin)
        rows += [*[tokens] * (size - len(before)), *before, *range(begin, end)]
    return to_device(tree.device, [rows, kept], torch.long)
