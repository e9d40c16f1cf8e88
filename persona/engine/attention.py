"""Attention over a prefix tree: every token attends to its ancestors and itself, and to nothing else.

A mask over the whole tree is exact too, but nearly all of it is zeros. On a GPU fused kernels compute it without a mask
(`persona.engine.flash`). Elsewhere, and for what these do not carry, a tree is cut into blocks of neighbouring
branches: a block attends only to the ancestors of its branches, whose keys are taken once for all of them, and to
itself. It consists of matrix products and softmax alone, so the same code runs on every device; the weights are never
kept but computed again in the backward pass, as in FlashAttention (arXiv 2205.14135). Blocks carry windows, soft caps,
sinks, and values of another size than the keys. No weights of a tree are dropped at random, whatever the configuration
says: a token's attention is computed once for all examples that share it. Anything else that a model asks of its
attention is refused.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from persona.engine import flash
from persona.engine.flash import BLOCKS, EFFICIENT, FLASH, Choice, Passed, choose, fused_attention
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
        attend_by(model, NAME)
    return model


def attend_by(model: Any, name: str) -> None:
    """Let the text of `model` be attended to by `name`; its towers keep theirs, which may be the only one they have."""
    text, config = model.config.get_text_config(), model.config
    own = [part for part in config.sub_configs if getattr(config, part) is text]
    model.set_attn_implementation(dict.fromkeys(["", *own], name))


@dataclass(frozen=True)
class Softmax:
    """How weights are made of the products of queries and keys."""

    scale: float
    cap: float | None = None
    """The bound of a tanh on the scores (Gemma 2, arXiv 2408.00118)."""
    sinks: torch.Tensor | None = None
    """(heads,) scores of a key without a value, which takes its part of the weights (gpt-oss)."""


def tree_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    tree: Tree,
    softmax: Softmax,
    window: int | None = None,
) -> torch.Tensor:
    """Attention output (tokens, heads, value size) of queries (tokens, heads, size) over keys and values of groups.

    `heads` is a multiple of the groups (grouped-query attention, arXiv 2305.13245). This is the form of blocks. A token
    attends to its last `window` ancestors, itself included.
    """
    out: Any = _TreeAttention.apply(query, key, value, tree.blocks_within(window), softmax)
    return out


class _TreeAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, blocks: Sequence[Block], softmax: Softmax
    ) -> torch.Tensor:
        keys, values = (x.transpose(0, 1).contiguous() for x in (key, value))
        ctx.save_for_backward(query, keys, values)
        ctx.blocks, ctx.softmax = blocks, softmax
        return _forward(query, keys, values, blocks, softmax)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        query, keys, values = ctx.saved_tensors
        return *_backward(grads[0], query, keys, values, ctx.blocks, ctx.softmax), None, None


def _forward(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, blocks: Sequence[Block], softmax: Softmax
) -> torch.Tensor:
    """The output for keys and values (groups, tokens, size)."""
    out = torch.empty(*query.shape[:2], values.shape[2], dtype=query.dtype, device=query.device)
    for block in blocks:
        scores = _scores(_rows(query, block, len(keys)), _sources(keys, block), softmax)
        _put(out, block, _weights(scores, block, softmax).to(query.dtype) @ _sources(values, block))
    return out


def _backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    blocks: Sequence[Block],
    softmax: Softmax,
) -> tuple[torch.Tensor, ...]:
    """The gradients of query, key and value, the last two (tokens, groups, size)."""
    grad_query = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    # float32, since a token's gradient is the sum over all that attend to it
    grad_keys, grad_values = (torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in (keys, values))
    for block in blocks:
        rows, received = (_rows(x, block, len(keys)) for x in (query, grad))
        block_keys, block_values = (_sources(x, block) for x in (keys, values))
        scores = _scores(rows, block_keys, softmax)
        slope = None if softmax.cap is None else (scores / softmax.cap).square_().neg_().add_(1)
        weights = _weights(scores, block, softmax).to(query.dtype)
        _add_to_sources(grad_values, block, weights.transpose(1, 2) @ received)
        through = _products(received, block_values, softmax.scale)
        # right for sinks too: what they take of the weights is multiplied by their gradient, which is zero
        through = torch.ops.aten._softmax_backward_data(through, weights, -1, weights.dtype)
        if slope is not None:
            through.mul_(slope)
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


def _scores(rows: torch.Tensor, keys: torch.Tensor, softmax: Softmax) -> torch.Tensor:
    """Scores (groups, heads / groups x tokens, sources' tokens) in float32.

    16 bits are not enough: with the large biases of Qwen2's keys they cost 0.9 in perplexity (transformers #33317).
    """
    with torch.autocast(rows.device.type, enabled=False):  # autocast turns a product of float32 into one of 16 bits
        scores = _products(rows.float(), keys.float(), softmax.scale)
    return scores if softmax.cap is None else scores.div_(softmax.cap).tanh_() * softmax.cap


def _weights(scores: torch.Tensor, block: Block, softmax: Softmax) -> torch.Tensor:
    """Attention weights of a block in float32, of its `scores`, which it changes."""
    tokens, last = block.bias.shape
    scores[..., scores.shape[2] - last :].unflatten(1, (-1, tokens)).add_(block.bias)  # masked_fill_ takes 8 times that
    if softmax.sinks is None:
        return torch.softmax(scores, -1)
    return _with_sinks(scores, softmax.sinks.unflatten(0, (len(scores), -1)).repeat_interleave(tokens, 1))


def _with_sinks(scores: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
    """The softmax of `scores` (..., rows, keys) and a score (..., rows) more in each row, without the weight of it."""
    return torch.softmax(torch.cat([scores, sinks.to(scores.dtype)[..., None]], -1), -1)[..., :-1].contiguous()


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
    if (name := model.config._attn_implementation) != NAME:
        form = next((form for form, value in IN_FORM.items() if value == name), BLOCKS)
        return Choice(form, "another form failed the trial before the first update")
    text = model.config.get_text_config()
    if (reason := beyond_kernels(text)) is not None:
        return Choice(BLOCKS, reason)
    layer = widest_layer(text)
    choice = form_of(model.device, model.dtype, layer.num_attention_heads, layer.num_key_value_heads, head_size(layer))
    if choice.form == BLOCKS or not getattr(text, "sliding_window", None):
        return choice
    return Choice(choice.form, f"{choice.reason}; {BLOCKS} in layers whose window is shorter than an example")


def beyond_kernels(text: Any) -> str | None:
    """Why a model of this configuration cannot attend by fused kernels, or None."""
    if getattr(text, "attn_logit_softcapping", None):
        return "fused kernels have no soft cap"
    if text.model_type == "gpt_oss":
        return "fused kernels have no sinks"
    if (size := getattr(text, "v_head_dim", None)) and size != text.qk_nope_head_dim + text.qk_rope_head_dim:
        return "fused kernels have no values of another size than the keys"
    return None


def widest_layer(text: Any) -> Any:
    """The configuration of the layer with the largest heads; most models have one for all layers."""
    return max(text.per_layer_config or [text], key=head_size)


def head_size(layer: Any) -> int:
    """The numbers of a head in a layer of this configuration."""
    if getattr(layer, "kv_lora_rank", None):
        return layer.v_head_dim
    return getattr(layer, "head_dim", None) or layer.hidden_size // layer.num_attention_heads


@cache
def _fault(form: str, device: torch.device, dtype: torch.dtype, heads: int, groups: int, size: int) -> str | None:
    """The fault of a fused form on `device` in a small tree with two branches; None if it has none."""
    stem = range(40)
    tree = Tree([((), 0, 40), (stem, 40, 75), (stem, 75, 90)], device, 64)
    chance = torch.Generator().manual_seed(0)
    query, key, value, grad = (
        torch.randn(90, n, size, generator=chance).to(device, dtype) for n in (heads, groups, groups, heads)
    )
    scale, softmax = size**-0.5, Softmax(size**-0.5)
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        keys, values = (x.transpose(0, 1).contiguous() for x in (key, value))
        right = [_forward(query, keys, values, tree.blocks, softmax)]
        right += _backward(grad, query, keys, values, tree.blocks, softmax)
        try:
            out, lse = flash.forward(query, key, value, tree.calls, scale, form)
            results = [out, *flash.backward(Passed(grad, query, key, value, out, lse), tree.calls, scale, form)]
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, AttributeError, TypeError) as error:  # not built in, not for this GPU, of another torch
            return f"failed: {str(error).splitlines()[0]}"
    apart = max(float((a.float() - b.float()).norm() / b.float().norm()) for a, b in zip(results, right, strict=True))
    return None if apart <= PROOF else f"was {apart:.1%} off"


# Changes nothing over a tree: the tree has the positions, and the others say which outputs are kept
_NEEDLESS = frozenset({"position_ids", "cache_position", "use_cache", "output_attentions", "output_hidden_states"})


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
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **rest: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of `module` over a tree in `form`, or the one for its device if None; without a tree, in rows."""
    softmax = Softmax(query.shape[3] ** -0.5 if scaling is None else scaling, softcap, s_aux)
    if tree is None:
        if attention_mask is not None and attention_mask.shape == (1, 1, 1, 1) and query.shape[2] > 1:
            raise NotCarried("its layers do not hand the prefix tree on to their attention")
        if softcap is not None or s_aux is not None:  # the mask has the window
            _refuse(module, rest | {"dropout": dropout or None})
            return plain_attention(query, key, value, attention_mask, softmax).transpose(1, 2), None
        return _in_rows(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **rest)
    _refuse(module, rest | {"trained sinks": s_aux is not None and s_aux.requires_grad})
    window = sliding_window if sliding_window is not None and sliding_window < tree.longest else None
    query, key, value = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    if form != BLOCKS and _beyond_kernels(key, value, softmax, window):
        form = BLOCKS
    if form is None:
        form = _form(query, key, value).form
    if form == BLOCKS:
        return tree_attention(query, key, value, tree, softmax, window).unsqueeze(0), None
    return fused_attention(query, key, value, tree.calls, softmax.scale, form).unsqueeze(0), None


def _form(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Choice:
    if not query.dtype == key.dtype == value.dtype:
        return Choice(BLOCKS, "queries, keys and values differ in precision")
    return form_of(query.device, query.dtype, query.shape[1], key.shape[1], query.shape[2])


def _beyond_kernels(key: torch.Tensor, value: torch.Tensor, softmax: Softmax, window: int | None) -> bool:
    """Whether the fused kernels do not carry this attention, and the blocks have to."""
    return not (key.shape == value.shape and softmax.cap is None and softmax.sinks is None and window is None)


def _refuse(module: Any, options: dict[str, Any]) -> None:
    """Raise `NotCarried` for anything that may change the result and is not part of this attention."""
    if not getattr(module, "is_causal", True):
        raise NotCarried("its attention reads the text in both directions")
    for name, value in options.items():
        if name not in _NEEDLESS and value is not None and value is not False:
            raise NotCarried(f"its attention uses {name}, which attention over prefix trees does not carry")


def plain_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, softmax: Softmax
) -> torch.Tensor:
    """Attention output (rows, heads, tokens, size) with soft cap and sinks, which torch's own has not.

    `mask` is True where a token attends; None is causal.
    """
    key, value = (repeat_kv(x, query.shape[1] // x.shape[1]) for x in (key, value))
    tokens, keys = query.shape[2], key.shape[2]
    if mask is None:
        mask = torch.ones(tokens, keys, dtype=torch.bool, device=query.device).tril(keys - tokens)
    scores = _scores(query.flatten(0, 1), key.flatten(0, 1), softmax).unflatten(0, query.shape[:2])
    # as torch's own: a query of the padding attends to nothing, and its output is no number that anyone reads
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    sinks = None if softmax.sinks is None else softmax.sinks[:, None].expand(scores.shape[:3])
    weights = torch.softmax(scores, -1) if sinks is None else _with_sinks(scores, sinks)
    return weights.to(query.dtype) @ value


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
