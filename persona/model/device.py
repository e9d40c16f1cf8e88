"""The device that computes: its choice, its number format, its memory, and the errors that mean that it is full."""

import ctypes
import errno
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch

from persona.errors import EnvironmentFault, OutOfMemory, UsageError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# CUDA 13.0, for which the pinned torch is built: docs.nvidia.com/cuda/archive/13.0.0/cuda-toolkit-release-notes, and
# compute capability 7.5 (pytorch #172352)
OLDEST_DRIVER = 580
OLDEST_GPU = "GeForce GTX 16, RTX 20 or newer"
SPARE = 256 * 2**20  # bytes of the GPU left to the screen and to CUDA's own needs
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
    """The device for `model.device`; raises `EnvironmentFault` for cuda if torch cannot use a GPU, with the way out."""
    usable = setting != "cpu" and torch.cuda.is_available() and not _too_old()
    if setting == "cuda" and not usable:
        raise EnvironmentFault(
            f"model.device is cuda, but {why_no_gpu()} To compute on the CPU all the same, which is far slower, add "
            "--set model.device=cpu."
        )
    return torch.device("cuda" if usable else "cpu")


def why_no_gpu() -> str:
    """Why torch cannot use a GPU here, and what to do, in sentences that go on after "but"."""
    if torch.cuda.is_available():
        return f"{_too_old()}."
    release, cuda = torch.__version__.partition("+")[0], torch.version.cuda
    built = f"torch {torch.__version__} is built for {f'CUDA {cuda}' if cuda else 'the CPU only'}"
    gpu = nvidia_gpu()
    steps = []
    if cuda is None:
        steps.append(f"pip install torch=={release}+cu130 --index-url https://download.pytorch.org/whl/cu130")
    oldest = 525 if cuda and cuda.startswith("12.") else OLDEST_DRIVER
    if gpu is None or int(gpu[1].partition(".")[0]) < oldest:
        steps.append(f"install NVIDIA's driver {oldest} or newer (https://www.nvidia.com/drivers)")
    if not steps:
        steps.append(f"see what torch says ({_refusal()}); a new driver needs a restart of the computer")
    there = f"nvidia-smi lists {gpu[0]} with driver {gpu[1]}" if gpu else "nvidia-smi finds no NVIDIA GPU"
    return f"{built}, and {there}. To use a GPU ({OLDEST_GPU}): {'; then '.join(steps)}."


def _too_old() -> str | None:
    """The reason why the GPU that torch finds is too old for it, or None."""
    known = [int(name[3:]) for name in torch.cuda.get_arch_list() if name.startswith("sm_")]
    major, minor = torch.cuda.get_device_capability()
    if not known or major * 10 + minor >= min(known):
        return None
    return f"{torch.cuda.get_device_name()} is too old for torch {torch.__version__}, which needs {OLDEST_GPU}"


def nvidia_gpu() -> tuple[str, str] | None:
    """The name of the first GPU and the version of its driver as nvidia-smi says them; None if it is not there."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    match = re.match(r"(.+), (\d[\d.]*)$", answer.stdout.strip().split("\n")[0].strip())
    return (match[1], match[2]) if match and answer.returncode == 0 else None


def _refusal() -> str:
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return str(error).splitlines()[0]
    return "nothing"


def unused_gpu(setting: str, device: torch.device) -> str | None:
    """A note for a run whose `model.device` is auto and ended on the CPU beside an NVIDIA GPU; None otherwise."""
    if setting != "auto" or device.type != "cpu" or (not torch.cuda.is_available() and nvidia_gpu() is None):
        return None
    return f"the GPU is not used: {why_no_gpu()}"


def stay_in_gpu(device: torch.device) -> None:
    """On Windows, let this process take only GPU memory that is free now, so that more is `OutOfMemory`.

    Otherwise the driver moves data to ordinary memory without a word, and the run goes on many times slower.
    """
    if device.type != "cuda" or sys.platform != "win32":
        return
    free, total = torch.cuda.mem_get_info()
    own = free + torch.cuda.memory_reserved() - SPARE
    torch.cuda.set_per_process_memory_fraction(min(1.0, max(0.0, own / total)))


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
    status = Path("/proc/self/status")
    if status.is_file() and (peak := re.search(r"VmHWM:\s+(\d+) kB", status.read_text(encoding="utf-8"))):
        return int(peak[1]) / 2**20  # Linux' getrusage has a process begin with the peak of the one that started it
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def return_free_memory(device: torch.device) -> None:
    """Give free memory of glibc's heap back to the system, if `device` is the CPU; on a GPU torch reuses it itself.

    Packs differ in length, so that the holes of one do not fit the next: the peak of the sample persona's run was
    3.2 GiB without even packs and this, 2.2 with them, and 1.6 since the caches of products are bounded as well.
    """
    if device.type == "cpu" and sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)


@contextmanager
def freed_at_once(device: torch.device) -> Iterator[None]:
    """Inside, glibc gives large blocks back to the system when they are freed, if `device` is the CPU.

    While a base of 0.5B weights was put into 4 bits, each 16-bit weight that was freed stayed in the heap: the peak of
    loading was 1.5 or 2.7 GiB, as it happened, and is 1.4. In training this costs too much time (docs/log.md).
    """
    glibc = ctypes.CDLL(None) if device.type == "cpu" and sys.platform == "linux" else None
    if glibc is None or not hasattr(glibc, "mallopt"):
        yield
        return
    trim_threshold, mmap_threshold, mib = -1, -3, 2**20  # malloc.h
    glibc.mallopt(mmap_threshold, mib)
    try:
        yield
    finally:  # the values that glibc reaches by itself when blocks of that size have been freed
        glibc.mallopt(mmap_threshold, 32 * mib)
        glibc.mallopt(trim_threshold, 64 * mib)
