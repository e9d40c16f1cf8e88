"""Tensors without numbers: code runs at full size, nothing is computed, and its memory and operations are counted.

They lie on torch's meta device, which knows shapes alone, and pretend to lie on `cuda` or `cpu`, so that code that asks
for the device takes the way it takes there.
"""

import math
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils._pytree as tree
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

PRODUCTS = frozenset({"mm", "bmm", "baddbmm", "addmm", "baddbmm_", "addmm_", "addbmm"})
FREE = frozenset(
    (
        *("view", "_unsafe_view", "transpose", "permute", "expand", "slice", "select", "unsqueeze", "squeeze", "t"),
        *("detach", "alias", "as_strided", "split", "split_with_sizes", "unbind", "_reshape_alias", "lift_fresh"),
        *("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"),
    )
)
META = torch.device("meta")
CAPABILITY = (8, 6)  # of the GPU on paper: an RTX 30


@dataclass(frozen=True)
class Kernel:
    """One operation on the device."""

    name: str
    flops: float
    wide: bool
    """Whether its product is of float32."""
    moved: int
    """Bytes that it reads and writes."""


class Paper(TorchDispatchMode):
    """Counts the bytes alive and the kernels of operations on tensors without numbers, forward and backward."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        """On `device`, with autocast to `dtype` unless that is float32."""
        super().__init__()
        self.device, self.dtype = device, dtype
        self.live = self.peak = 0
        self.kernels: list[Kernel] = []
        self._sizes: dict[int, int] = {}
        self._asked = _Pretence(self)

    def __enter__(self) -> "Paper":
        self._patches = _patched(self.device, self.dtype)
        self._patches.__enter__()
        self._asked.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._asked.__exit__(*error)
        self._patches.__exit__(*error)

    def hold(self, tensor: torch.Tensor) -> int:
        """Count the memory of `tensor` while it is alive; returns its bytes, 0 if it is counted already."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return 0
        size = self._sizes[key] = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._release, key)
        return size

    def backward(self, loss: torch.Tensor) -> None:
        """Leave the gradients of `loss` in the weights; `loss.backward()` would switch the pretence off inside."""
        engine: Any = torch.autograd.Variable._execution_engine  # pyright: ignore[reportAttributeAccessIssue]
        ones = (torch.ones_like(loss),)
        engine.run_backward((loss,), ones, False, False, (), allow_unreachable=True, accumulate_grad=True)

    def norm(self, x: torch.Tensor, _: Any, weight: torch.Tensor, epsilon: float) -> tuple[torch.Tensor, torch.Tensor]:
        """RMS norm of `x`, and 1 / rms(x) in float32, as CUDA's kernel computes them in one pass.

        Without that kernel, as on the meta device, torch takes the norm apart into operations on copies in float32.
        """
        out = torch.empty_like(x), torch.empty(*x.shape[:-1], 1, dtype=torch.float32, device=META)
        self.kernels.append(_kernel("_fused_rms_norm", (), [x, weight], [*out]))
        return out

    def _release(self, key: int) -> None:
        self.live -= self._sizes.pop(key, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            # libraries only ask whether all is as usual, such as whether every row is one text
            return args[0].dtype.is_floating_point and 1.0 or args[0].dtype is torch.bool or 1
        out = func(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunction():
            inputs, outputs = (
                [leaf for leaf in tree.tree_leaves(part) if isinstance(leaf, torch.Tensor) and leaf.is_meta]
                for part in ((args, kwargs), out)
            )
            for tensor in outputs:
                self.hold(tensor)
            name = func._schema.name.partition("::")[2]
            if (inputs or outputs) and name not in FREE:
                self.kernels.append(_kernel(name, args, inputs, outputs))
        return out


def _kernel(name: str, args: Any, inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> Kernel:
    flops, wide = 0.0, False
    if name in PRODUCTS:
        left, right = args[-2:]
        flops, wide = 2.0 * left.numel() * right.shape[-1], left.dtype == torch.float32
    elif "_attention_" in name and "scaled_dot_product" not in name:
        flops = _varlen_flops(args, "backward" in name)
    elif "attention" in name:
        flops = _attention_flops(inputs, "backward" in name)
    bytes_of = [sum(tensor.numel() * tensor.element_size() for tensor in side) for side in (inputs, outputs)]
    lookup = name in ("embedding", "index_select", "gather", "index")
    return Kernel(name, flops, wide, 2 * bytes_of[1] if lookup else sum(bytes_of))


def _attention_flops(inputs: list[torch.Tensor], backward: bool) -> float:
    """Products of fused attention; half of the pairs, as each token attends to those before it."""
    query, key = inputs[1 if backward else 0], inputs[2 if backward else 1]
    heads, rows, size = query.shape[-3], query.shape[-2], query.shape[-1]
    pairs = math.prod(query.shape[:-3]) * heads * rows * key.shape[-2] / 2
    return pairs * size * (10.0 if backward else 4.0)


def _varlen_flops(args: Any, backward: bool) -> float:
    """Products of one call of a fused kernel over stretches of a tree (persona/engine/flash.py)."""
    tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
    query = tensors[1 if backward else 0].squeeze(0)  # (tokens, heads, size)
    numbers = [arg for arg in args if isinstance(arg, int)]
    _, longest, causal, *_ = numbers  # of queries and keys; whether a query attends only to keys before it
    pairs = query.shape[0] * longest / (2 if causal else 1)
    return pairs * query.shape[1] * query.shape[2] * (10.0 if backward else 4.0)


# Functions that autocast computes in 16 bits, as far as models call them
_LOW = frozenset({F.linear, torch.matmul, torch.bmm, torch.baddbmm, torch.Tensor.matmul, torch.Tensor.__matmul__})
_DEVICE = {torch.Tensor.device: lambda device: device, torch.Tensor.is_cuda: lambda device: device.type == "cuda",
           torch.Tensor.is_cpu: lambda device: device.type == "cpu"}  # fmt: skip


class _Pretence(TorchFunctionMode):
    """Says that tensors of the meta device lie on the paper's, and makes there what Python wants on that."""

    def __init__(self, paper: Paper) -> None:
        super().__init__()
        self.paper, self.device = paper, paper.device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = dict(kwargs or {})
        first = args[0] if args and isinstance(args[0], torch.Tensor) else None
        if getattr(func, "__name__", "") == "__get__" and first is not None and _is_meta(first):
            answer = next((say for place, say in _DEVICE.items() if func.__self__ is place), None)
            return func(*args) if answer is None else answer(self.device)
        if func is F.scaled_dot_product_attention and first is not None and _is_meta(first):
            return _fused_attention(*args, **options)
        if getattr(func, "__name__", "") == "_fused_rms_norm":
            return self.paper.norm(*args)
        if func is torch.Tensor.pin_memory:
            return first
        if func is torch.Tensor.to:
            args = tuple(self._place(value) for value in args)
        if "device" in options:
            options["device"] = self._place(options["device"])
        if func in _LOW and torch.is_autocast_enabled(self.device.type):
            dtype = torch.get_autocast_dtype(self.device.type)
            args = tuple(v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v for v in args)
        return func(*args, **options)

    def _place(self, value: Any) -> Any:
        wanted = torch.device(value) if isinstance(value, str) else value
        return META if isinstance(wanted, torch.device) and wanted.type == self.device.type else value


def _is_meta(tensor: torch.Tensor) -> bool:
    return tensor.is_meta


def _fused_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, enable_gqa: bool = False, **rest: Any
) -> torch.Tensor:
    """Scaled-dot-product attention as fused kernels do it, without a matrix of scores."""
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    causal = bool(rest.get("is_causal"))
    out = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, causal)[0]
    return out[..., : value.shape[-1]]  # that of the meta device takes the size of the queries


@contextmanager
def _patched(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Autocast to `dtype` as on `device`, whether or not torch finds such a device here."""
    common: Any = torch.cuda.amp.common
    places = [
        (common, "amp_definitely_not_available"),
        (torch.cuda, "is_bf16_supported"),
        (torch.cuda, "get_device_capability"),
    ]
    before = [getattr(place, name) for place, name in places]
    try:
        common.amp_definitely_not_available = lambda: False
        torch.cuda.is_bf16_supported = lambda including_emulation=True: True
        torch.cuda.get_device_capability = lambda device=None: CAPABILITY
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            yield
    finally:
        for (place, name), value in zip(places, before, strict=True):
            setattr(place, name, value)
