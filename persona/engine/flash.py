"""Attention over a prefix tree by fused kernels: exact, without a mask, and without scores in memory.

The calls of a tree (`persona.engine.packing`) are put together by their log-sum-exp. In the backward pass each call
gets the output and the log-sum-exp of all of them, from which the kernel computes exactly that call's share, as in ring
attention (arXiv 2310.01889). The kernels are FlashAttention 2 (arXiv 2307.08691) and memory-efficient attention (arXiv
2112.05682), both part of torch. The blocks of `persona.engine.attention` compute what `choose` refuses.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from persona.engine.packing import Call, Side, padded

FLASH, EFFICIENT, BLOCKS = "flash", "efficient", "blocks"


@dataclass(frozen=True)
class Choice:
    """A form of attention over a tree, and why it is this one."""

    form: str
    reason: str


def choose(kind: str, capability: tuple[int, int], has_flash: bool, dtype: torch.dtype, size: int) -> Choice:
    """The form for heads of `size` and `dtype` on a device of that kind (`cuda`) and compute capability.

    `has_flash` says whether torch is built with FlashAttention, which it is not on Windows.
    """
    gpu = f"compute capability {capability[0]}.{capability[1]}"
    if kind != "cuda":
        return Choice(BLOCKS, f"fused kernels are for CUDA, and this is {kind}")
    if dtype not in (torch.float16, torch.bfloat16):
        return Choice(BLOCKS, f"fused kernels are for 16 bits, and this is {str(dtype).removeprefix('torch.')}")
    if size % 8 or size > 256:
        return Choice(BLOCKS, f"fused kernels are for heads of up to 256 in steps of 8, and these have {size}")
    if capability < (7, 5) or (dtype is torch.bfloat16 and capability < (8, 0)):
        return Choice(BLOCKS, f"{gpu} has no fused kernels for {str(dtype).removeprefix('torch.')}")
    if not has_flash:
        return Choice(EFFICIENT, "this torch is built without FlashAttention")
    if capability < (8, 0):
        return Choice(EFFICIENT, f"FlashAttention needs compute capability 8.0, and this is {gpu}")
    if 192 < size <= 224:  # its backward pass fails on 8.6, 8.9, 12.0 and 12.1 (torch's sdp_utils.cpp)
        return Choice(EFFICIENT, f"FlashAttention does not train heads of {size} on every GPU")
    return Choice(FLASH, f"FlashAttention is built in, and {gpu} has it")


def fused_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, calls: Sequence[Call], scale: float, form: str
) -> torch.Tensor:
    """Attention output (tokens, heads, size) of queries of that shape over keys and values (tokens, groups, size)."""
    out: Any = _Fused.apply(query, key, value, calls, scale, form)
    return out


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        calls: Sequence[Call],
        scale: float,
        form: str,
    ) -> torch.Tensor:
        out, lse = forward(query, key, value, calls, scale, form)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.rest = calls, scale, form
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return *backward(Passed(grads[0], *ctx.saved_tensors), *ctx.rest), None, None, None


def forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, calls: Sequence[Call], scale: float, form: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output (tokens, heads, size) of all `calls`, and log-sum-exp (heads, tokens) in float32."""
    run, _ = _KERNELS[form]
    out, lse = run(query, key, value, calls[0], scale)
    for call in calls[1:]:
        rows = call.queries.rows
        part, weight = run(*_of(call, query, key, value), call, scale)
        before, known = _take(out, rows), _take(lse, rows, 1)
        # what each has of the softmax's sum; float32 until the result is rounded
        old, new = (torch.sigmoid(x).T[..., None] for x in (known - weight, weight - known))
        if isinstance(rows, slice):
            torch.addcmul(before * old, part, new, out=before)
            torch.logaddexp(known, weight, out=known)
        else:
            out.index_copy_(0, rows, torch.addcmul(before * old, part, new).to(out.dtype))
            lse.index_copy_(1, rows, torch.logaddexp(known, weight))
    return out, lse


@dataclass(frozen=True)
class Passed:
    """A forward pass and the gradient of its output, for the backward pass."""

    grad: torch.Tensor
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor
    """Log-sum-exp (heads, queries) in float32."""

    def of(self, call: Call) -> "Passed":
        """The part of it that concerns `call`."""
        rows = call.queries.rows
        query, key, value = _of(call, self.query, self.key, self.value)
        return Passed(_take(self.grad, rows), query, key, value, _take(self.out, rows), _take(self.lse, rows, 1))


def backward(passed: Passed, calls: Sequence[Call], scale: float, form: str) -> Sequence[torch.Tensor]:
    """The gradients of query, key and value."""
    _, run = _KERNELS[form]
    passed = replace(passed, grad=passed.grad.contiguous())
    sums = run(passed, calls[0], scale)
    for call in calls[1:]:  # of these a token is at most once among the keys
        places = (call.queries.rows, call.keys.rows, call.keys.rows)
        for into, part, place in zip(sums, run(passed.of(call), call, scale), places, strict=True):
            if isinstance(place, slice):
                into[place] += part
            else:
                into.index_add_(0, place, part)
    return sums


def _of(
    call: Call, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _take(query, call.queries.rows), _take(key, call.keys.rows), _take(value, call.keys.rows)


def _take(x: torch.Tensor, rows: slice | torch.Tensor, dim: int = 0) -> torch.Tensor:
    if isinstance(rows, slice):
        return x.narrow(dim, rows.start, rows.stop - rows.start)
    return x.index_select(dim, rows)


# --- the kernels: aten's operations, which have no documentation but torch's own calls of them ------------------------


def _flash(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: Call, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output (queries, heads, size), and log-sum-exp (heads, queries) in float32."""
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        query, key, value, *_lengths(call), 0.0, call.causal, False, scale=scale
    )
    return out, lse


def _flash_backward(passed: Passed, call: Call, scale: float) -> Sequence[torch.Tensor]:
    state = torch.zeros(2, dtype=torch.uint64, device=passed.out.device)  # of the random numbers of a dropout of 0
    return torch.ops.aten._flash_attention_backward(
        passed.grad, passed.query, passed.key, passed.value, passed.out, passed.lse.contiguous(), *_lengths(call),
        0.0, call.causal, state, state, scale=scale,
    )  # fmt: skip


def _lengths(call: Call) -> tuple[Any, ...]:
    return call.queries.starts, call.keys.starts, call.queries.longest, call.keys.longest


def _efficient(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: Call, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `_flash`; this kernel has no groups, and its log-sum-exp is padded: (sequences, heads, padded queries)."""
    heads = query.shape[1]
    rows = [x[None] for x in (query, _repeated(key, heads), _repeated(value, heads))]
    out, lse, *_ = torch.ops.aten._efficient_attention_forward(
        *rows, None, *_lengths(call), 0.0, int(call.causal), True, scale=scale
    )
    return out[0], lse.transpose(0, 1).flatten(1).index_select(1, call.queries.places)


def _efficient_backward(passed: Passed, call: Call, scale: float) -> Sequence[torch.Tensor]:
    heads, groups = passed.query.shape[1], passed.key.shape[1]
    rows = [x[None] for x in (passed.query, _repeated(passed.key, heads), _repeated(passed.value, heads))]
    state = torch.zeros((), dtype=torch.long, device=passed.out.device)
    wide = _filled_up(passed.lse, call.queries)
    grads = torch.ops.aten._efficient_attention_backward(
        passed.grad[None], *rows, None, passed.out.contiguous()[None], *_lengths(call), wide, 0.0, state, state,
        int(call.causal), False, scale=scale,
    )  # fmt: skip
    of_groups = [x[0].unflatten(1, (groups, -1)).sum(2) for x in grads[1:3]]
    return grads[0][0], *of_groups


def _repeated(x: torch.Tensor, heads: int) -> torch.Tensor:
    """Keys or values (tokens, groups, size) as (tokens, heads, size)."""
    return x if x.shape[1] == heads else x[:, :, None].expand(-1, -1, heads // x.shape[1], -1).flatten(1, 2)


def _filled_up(lse: torch.Tensor, side: Side) -> torch.Tensor:
    """Log-sum-exp (heads, queries) as (sequences, heads, padded queries); infinite where there is no query."""
    sequences, width = len(side.starts) - 1, padded(side.longest)
    wide = torch.full((len(lse), sequences * width), torch.inf, device=lse.device)
    wide.index_copy_(1, side.places, lse)
    return wide.unflatten(1, (sequences, width)).transpose(0, 1).contiguous()


_KERNELS: dict[str, Any] = {FLASH: (_flash, _flash_backward), EFFICIENT: (_efficient, _efficient_backward)}
