"""Layers of the model computed with fewer passes and fewer kept tensors, to the same result.

PEFT's forward casts every input to the adapter's float32 and back and keeps the copies for the backward pass;
transformers' norms and gated layers keep values that are cheaper to compute again. Training spends much of its time and
most of its memory on that. Nothing here changes the model or its files: only the `forward` of the modules in memory.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import nn

# Norms, gated layers and output layers of these compute the formulas here and in persona/engine/loss.py (no scale or
# soft cap behind the output layer); any other architecture keeps its own
KNOWN = frozenset({"llama", "ministral3", "mistral", "qwen2", "qwen3"})
ROWS = 512  # of a norm at a time on a CPU: float32 copies in one piece left holes of 0.2 GiB in a benchmark's 2.7
# Rows; bitsandbytes 0.50 computes them by a kernel that reads 4 bits a weight on most GPUs and for most shapes
# (_gemm_4bit_use_custom_cuda: up to 8 to 1,536), and dequantizes the weight for more, as the layers here do
FEW = 64
DROPOUT_UNIT = 2**16  # a share of dropout is rounded to a multiple of 1 / 65,536
_UNPACKED = "weight_unpacked"  # attribute of a 4-bit layer


def fuse(model: PeftModel) -> None:
    """Replace the forward of plain LoRA layers and, in known architectures, of norms and gated layers."""
    known = model.config.get_text_config().model_type in KNOWN
    for module in model.modules():
        if "forward" in vars(module):  # set by another library, such as a hook of accelerate
            continue
        if hasattr(module, "lora_A") and _is_plain_lora(module):
            module.forward = partial(_adapted, module, module.forward)
        elif known and type(module).__name__.endswith("RMSNorm"):
            module.forward = partial(_norm, module)
        elif known and type(module).__name__.endswith("MLP") and getattr(module.config, "hidden_act", None) == "silu":
            module.forward = partial(_gated, module)


def unfuse(model: PeftModel) -> None:
    """Give the modules their own forward back."""
    for module in model.modules():
        forward = vars(module).get("forward")
        if isinstance(forward, partial) and forward.func in (_adapted, _norm, _gated):
            del module.forward


def _is_plain_lora(module: Any) -> bool:
    """Whether the layer is W x + s B A x over a linear layer: one adapter, no DoRA, no bias of its own."""
    if len(module.lora_A) != 1 or len(module.lora_variant) or getattr(module, "fan_in_fan_out", False):
        return False
    (a,), (b,) = module.lora_A.values(), module.lora_B.values()
    is_linear = type(module.base_layer) is nn.Linear or type(module.base_layer).__name__ == "Linear4bit"
    plain_dropout = all(isinstance(drop, nn.Dropout | nn.Identity) for drop in module.lora_dropout.values())
    return is_linear and plain_dropout and a.bias is None and b.bias is None


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """The precision of matrix products with `x`: that of the autocast, or its own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _adapted(module: Any, without: Any, x: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
    ((name, a),), (b,) = module.lora_A.items(), module.lora_B.values()
    if args or options or module.disable_adapters or module.merged or module.active_adapters != [name]:
        return without(x, *args, **options)
    factors = getattr(x, "factors", (None, None))
    x = x.to(compute_dtype(x))
    if _is_decoding(module, x):
        low = x @ a.weight.to(x.dtype).T
        return torch.add(module.base_layer(x), low @ b.weight.to(x.dtype).T, alpha=module.scaling[name])
    drawn = _drawn(module.lora_dropout[name])
    y: Any = _Adapted.apply(x, *factors, a.weight, b.weight, module.base_layer, module.scaling[name], *drawn)
    return y.view(*x.shape[:-1], -1)  # not inside, since Llama 4 adds to it in place


def _is_decoding(module: Any, x: torch.Tensor) -> bool:
    """Whether so few rows come that bitsandbytes' kernel, which reads 4 bits a weight, saves dequantizing them all."""
    few = x.numel() <= FEW * x.shape[-1] and not torch.is_grad_enabled() and not module.training
    return few and x.device.type == "cuda" and getattr(module.base_layer.weight, "quant_state", None) is not None


class _Adapted(torch.autograd.Function):
    """W x + bias + scale B A d, where d is x after dropout (LoRA, arXiv 2106.09685).

    x is not kept if it is silu(gate) up, nor is d: both are computed again in the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        gate: torch.Tensor | None,
        up: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        base: Any,
        scale: float,
        share: int,
        seed: int,
    ) -> torch.Tensor:
        a, b, rows = a.to(x.dtype), b.to(x.dtype), x.flatten(0, -2)
        scale = scale / (1 - share / DROPOUT_UNIT)
        d = _mask(x, share, seed).mul_(x) if share else x
        low = d.flatten(0, -2) @ a.T
        del d
        y = F.linear(rows, _frozen(base, x.dtype), None if base.bias is None else base.bias.to(x.dtype))
        y.addmm_(low, b.T, alpha=scale)
        # saved, and not held by `ctx`: activation checkpointing frees only saved tensors
        ctx.save_for_backward(x if gate is None else None, gate, up, low, a, b)
        ctx.base, ctx.scale, ctx.share, ctx.seed = base, scale, share, seed
        return y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        x, gate, up, low, a, b = ctx.saved_tensors
        x = _product(gate, up) if x is None else x
        d = x
        grad = grads[0].to(x.dtype)
        grad_low = (grad @ b).mul_(ctx.scale)
        mask = _mask(x, ctx.share, ctx.seed) if ctx.share else None
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ _frozen(ctx.base, x.dtype)
            if mask is None:
                grad_x.addmm_(grad_low, a)
            else:
                grad_x.addcmul_(grad_low @ a, mask.flatten(0, -2))
            grad_x = grad_x.view(x.shape)
        if mask is not None:
            d = mask.mul_(x)
        grad_b = (grad.T @ low).mul_(ctx.scale)
        return grad_x, None, None, grad_low.T @ d.flatten(0, -2), grad_b, None, None, None, None


def _drawn(dropout: Any) -> tuple[int, int]:
    """How many of `DROPOUT_UNIT` numbers to drop, and the seed of the mask; the seed comes from torch's random state.

    It is that of the CPU on a GPU too: a number of the GPU's would have to be waited for.
    """
    share = round(dropout.p * DROPOUT_UNIT) if isinstance(dropout, nn.Dropout) and dropout.training else 0
    return min(share, DROPOUT_UNIT - 1), int(torch.empty((), dtype=torch.int64).random_()) if share else 0


def _mask(x: torch.Tensor, share: int, seed: int) -> torch.Tensor:
    """1 for each number of `x` that is kept and 0 for each that is dropped, in the dtype of `x`."""
    chance = torch.Generator("cpu" if x.is_meta else x.device).manual_seed(seed)
    mask = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.device.type != "cpu":
        return mask.bernoulli_(1 - share / DROPOUT_UNIT, generator=chance)
    # on a CPU bernoulli_ takes five times as long as four numbers of 16 bits in one and a comparison
    numbers = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device)
    numbers.random_(-(2**63), None, generator=chance)
    return torch.ge(numbers.view(torch.int16)[: x.numel()].view(x.shape), share - DROPOUT_UNIT // 2, out=mask)


def _frozen(base: Any, dtype: torch.dtype) -> torch.Tensor:
    """The frozen weight of `base` (out, in), dequantized if it is held in 4 bits."""
    if (plain := vars(base).get(_UNPACKED)) is not None:
        return plain.to(dtype)
    # a weight that FSDP has gathered has lost its own
    state = getattr(base.weight, "quant_state", None) or getattr(base, "quant_state", None)
    if state is None:
        return base.weight.to(dtype)
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(base.weight, state).to(dtype)


@contextmanager
def unpacked(model: Any) -> Iterator[None]:
    """Inside, hold the 4-bit weights of `model` dequantized too, if they are on the CPU and memory allows it.

    They compute the same. On the CPU dequantizing takes longer than the products of one token, and a reply does both
    for each of its tokens.
    """
    named = [module for module in model.modules() if type(module).__name__ == "Linear4bit"]
    layers = [module for module in named if not hasattr(module, "base_layer")]  # PEFT's has the same name
    size = sum(layer.in_features * layer.out_features * layer.compute_dtype.itemsize for layer in layers)
    chosen = layers if model.device.type == "cpu" and size < psutil.virtual_memory().available / 2 else []
    try:
        for layer in chosen:
            setattr(layer, _UNPACKED, _frozen(layer, layer.compute_dtype))
            layer.forward = partial(_plain, layer)
        yield
    finally:
        for layer in chosen:
            vars(layer).pop(_UNPACKED, None)
            vars(layer).pop("forward", None)


def _plain(layer: Any, x: torch.Tensor) -> torch.Tensor:
    weight = vars(layer)[_UNPACKED]
    bias = None if layer.bias is None else layer.bias.to(weight.dtype)
    return F.linear(x.to(weight.dtype), weight, bias).to(x.dtype)


def _norm(module: Any, x: torch.Tensor) -> torch.Tensor:
    y: Any = _Norm.apply(x, module.weight, module.variance_epsilon)
    return y


class _Norm(torch.autograd.Function):
    """w x / rms(x), the quotient in float32 (RMSNorm, arXiv 1910.07467)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        if _has_kernel(x, weight):
            out, scale = torch.ops.aten._fused_rms_norm(x, x.shape[-1:], weight, epsilon)
            ctx.save_for_backward(x, scale, weight)
            return out
        scale = torch.empty(*x.shape[:-1], 1, dtype=torch.float32, device=x.device)
        out = torch.empty(x.shape, dtype=torch.result_type(x, weight), device=x.device)
        for rows, factor, into in _few_rows(x, scale, out):
            wide = rows.float()
            torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon, out=factor)
            torch.mul((wide * factor).to(x.dtype), weight, out=into)
        ctx.save_for_backward(x, scale, weight)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        x, scale, weight = ctx.saved_tensors
        if _has_kernel(x, weight):
            kernel = torch.ops.aten._fused_rms_norm_backward
            return kernel(grads[0], x, x.shape[-1:], scale, weight, [True, False])[0], None, None
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        for rows, received, factor, into in _few_rows(x, grads[0], scale, out):
            normed, grad = rows.float() * factor, (received * weight).float()
            along = (grad * normed).mean(-1, keepdim=True)
            into.copy_((grad - normed.mul_(along)).mul_(factor))
        return out, None, None


def _has_kernel(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether torch computes the norm of `x` and its gradient in one kernel each, which take tensors of one dtype."""
    return x.device.type != "cpu" and x.dtype == weight.dtype


def _few_rows(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """The tensors (..., size) as rows, few of each at a time; all at once on a GPU."""
    flat = [tensor.flatten(0, -2) for tensor in tensors]
    few = ROWS if flat[0].device.type == "cpu" else max(1, len(flat[0]))
    return zip(*(rows.split(few) for rows in flat), strict=True)


def _gated(module: Any, x: torch.Tensor) -> torch.Tensor:
    gate, up = module.gate_proj(x), module.up_proj(x)
    product: Any = _Product.apply(gate, up)
    product.factors = gate.detach(), up.detach()  # the product would be a fifth of all kept tensors
    return module.down_proj(product)


def _product(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return F.silu(gate).mul_(up)


class _Product(torch.autograd.Function):
    """silu(gate) up (SwiGLU, arXiv 2002.05202)."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return _product(gate, up)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grads[0] * up, gate), F.silu(gate).mul_(grads[0])
