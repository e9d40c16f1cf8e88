"""The answers of torch.cuda, autocast and bitsandbytes on a machine with a pretended GPU."""

import contextlib
import types
from collections.abc import Callable, Iterator
from typing import Any

import bitsandbytes.functional as bnb  # before a GPU is pretended, since it chooses its C library by the machine's
import peft.peft_model
import peft.utils.save_and_load
import torch
import torch.utils.checkpoint

CUDA = torch.device("cuda", 0)


class PretendedGenerator(torch.Generator):
    """A generator of random numbers of the host or, by `on_gpu`, of the GPU."""

    on_gpu: bool

    def __new__(cls, device: Any = "cpu") -> Any:
        made = super().__new__(cls, "cpu")
        made.on_gpu = torch.device(device).type == "cuda"
        return made


class _Stream:
    """A stream of the GPU, or an event; nothing runs beside anything here, so it only counts what is asked."""

    def __init__(self, gpu: Any, kind: str) -> None:
        self._gpu, self._kind, self.device, self.cuda_stream = gpu, kind, CUDA, 0

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)

        def called(*args: Any, **kwargs: Any) -> Any:
            self._gpu.calls[f"{self._kind}.{name}", ""] += 1
            if name == "synchronize":
                self._gpu.waited(f"{self._kind}.synchronize")
            if name == "record_event":
                return args[0] if args else _Stream(self._gpu, "Event")
            return {"query": True, "elapsed_time": 0.0}.get(name)

        return called

    def __enter__(self) -> "_Stream":
        return self

    def __exit__(self, *error: object) -> None:
        pass


def _torch_cuda(gpu: Any) -> dict[str, Any]:
    """Functions and classes of torch.cuda by name."""

    def noted(name: str, answer: Any = None) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            text = ", ".join([*map(str, args), *(f"{key}={value}" for key, value in kwargs.items())])
            gpu.calls[name, text] += 1
            return answer

        return call

    def allow(fraction: float, *_: Any, **__: Any) -> None:
        gpu.calls["set_per_process_memory_fraction", str(fraction)] += 1
        gpu.allowed = fraction

    def properties(*_: Any, **__: Any) -> Any:
        major, minor = gpu.capability
        return types.SimpleNamespace(
            total_memory=gpu.total, name=gpu.name, major=major, minor=minor, multi_processor_count=24, gcnArchName=""
        )

    def main_stream(*_: Any, **__: Any) -> _Stream:
        return _Stream(gpu, "Stream")

    def stats(*_: Any, **__: Any) -> dict[str, int]:
        return {"allocated_bytes.all.current": gpu.live, "allocated_bytes.all.peak": gpu.peak, "num_ooms": 0}

    functions: dict[str, Any] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_is_in_bad_fork": lambda: False,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "device": lambda *_: contextlib.nullcontext(),
        "synchronize": lambda *_, **__: gpu.waited("synchronize"),
        "get_device_capability": lambda *_, **__: gpu.capability,
        "get_device_properties": properties,
        "get_device_name": lambda *_, **__: gpu.name,
        "get_arch_list": lambda: ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"],
        "is_bf16_supported": lambda including_emulation=True: including_emulation or gpu.capability >= (8, 0),
        "memory_allocated": lambda *_, **__: gpu.live,
        "max_memory_allocated": lambda *_, **__: gpu.peak,
        "memory_reserved": lambda *_, **__: gpu.live,
        "max_memory_reserved": lambda *_, **__: gpu.peak,
        "memory_stats": stats,
        "reset_peak_memory_stats": lambda *_, **__: setattr(gpu, "peak", gpu.live),
        "mem_get_info": lambda *_, **__: (gpu.total - gpu.live, gpu.total),
        "set_per_process_memory_fraction": allow,
        "get_rng_state": lambda *_, **__: gpu.random.clone(),
        "set_rng_state": lambda state, *_, **__: setattr(gpu, "random", state.clone()),
        "get_rng_state_all": lambda: [gpu.random.clone()],
        "manual_seed": gpu.seed,
        "manual_seed_all": gpu.seed,
        "Stream": main_stream,
        "Event": lambda *_, **__: _Stream(gpu, "Event"),
        "current_stream": main_stream,
        "default_stream": main_stream,
        "stream": lambda stream: contextlib.nullcontext(stream),
    }
    for name in ("init", "_lazy_init", "set_device", "empty_cache"):
        functions[name] = noted(name)
    return functions


class _Autocast(torch.amp.autocast_mode.autocast):
    """Autocast for CUDA by that of the CPU."""

    def __init__(self, device_type: str, dtype: Any = None, enabled: bool = True, cache_enabled: Any = None) -> None:
        if device_type == "cuda":
            device_type, dtype = "cpu", dtype or torch.float16
        super().__init__(device_type, dtype=dtype, enabled=enabled, cache_enabled=cache_enabled)


def _autocast() -> list[tuple[Any, str, Any]]:
    """Autocast's class and functions as they are to be: (owner, name, value)."""

    def as_cpu(function: Any) -> Any:
        return lambda kind=None, *rest: function("cpu" if kind in ("cuda", None) else kind, *rest)

    names = ("is_autocast_enabled", "get_autocast_dtype", "set_autocast_enabled", "set_autocast_dtype")
    functions = [(torch, name, as_cpu(getattr(torch, name))) for name in names]
    return functions + [(owner, "autocast", _Autocast) for owner in (torch, torch.amp, torch.amp.autocast_mode)]


def _libraries(gpu: Any) -> list[tuple[Any, str, Any]]:
    """What else torch, bitsandbytes and PEFT ask: (owner, name, value)."""
    group = torch._C._group_tensors_by_device_and_dtype  # pyright: ignore
    engine = torch.autograd._engine_run_backward  # pyright: ignore

    def grouped(lists: Any, with_indices: bool = False) -> Any:
        """Groups of foreach, which C++ makes by the devices of the numbers, divided by the tags."""
        out = {}
        for (_, dtype), (parts, numbers) in group(lists, True).items():
            devices = [gpu.device_of(tensor) for tensor in parts[0]]
            for device in dict.fromkeys(devices):
                chosen = [place for place, own in enumerate(devices) if own == device]
                divided = [[part[place] for place in chosen if part] for part in parts]
                out[device, dtype] = divided, [numbers[place] for place in chosen] if with_indices else []
        return out

    def get_paged(*shape: int, dtype: Any = torch.float32, device: Any = CUDA) -> Any:
        out: Any = torch.zeros(shape, dtype=dtype, device=CUDA)
        out.is_paged, out.page_deviceid = True, device.index
        assert device.index is not None
        return out

    def run_backward(*args: Any, **options: Any) -> Any:
        with gpu.on():  # the function mode is off inside its own call of backward()
            return engine(*args, **options)

    return [
        (torch.cuda, "_initialized", True),
        (torch, "Generator", PretendedGenerator),
        (torch.version, "cuda", "13.0"),
        (torch.backends.cuda, "is_flash_attention_available", lambda: gpu.has_flash),
        (torch._C, "_group_tensors_by_device_and_dtype", grouped),
        (torch.autograd, "_engine_run_backward", run_backward),
        (bnb, "get_paged", get_paged),
        (bnb, "prefetch_tensor", lambda *_, **__: None),
        (bnb, "fill", lambda A, value, **_: A.fill_(value)),
        # safetensors would read straight to the GPU
        (peft.peft_model, "infer_device", lambda: "cpu"),
        (peft.utils.save_and_load, "infer_device", lambda: "cpu"),
    ]


@contextlib.contextmanager
def patched(gpu: Any) -> Iterator[None]:
    """Inside, torch.cuda, autocast and bitsandbytes' C library behave as if there were a GPU."""

    patches = [*((torch.cuda, name, value) for name, value in _torch_cuda(gpu).items()), *_autocast(), *_libraries(gpu)]
    checks: Any = torch.utils.checkpoint._allowed_determinism_checks_to_fns  # run where the function mode is off
    described = checks["default"]
    checks["default"] = lambda x: {"shape": x.shape, "dtype": x.dtype, "device": gpu.device_of(x)}
    saved = [(owner, name, getattr(owner, name)) for owner, name, _ in patches]
    for owner, name, value in patches:
        setattr(owner, name, value)
    try:
        yield
    finally:
        checks["default"] = described
        for owner, name, value in saved:
            setattr(owner, name, value)
