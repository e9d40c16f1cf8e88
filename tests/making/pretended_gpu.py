"""A pretended CUDA GPU: real numbers on the CPU, every tensor tagged with the device on which it would be.

    with PretendedGpu() as gpu:
        finetune(...)             # believes that it runs on cuda:0
    gpu.mixes                     # operations over tensors of two devices
    gpu.waits                     # Counter: (place, reason) where the program waited for the GPU
    gpu.copies                    # Counter: (direction, place) of copies between host and GPU
    gpu.launches                  # Counter: kernels by operation
    gpu.calls                     # Counter: (function of torch.cuda, its arguments) that only set something

It shows: every operation over tensors of two devices, also in the backward pass and in the libraries; every wait for
the GPU and its place; copies from pageable memory, which may wait although they are asked not to; the number of
kernels; the bytes of all tensors on the GPU, and a lack of memory, with CUDA's own message; and it takes the branches
for CUDA in our code and in the libraries. Losses can be compared with a run on the CPU: the arithmetic is the CPU's.

It is blind to: numerics and limits of CUDA's own kernels, above all of bitsandbytes; autocast's list for CUDA, in whose
place the CPU's is used; memory that is no tensor's (CUDA's context, workspaces, fragments, pages); C++ code that asks a
tensor for its device; safetensors that are read straight to the GPU; other threads; races between streams; and time.
"""

import contextlib
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from making.pretended_cuda import CUDA, PretendedGenerator, patched
from making.pretended_kernels import KERNELS
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import persona

CPU = torch.device("cpu")
GIB = 2**30
ROOT = Path(persona.__file__).parent
# Operations whose result's shape or value the CPU needs
WAITING = {
    *("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique_dim", "_unique2"),
    *("unique_consecutive", "bincount", "repeat_interleave.Tensor"),
}
# Operations that start no kernel
FREE = {
    *(
        "view",
        "_unsafe_view",
        "transpose",
        "permute",
        "expand",
        "slice",
        "select",
        "unsqueeze",
        "squeeze",
        "t",
        "detach",
    ),
    *("alias", "as_strided", "split", "split_with_sizes", "unbind", "_reshape_alias", "unfold", "diagonal"),
    *("lift_fresh", "empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "resize_", "set_"),
    *("_has_compatible_shallow_copy_type", "is_same_size", "real", "movedim", "chunk", "narrow", "unflatten", "_conj"),
    *("view_as", "result_type", "record_stream", "squeeze_"),
}
# Operations that draw random numbers
RANDOM = {
    *("bernoulli", "bernoulli_", "native_dropout", "uniform_", "normal_", "exponential_", "random_", "multinomial"),
    *("rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like", "normal"),
}
# Operations that copy an index of the CPU to the GPU by themselves
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}


class DeviceMix(RuntimeError):
    """An operation over tensors of two devices, which CUDA would refuse."""


def real_device(tensor: torch.Tensor) -> torch.device:
    """The device of the tensor's numbers, which is cpu or meta."""
    return torch._C.TensorBase.device.__get__(tensor)  # pyright: ignore


def storage_of(tensor: torch.Tensor) -> int:
    """The key of the tensor's storage, which views share."""
    return tensor.untyped_storage()._cdata


def is_plain(x: Any) -> bool:
    """Whether `x` is a tensor with a storage of numbers."""
    return isinstance(x, torch.Tensor) and x.layout is torch.strided and real_device(x).type != "meta"


class PretendedGpu(TorchFunctionMode):
    """The GPU and all that was seen of it.

    The function mode sees what Python asks for: it turns `device="cuda"` into a tag and answers for `tensor.device`.
    The dispatch mode within sees every operation, those of the backward pass too: it checks the tags, hands them on,
    and counts.
    """

    def __init__(
        self,
        gib: float = 8.0,
        capability: tuple[int, int] = (8, 9),
        name: str = "Pretended GPU",
        has_flash: bool = True,
        strict: bool = True,
    ) -> None:
        """A GPU called `name` with `gib` of memory; without `strict` a mix is listed and the program goes on.

        `has_flash` says whether torch is built with FlashAttention, as it is not on Windows.
        """
        super().__init__()
        self.total, self.allowed, self.capability, self.name = int(gib * GIB), 1.0, capability, name
        self.has_flash, self.strict = has_flash, strict
        self.tags: dict[int, torch.device | None] = {}  # by storage; None: made without inputs, fits either
        self.pinned: set[int] = set()
        self.sizes: dict[int, int] = {}
        self.live = self.peak = 0
        self.mixes: list[str] = []
        self.waits: Counter[tuple[str, str]] = Counter()
        self.copies: Counter[tuple[str, str]] = Counter()
        self.launches: Counter[str] = Counter()
        self.calls: Counter[tuple[str, str]] = Counter()
        self.seed(0)

    # --- tags ---------------------------------------------------------------------------------------------------------

    def device_of(self, tensor: torch.Tensor) -> torch.device:
        """The device on which `tensor` would be."""
        return (self.tags.get(storage_of(tensor)) or CPU) if is_plain(tensor) else real_device(tensor)

    def tag(self, tensor: torch.Tensor, device: torch.device | None) -> None:
        """Say that `tensor`'s storage is on `device`; raises `torch.OutOfMemoryError` if it does not fit there."""
        with torch._C.DisableTorchFunction():
            storage = tensor.untyped_storage()
            key = storage._cdata
            if device == CUDA and self.tags.get(key) != CUDA:
                self._allocate(key, storage.nbytes())
            if key not in self.tags:
                weakref.finalize(storage, self._forget, key)
            self.tags[key] = device

    def _allocate(self, key: int, size: int) -> None:
        size = -(-size // 512) * 512  # as torch's allocator rounds
        if size and self.live + size > self.total * self.allowed:
            raise torch.OutOfMemoryError(self._out_of_memory(size))
        self.sizes[key] = size
        self.live += size
        self.peak = max(self.peak, self.live)

    def _out_of_memory(self, size: int) -> str:
        """The message of torch 2.13's CUDACachingAllocator."""
        allowed = f"{_size(int(self.total * self.allowed))} allowed; " if self.allowed < 1 else ""
        live, free = _size(self.live), _size(self.total - self.live)
        return (
            f"CUDA out of memory. Tried to allocate {_size(size)}. GPU 0 has a total capacity of {_size(self.total)} "
            f"of which {free} is free. {allowed}Including non-PyTorch memory, this process has {live} memory in use. "
            f"Of the allocated memory {live} is allocated by PyTorch, and 0 bytes is reserved by PyTorch but "
            "unallocated. If reserved but unallocated memory is large try setting "
            "PYTORCH_ALLOC_CONF=expandable_segments:True to avoid fragmentation.  See documentation for "
            "Memory Management  (https://docs.pytorch.org/docs/stable/notes/"
            "cuda.html#optimizing-memory-usage-with-pytorch-cuda-alloc-conf)"
        )

    def _forget(self, key: int) -> None:
        self.tags.pop(key, None)
        self.pinned.discard(key)
        self.live -= self.sizes.pop(key, 0)

    def seed(self, seed: int) -> None:
        """Begin the GPU's own random numbers."""
        self.random = torch.Generator().manual_seed(seed).get_state()

    @contextlib.contextmanager
    def drawing(self) -> Iterator[None]:
        """Random numbers drawn inside are the GPU's."""
        with self._operations.unseen():
            of_cpu = torch.get_rng_state()
            torch.set_rng_state(self.random)
        try:
            yield
        finally:
            with self._operations.unseen():
                self.random = torch.get_rng_state()
                torch.set_rng_state(of_cpu)

    def waited(self, reason: str) -> None:
        """Count a wait of the program at this place."""
        self.waits[place(), reason] += 1

    def copied(self, source: torch.Tensor, to_gpu: bool, waits: bool) -> None:
        """Count a copy between host and GPU, and its wait."""
        self.copies["to the GPU" if to_gpu else "from the GPU", place()] += 1
        if waits:
            self.waited(f"copy {'to' if to_gpu else 'from'} the GPU")
        elif to_gpu and storage_of(source) not in self.pinned and source.numel():
            self.waited("copy from pageable memory")  # CUDA copies it to pinned memory first, and may wait to do so

    # --- what Python asks for -----------------------------------------------------------------------------------------

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """What `func` would return if tensors could be on the GPU."""
        kwargs = dict(kwargs or {})
        me = args[0] if args and isinstance(args[0], torch.Tensor) else None
        if getattr(func, "__name__", "") == "__get__":
            return self._attribute(func, me, args, kwargs)
        if func is torch._C._nn._parse_to:  # pyright: ignore
            return func(*(CUDA if type(value) is int else value for value in args), **kwargs)
        if me is not None and (answer := _METHODS.get(func)) is not None:
            return answer(self, func, me, args[1:], kwargs)
        if (kernel := _kernel_of(func)) is not None and any(self.device_of(x) == CUDA for x in args if is_plain(x)):
            return self._operations.run(func, kernel, args, kwargs)
        wanted = kwargs.get("device")
        pin = bool(kwargs.get("pin_memory"))
        if pin:
            kwargs["pin_memory"] = False
        if wanted is not None:
            wanted = CUDA if isinstance(wanted, int) else torch.device(wanted)
            kwargs["device"] = CPU if wanted.type == "cuda" else wanted
        self._check_generator(kwargs.get("generator"), wanted or (CPU if me is None else self.device_of(me)))
        draws = wanted is not None and wanted.type == "cuda" and getattr(func, "__name__", "") in RANDOM
        with self.drawing() if draws else contextlib.nullcontext():
            out = func(*args, **kwargs)
        if wanted is not None and wanted.type != "meta":
            self._made(func, out, CUDA if wanted.type == "cuda" else CPU)
        elif is_plain(out) and self.tags.get(storage_of(out)) is None and not _tensors(args, kwargs):
            self.tag(out, CPU)  # made without a device
        if pin:
            self.pinned.add(storage_of(out))
        return out

    def _check_generator(self, generator: Any, device: torch.device) -> None:
        """Raise what torch raises if `generator` does not draw on `device`."""
        own = CUDA if isinstance(generator, PretendedGenerator) and generator.on_gpu else CPU
        if generator is not None and device.type in ("cpu", "cuda") and own.type != device.type:
            raise RuntimeError(f"Expected a '{device.type}' device type for generator but found '{own.type}'")

    def _attribute(self, func: Any, me: Any, args: Any, kwargs: Any) -> Any:
        getter = getattr(func, "__self__", None)
        if me is not None and getter is torch.Tensor.device:
            return self.device_of(me)
        if me is not None and getter in (torch.Tensor.is_cuda, torch.Tensor.is_cpu):
            return self.device_of(me).type == ("cuda" if getter is torch.Tensor.is_cuda else "cpu")
        return func(*args, **kwargs)

    def _made(self, func: Any, out: Any, device: torch.device) -> None:
        for tensor in filter(is_plain, pytree.tree_leaves(out)):
            self.tag(tensor, device)
            if device == CUDA and func in (torch.tensor, torch.as_tensor):
                self.copied(tensor, True, True)

    def _to(self, func: Any, me: torch.Tensor, args: Any, kwargs: Any) -> Any:
        """`me` on another device or of another type."""
        copy, args = kwargs.pop("copy", False), list(args)
        if args and isinstance(args[0], torch.Tensor):
            device, dtype, at_once, form = self.device_of(args[0]), args[0].dtype, True, kwargs.get("memory_format")
        else:
            if args and isinstance(args[0], int) and not isinstance(args[0], bool):
                args[0] = CUDA
            with torch._C.DisableTorchFunction():
                device, dtype, later, form = torch._C._nn._parse_to(*args, **kwargs)  # pyright: ignore
            at_once = not later
        return self._moved(me, device, dtype, at_once, form, copy)

    def _moved(self, me: Any, device: Any, dtype: Any, at_once: bool, form: Any = None, copy: bool = False) -> Any:
        here = self.device_of(me)
        options = {"dtype": dtype or me.dtype} | ({} if form is None else {"memory_format": form})
        if "meta" in (here.type, getattr(device, "type", None)):
            return torch.Tensor.to(
                me, device=here if device is None else CPU if device.type == "cuda" else device, **options
            )
        target = here if device is None else CUDA if device.type == "cuda" else CPU
        if target == here:
            return torch.Tensor.to(me, copy=copy, **options)
        with self._operations.unseen():
            out = torch.Tensor.to(me, copy=True, **options)
        self.tag(out, target)
        if target == CPU and not at_once:
            self.pinned.add(storage_of(out))
        self.copied(me, target == CUDA, at_once)
        return out

    def _to_gpu(self, func: Any, me: torch.Tensor, args: Any, kwargs: Any) -> Any:
        return self._moved(me, CUDA, None, not kwargs.get("non_blocking", False))

    def _to_cpu(self, func: Any, me: torch.Tensor, args: Any, kwargs: Any) -> Any:
        return self._moved(me, CPU, None, True)

    def _pin(self, func: Any, me: torch.Tensor, args: Any, kwargs: Any) -> Any:
        if self.device_of(me) == CUDA:
            raise RuntimeError(f"cannot pin '{me.type()}' only dense CPU tensors can be pinned")
        with self._operations.unseen():
            out = me.clone()
        self.tag(out, CPU)
        self.pinned.add(storage_of(out))
        return out

    def _is_pinned(self, func: Any, me: torch.Tensor, args: Any, kwargs: Any) -> Any:
        return storage_of(me) in self.pinned

    def _get_device(self, func: Any, me: torch.Tensor, args: Any, kwargs: Any) -> Any:
        return 0 if self.device_of(me) == CUDA else -1

    def _numpy(self, func: Any, me: torch.Tensor, args: Any, kwargs: Any) -> Any:
        if self.device_of(me) == CUDA:
            raise TypeError(
                "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory "
                "first."
            )
        return func(me, *args, **kwargs)

    def _tolist(self, func: Any, me: torch.Tensor, args: Any, kwargs: Any) -> Any:
        if self.device_of(me) == CUDA:
            self.waited("tolist")
        return func(me)

    def _deepcopy(self, func: Any, me: torch.Tensor, args: Any, kwargs: Any) -> Any:
        out = func(me, *args, **kwargs)
        if is_plain(out):
            self.tag(out, self.device_of(me))
        return out

    # --- entering -----------------------------------------------------------------------------------------------------

    def __enter__(self) -> "PretendedGpu":
        self._stack = contextlib.ExitStack()
        self._stack.enter_context(patched(self))
        self._operations = self._stack.enter_context(_Operations(self))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._stack.close()

    @contextlib.contextmanager
    def on(self) -> Iterator[None]:
        """Switch the function mode on again inside one of its own calls."""
        TorchFunctionMode.__enter__(self)
        try:
            yield
        finally:
            TorchFunctionMode.__exit__(self, None, None, None)


_METHODS: dict[Any, Callable[..., Any]] = {
    torch.Tensor.to: PretendedGpu._to,
    torch.Tensor.cuda: PretendedGpu._to_gpu,
    torch.Tensor.cpu: PretendedGpu._to_cpu,
    torch.Tensor.pin_memory: PretendedGpu._pin,
    torch.Tensor.is_pinned: PretendedGpu._is_pinned,
    torch.Tensor.get_device: PretendedGpu._get_device,
    torch.Tensor.numpy: PretendedGpu._numpy,
    torch.Tensor.tolist: PretendedGpu._tolist,
    torch.Tensor.__deepcopy__: PretendedGpu._deepcopy,
}


def _size(count: int) -> str:
    """Bytes as CUDA's allocator writes them."""
    for unit, name in ((GIB, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= unit:
            return f"{count / unit:.2f} {name}"
    return f"{count} bytes"


def _tensors(*values: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def _kernel_of(func: Any) -> Any:
    """The stand-in for an operation that has no kernel for the CPU."""
    name = getattr(func, "_qualified_op_name", "") or str(getattr(func, "_name", ""))
    return KERNELS.get(name.removeprefix("aten::").partition(".")[0]) if name.startswith("aten::") else None


def place() -> str:
    """The innermost function of the toolkit that is running, and the library's function that it called, if any."""
    frame: Any = sys._getframe(1)
    last = None
    while frame is not None:
        path, function = Path(frame.f_code.co_filename), frame.f_code.co_qualname.partition(".<")[0]
        if "torch" not in path.parts and not path.name.startswith("pretended_") and path.name != "contextlib.py":
            last = last or f"{path.parent.name}/{path.name} {function}"
            if path.is_relative_to(ROOT):
                own = f"{path.relative_to(ROOT).as_posix()} {function}"
                return own if last.endswith(own) else f"{own} via {last}"
        frame = frame.f_back
    return f"? via {last}"


class _Operations(TorchDispatchMode):
    """Sees every operation below autograd."""

    def __init__(self, gpu: PretendedGpu) -> None:
        super().__init__()
        self.gpu, self.off = gpu, 0

    @contextlib.contextmanager
    def unseen(self) -> Iterator[None]:
        """Operations inside are neither checked nor counted."""
        self.off += 1
        try:
            yield
        finally:
            self.off -= 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.off:
            return func(*args, **kwargs)
        return self.run(func, KERNELS.get(func._schema.name.partition("::")[2]), args, kwargs)

    def run(self, func: Any, kernel: Any, args: Any, kwargs: Any) -> Any:
        """The result of `func`, or of its stand-in `kernel`, checked, tagged and counted."""
        with torch._C.DisableTorchFunction():
            known = [(t, self.gpu.tags.get(storage_of(t), CPU)) for t in _tensors(args, kwargs) if is_plain(t)]
            on_gpu = any(tag == CUDA for _, tag in known)
            name = (getattr(func, "_qualified_op_name", None) or func._name).partition("::")[2]
            short = name.partition(".")[0]
            if on_gpu:
                self._check(name, short, known, args, kwargs)
            if kernel is not None and on_gpu:
                with self.unseen():
                    out = kernel(self.gpu, *args, **kwargs)
            elif on_gpu and short in RANDOM:
                with self.gpu.drawing() if kwargs.get("generator") is None else contextlib.nullcontext():
                    out = func(*args, **kwargs)
            else:
                out = func(*args, **kwargs)
            device = CUDA if on_gpu else CPU if any(tag == CPU for _, tag in known) else None
            given = {storage_of(tensor) for tensor, _ in known}
            for tensor in filter(is_plain, pytree.tree_leaves(out)):
                key = storage_of(tensor)
                if self.gpu.tags.get(key) is None and (key not in given or device == CUDA):
                    self.gpu.tag(tensor, device)
        if on_gpu and short not in FREE:
            self.gpu.launches[short] += 1
        return out

    def _check(self, name: str, short: str, known: list[tuple[torch.Tensor, Any]], args: Any, kwargs: Any) -> None:
        """Record a mix, a wait or a copy of an operation with a tensor on the GPU."""
        if short == "copy_" and len(known) == 2 and CPU in (known[0][1], known[1][1]):
            to_gpu = known[0][1] == CUDA
            later = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
            self.gpu.copied(known[1][0], to_gpu, not later)
            return
        strangers = [t for t, tag in known if tag == CPU and t.dim() > 0]
        if strangers and short in INDEXING and known[0][1] == CUDA:
            self.gpu.waited("index of the CPU into a tensor of the GPU")
        elif strangers:
            shapes = [(tuple(t.shape), str(tag)) for t, tag in known]
            mix = (
                "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! "
                f"(when calling {name} over {shapes} at {place()})"
            )
            self.gpu.mixes.append(mix)
            if self.gpu.strict:
                raise DeviceMix(mix)
        if short in WAITING or name in WAITING:
            self.gpu.waited(short)
        if short in INDEXING and any(t.dtype in (torch.bool, torch.uint8) for t, _ in known[1:]):
            self.gpu.waited("index by a mask")
