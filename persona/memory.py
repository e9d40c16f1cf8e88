"""How much memory the process has taken, and giving back what it no longer needs."""

import ctypes
import sys

import psutil
import torch


def peak_memory_gib(device: torch.device) -> float:
    """Largest memory so far in GiB: of the device on CUDA, of the whole process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset / 2**30
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def return_free_memory(device: torch.device) -> None:
    """Give what is free in the heap of the C library back to the system, where that is glibc and `device` the CPU.

    Packs differ in length, so that what one leaves free does not fit the next: the peak of the sample persona's run was
    3.2 GiB without even packs and this, and is 2.2 with them. On CUDA torch reuses memory itself.
    """
    if device.type == "cpu" and sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)
