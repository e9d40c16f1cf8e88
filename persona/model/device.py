"""The device that computes: its choice, its number format, its memory, and the errors that mean that it is full."""

import ctypes
import errno
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch

from persona.errors import EnvironmentFault, OutOfMemory, UsageError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Texts, in lower case, of a lack of memory that has no type of its own. Other errors name memory too, such as "an
# illegal memory access was encountered".
_SIGNS = (
    "out of memory",  # cudaErrorMemoryAllocation: torch.AcceleratorError, the driver, pinned memory
    "cudaerrormemoryallocation",
    "_status_alloc_failed",  # CUBLAS_, CUDNN_, CUSOLVER_ and CUSPARSE_: no room for their workspace
    "can't allocate memory",  # torch's DefaultCPUAllocator
    "cannot allocate memory",  # mmap and fork on Linux
    "not enough memory",  # DefaultCPUAllocator on Windows, MKL
    "os error 1455",  # safetensors on Windows: the paging file is too small
)


@contextmanager
def enough_memory(advice: str) -> Iterator[None]:
    """Turn a lack of memory inside into `OutOfMemory` with `advice`."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        reason = (str(error).splitlines() or ["no memory left"])[0]
        raise OutOfMemory(f"The memory is full ({reason}). {advice}") from None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` means that the memory of the GPU or of the computer is full, in the words of any library here."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError | OSError) and any(sign in text for sign in _SIGNS)


def choose_device(setting: str) -> torch.device:
    """The device for `model.device`; raises `EnvironmentFault` for cuda without a GPU."""
    if setting == "cuda" and not torch.cuda.is_available():
        build = f"torch {torch.__version__} is built for CUDA {torch.version.cuda or '(none: a CPU build)'}"
        raise EnvironmentFault(
            f"model.device is cuda, but no usable NVIDIA GPU was found; {build}. Check `nvidia-smi`, install a CUDA "
            'build of torch (https://pytorch.org/get-started/locally), or set model.device to "auto".'
        )
    return torch.device("cuda" if setting != "cpu" and torch.cuda.is_available() else "cpu")


def choose_precision(setting: str, device: torch.device) -> str:
    """`bf16`, `fp16` or `fp32` for `training.precision` on `device`."""
    if setting == "fp16" and device.type == "cpu":
        raise UsageError('training.precision: fp16 needs an NVIDIA GPU; use "auto", "bf16" or "fp32" on the CPU.')
    if setting != "auto":
        return setting
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    fast = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return "bf16" if fast else "fp32"


def peak_memory_gib(device: torch.device) -> float:
    """Largest memory so far in GiB: of the GPU, or of the whole process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset / 2**30
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def return_free_memory(device: torch.device) -> None:
    """Give free memory of glibc's heap back to the system, if `device` is the CPU; on a GPU torch reuses it itself.

    Packs differ in length, so that the holes of one do not fit the next: the peak of the sample persona's run was
    3.2 GiB without even packs and this, and is 2.2 with them.
    """
    if device.type == "cpu" and sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)
