"""Attention over a prefix tree: every token attends to its ancestors and itself, and to nothing else.

A mask over the whole tree is exact too, but nearly all of it is zeros. On a GPU fused kernels compute it without a mask
(`persona.engine.flash`). Elsewhere, and for what these do not carry, a tree is cut into blocks of neighbouring
branches: a block attends only to the ancestors of its branches, whose keys are taken once for all of them, and to
itself. It consists of matrix products and softmax alone, so the same code runs on every device; the weights are never
kept but computed again in the backward pass, as in FlashAttention (arXiv 2205.14135).
"""

from collections.abc import Sequence
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from persona.engine import flash
from persona.engine.flash import BLOCKS, EFFICIENT, FLASH, Choice, choose, fused_attention
from persona.engine.packing import Block, Tree

NAME = "prefix_tree"
# The same in one form, whatever the device; transformers takes a name with "flash" in it for a library of that name
IN_FORM = {BLOCKS: f"{NAME}_blocks", EFFICIENT: f"{NAME}_efficient", FLASH: f"{NAME}_varlen"}
NAMES = frozenset({NAME, *IN_FORM.values()})
PROOF = 0.02  # largest relative difference that rounding may make between two forms; 0.005 in bfloat16


class NotCarried(RuntimeError):
    """A model asks its attention for more than a prefix tree has."""


def take_over(model: Any) -> Any:
    """`model`, which attends by `NAME` from now on if it is on a GPU and had torch's attention; see `_in_rows`."""
    if model.device.type == "cuda" and model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(NAME)
    return model


def tree_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, tree: Tree, scale: float
) -> torch.Tensor:
    """Attention output (tokens, heads, size) of queries of that shape over keys and values (tokens, groups, size).

    `heads` is a multiple of `groups` (grouped-query attention, arXiv 2305.13245). This is the form of blocks.
    """
    out: Any = _TreeAttention.apply(query, key, value, tree.blocks, scale)
    return out


class _TreeAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, blocks: Sequence[Block], scale: float
    ) -> torch.Tensor:
        keys, values = (x.transpose(0, 1).contiguous() for x in (key, value))
        ctx.save_for_backward(query, keys, values)
        ctx.blocks, ctx.scale = blocks, scale
        return _forward(query, keys, values, blocks, scale)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        query, keys, values = ctx.saved_tensors
        return *_backward(grads[0], query, keys, values, ctx.blocks, ctx.scale), None, None


def _forward(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, blocks: Sequence[Block], scale: float
) -> torch.Tensor:
    """The output for keys and values (groups, tokens, size)."""
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    for block in blocks:
        weights = _weights(_rows(query, block, len(keys)), _sources(keys, block), block, scale)
        _put(out, block, weights.to(query.dtype) @ _sources(values, block))
    return out


def _backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    blocks: Sequence[Block],
    scale: float,
) -> tuple[torch.Tensor, ...]:
    """The gradients of query, key and value, the last two (tokens, groups, size)."""
    grad_query = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    # float32, since a token's gradient is the sum over all that attend to it
    grad_keys, grad_values = (torch.zeros(keys.shape, dtype=torch.float32, device=keys.device) for _ in range(2))
    for block in blocks:
        rows, received = (_rows(x, block, len(keys)) for x in (query, grad))
        block_keys, block_values = (_sources(x, block) for x in (keys, values))
        weights = _weights(rows, block_keys, block, scale).to(query.dtype)
        _add_to_sources(grad_values, block, weights.transpose(1, 2) @ received)
        through = _products(received, block_values, scale)
        through = torch.ops.aten._softmax_backward_data(through, weights, -1, weights.dtype)
        _put(grad_query, block, through @ block_keys)
        _add_to_sources(grad_keys, block, through.transpose(1, 2) @ rows)
    return grad_query, *(x.transpose(0, 1).to(keys.dtype) for x in (grad_keys, grad_values))


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


def form_of(device: torch.device, dtype: torch.dtype, heads: int, groups: int, size: int) -> Choice:
    """The form of attention over trees for heads of `size` and `dtype` on `device`, a fused one tried beforehand."""
    if device.type != "cuda" or torch.version.hip:  # AMD's kernels lay out their log-sum-exp otherwise
        return choose("ROCm" if device.type == "cuda" else device.type, (0, 0), False, dtype, size)
    capability = torch.cuda.get_device_capability(device)
    faults = []
    for has_flash in dict.fromkeys((torch.backends.cuda.is_flash_attention_available(), False)):
        choice = choose("cuda", capability, has_flash, dtype, size)
        if choice.form == BLOCKS or (fault := _fault(choice.form, device, dtype, heads, groups, size)) is None:
            return choice
        faults.append(f"{choice.form} attention {fault}")
    return Choice(BLOCKS, " and ".join(faults))


def form_of_model(model: Any) -> Choice:
    """The form in which `model` attends over trees."""
    config = model.config.get_text_config()
    if (name := model.config._attn_implementation) != NAME:
        form = next((form for form, value in IN_FORM.items() if value == name), BLOCKS)
        return Choice(form, "another form failed the trial before the first update")
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return form_of(model.device, model.dtype, heads, config.num_key_value_heads, size)


@cache
def _fault(form: str, device: torch.device, dtype: torch.dtype, heads: int, groups: int, size: int) -> str | None:
    """The fault of a fused form on `device` in a small tree with two branches; None if it has none."""
    stem = range(40)
    tree = Tree([((), 0, 40), (stem, 40, 75), (stem, 75, 90)], device, 64)
    chance = torch.Generator().manual_seed(0)
    query, key, value, grad = (
        torch.randn(90, n, size, generator=chance).to(device, dtype) for n in (heads, groups, groups, heads)
    )
    scale = size**-0.5
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        keys, values = (x.transpose(0, 1).contiguous() for x in (key, value))
        right = [_forward(query, keys, values, tree.blocks, scale)]
        right += _backward(grad, query, keys, values, tree.blocks, scale)
        try:
            out, lse = flash.forward(query, key, value, tree.calls, scale, form)
            results = [out, *flash.backward(grad, query, key, value, out, lse, tree.calls, scale, form)]
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, AttributeError, TypeError) as error:  # not built in, not for this GPU, of another torch
            return f"failed: {str(error).splitlines()[0]}"
    apart = max(float((a.float() - b.float()).norm() / b.float().norm()) for a, b in zip(results, right, strict=True))
    return None if apart <= PROOF else f"was {apart:.1%} off"


def _attend(
    form: str | None,
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    tree: Tree | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **rest: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of `module` over a tree in `form`, or the one for its device if None; without a tree, in rows."""
    if tree is None:
        if attention_mask is not None and attention_mask.shape == (1, 1, 1, 1) and query.shape[2] > 1:
            raise NotCarried("its layers do not hand the prefix tree on to their attention")
        return _in_rows(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **rest)
    _refuse(tree, key, value, rest | {"dropout": dropout or None})
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    query, key, value = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    if form is None:
        form = _form(query, key, value).form
    if form == BLOCKS:
        return tree_attention(query, key, value, tree, scale).unsqueeze(0), None
    return fused_attention(query, key, value, tree.calls, scale, form).unsqueeze(0), None


def _form(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Choice:
    if not query.dtype == key.dtype == value.dtype:
        return Choice(BLOCKS, "queries, keys and values differ in precision")
    return form_of(query.device, query.dtype, query.shape[1], key.shape[1], query.shape[2])


def _refuse(tree: Tree, key: torch.Tensor, value: torch.Tensor, options: dict[str, Any]) -> None:
    """Raise `NotCarried` for what would change the result and is not part of attention over a tree."""
    if (window := options.get("sliding_window")) is not None and window < tree.longest:
        raise NotCarried(f"its attention reaches back only {window} tokens, and an example has {tree.longest}")
    for name in ("softcap", "s_aux", "sinks", "position_bias", "dropout", "cache"):
        if options.get(name) is not None:
            raise NotCarried(f"its attention uses {name}, which attention over prefix trees does not carry")
    if key.shape != value.shape:
        raise NotCarried(f"its values have another size than its keys: {value.shape[-1]}, not {key.shape[-1]}")


def _in_rows(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, **rest: Any
) -> tuple[torch.Tensor, None]:
    """Scaled-dot-product attention, such as in generation, with the masks that belong to it."""
    groups = query.shape[1] // key.shape[1]
    if query.device.type == "cuda" and mask is None and groups > 1 and query.shape[2] > 1:
        choice = _form(*(x[0].transpose(0, 1) for x in (query, key, value)))
        if choice.form != FLASH:
            # transformers leaves groups to torch, where only FlashAttention knows them; the plain formula that torch
            # would take keeps the scores of all pairs in float32. A module without groups is repeated no further.
            module = SimpleNamespace(is_causal=getattr(module, "is_causal", True))
            key, value = (repeat_kv(x, groups) for x in (key, value))
    return sdpa_attention_forward(module, query, key, value, mask, **rest)


for _form_name, _name in ((None, NAME), *IN_FORM.items()):
    AttentionInterface.register(_name, partial(_attend, _form_name))
    AttentionMaskInterface.register(_name, sdpa_mask)
