"""Stand-ins for aten's operations that have kernels for CUDA alone, by their documented meaning, with their limits.

Each takes the pretended GPU and the operation's arguments. FlashAttention is arXiv 2307.08691; memory-efficient
attention keeps the log-sum-exp of each sequence padded to a multiple of 32.
"""

from collections.abc import Iterator
from typing import Any

import torch

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _sequences(queries: torch.Tensor, keys: torch.Tensor, most: tuple[int, int]) -> Iterator[tuple[int, int, int, int]]:
    """Where each sequence's queries and keys begin and end."""
    assert queries.dtype == keys.dtype == torch.int32, "lengths are int32"
    assert len(queries) == len(keys)
    first, second = queries.tolist(), keys.tolist()
    for a, b, c, d in zip(first, first[1:], second, second[1:], strict=False):
        assert b - a <= most[0], "a sequence of queries is longer than max_q"
        assert d - c <= most[1], "a sequence of keys is longer than max_k"
        yield a, b, c, d


def _heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    """(tokens, groups, size) as (1, heads, tokens, size)."""
    x = x.transpose(0, 1)[None]
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def _attention(q: Any, k: Any, v: Any, queries: Any, keys: Any, most: Any, causal: bool, scale: Any) -> Any:
    """Output (tokens, heads, size) and log-sum-exp (heads, tokens) in float32."""
    heads = q.shape[1]
    out, sums = torch.empty_like(q), torch.full((heads, len(q)), torch.inf)
    for a, b, c, d in _sequences(queries, keys, most):
        assert not causal or b - a == d - c
        parts = _forward(_heads(q[a:b], heads), _heads(k[c:d], heads), _heads(v[c:d], heads), 0.0, causal, scale=scale)
        out[a:b], sums[:, a:b] = parts[0][0].transpose(0, 1), parts[1][0]
    return out, sums


def _gradients(
    grad: Any, q: Any, k: Any, v: Any, out: Any, sums: Any, queries: Any, keys: Any, most: Any, causal: bool, scale: Any
) -> Any:
    heads, groups = q.shape[1], k.shape[1]
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for a, b, c, d in _sequences(queries, keys, most):
        rows = (_heads(grad[a:b], heads), _heads(q[a:b], heads), _heads(k[c:d], heads), _heads(v[c:d], heads))
        lse = sums[None, :, a:b].contiguous()
        parts = _backward(*rows, _heads(out[a:b], heads), lse, 0.0, causal, scale=scale)
        dq[a:b] = parts[0][0].transpose(0, 1)
        for into, part in ((dk, parts[1]), (dv, parts[2])):
            into[c:d] = part[0].unflatten(0, (groups, -1)).sum(1).transpose(0, 1)
    return dq, dk, dv


def _flash_limits(gpu: Any, *tensors: torch.Tensor) -> None:
    """Raise what FlashAttention 2 raises for a GPU, a type or a size that it does not carry."""
    if not gpu.has_flash:
        raise RuntimeError("USE_FLASH_ATTENTION was not enabled for build.")
    if gpu.capability < (8, 0):
        raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.")
    if any(x.dtype not in (torch.float16, torch.bfloat16) for x in tensors):
        raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
    if any(x.shape[-1] > 256 or x.shape[-1] % 8 for x in tensors):
        raise RuntimeError("FlashAttention only supports head dimension at most 256, a multiple of 8")
    assert all(x.stride(-1) == 1 for x in tensors), "Input tensor must have contiguous last dimension"


def _flash_forward(
    gpu: Any, q: Any, k: Any, v: Any, cum_q: Any, cum_k: Any, max_q: int, max_k: int, p: float, causal: bool,
    debug: bool, *, scale: Any = None, **_: Any,
) -> Any:  # fmt: skip
    _flash_limits(gpu, q, k, v)
    out, sums = _attention(q, k, v, cum_q, cum_k, (max_q, max_k), causal, scale)
    nothing = torch.zeros(2, dtype=torch.uint64)
    return out, sums, nothing, nothing[:0], out.new_empty(0)


def _flash_backward(
    gpu: Any, grad: Any, q: Any, k: Any, v: Any, out: Any, sums: Any, cum_q: Any, cum_k: Any, max_q: int, max_k: int,
    p: float, causal: bool, rng: Any, unused: Any, *, scale: Any = None, **_: Any,
) -> Any:  # fmt: skip
    _flash_limits(gpu, q, k, v)
    return _gradients(grad, q, k, v, out, sums, cum_q, cum_k, (max_q, max_k), causal, scale)


def _padded(length: int) -> int:
    return -(-length // 32) * 32


def _efficient_forward(
    gpu: Any, q: Any, k: Any, v: Any, bias: Any, cum_q: Any, cum_k: Any, max_q: int, max_k: int, p: float, mask: int,
    compute_log_sumexp: bool = False, *, scale: Any = None, **_: Any,
) -> Any:  # fmt: skip
    assert q.shape[2] == k.shape[2], "memory-efficient attention has no groups: repeat the keys' heads"
    assert q.shape[0] == 1
    assert bias is None
    out, sums = _attention(q[0], k[0], v[0], cum_q, cum_k, (max_q, max_k), bool(mask), scale)
    sequences = list(_sequences(cum_q, cum_k, (max_q, max_k)))
    lse = torch.full((len(sequences), q.shape[2], _padded(max_q)), torch.inf)
    for number, (a, b, _c, _d) in enumerate(sequences):
        lse[number, :, : b - a] = sums[:, a:b]
    nothing = torch.zeros((), dtype=torch.int64)
    return out[None], lse, nothing, nothing.clone(), max_q, max_k


def _efficient_backward(
    gpu: Any, grad: Any, q: Any, k: Any, v: Any, bias: Any, out: Any, cum_q: Any, cum_k: Any, max_q: int, max_k: int,
    lse: Any, p: float, seed: Any, offset: Any, mask: int, bias_requires_grad: bool, *, scale: Any = None, **_: Any,
) -> Any:  # fmt: skip
    sequences = list(_sequences(cum_q, cum_k, (max_q, max_k)))
    assert lse.shape == (len(sequences), q.shape[2], _padded(max_q))
    sums = torch.cat([lse[number, :, : b - a] for number, (a, b, _c, _d) in enumerate(sequences)], 1)
    parts = _gradients(grad[0], q[0], k[0], v[0], out[0], sums, cum_q, cum_k, (max_q, max_k), bool(mask), scale)
    return (*(part[None] for part in parts), q.new_empty(0))


def _rms_norm(gpu: Any, x: Any, shape: Any, weight: Any, eps: Any) -> Any:
    """w x / rms(x) in float32, rounded once, and 1 / rms(x)."""
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + (torch.finfo(torch.float32).eps if eps is None else eps))
    normed = wide * scale
    return (normed if weight is None else normed * weight.float()).to(x.dtype), scale


def _rms_norm_backward(gpu: Any, grad: Any, x: Any, shape: Any, scale: Any, weight: Any, wanted: Any) -> Any:
    normed = x.float() * scale
    through = grad.float() if weight is None else grad.float() * weight.float()
    dx = ((through - normed * (through * normed).mean(-1, keepdim=True)) * scale).to(x.dtype)
    dw = (grad.float() * normed).flatten(0, -2).sum(0).to(weight.dtype) if wanted[1] else None
    return dx if wanted[0] else None, dw


# By the operations' names in aten
KERNELS = {
    "_flash_attention_forward": _flash_forward,
    "_flash_attention_backward": _flash_backward,
    "_efficient_attention_forward": _efficient_forward,
    "_efficient_attention_backward": _efficient_backward,
    "_fused_rms_norm": _rms_norm,
    "_fused_rms_norm_backward": _rms_norm_backward,
}
