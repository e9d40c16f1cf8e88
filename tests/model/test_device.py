"""The memory of the device: what is free is given back, and only the errors of a full memory are called that."""

import errno
import platform

import psutil
import pytest
import torch

from persona.errors import EnvironmentFault, OutOfMemory
from persona.model.device import enough_memory, is_out_of_memory, peak_memory_gib, return_free_memory

CPU = torch.device("cpu")


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="only glibc keeps such holes and can be told to trim them"
)
def test_holes_in_the_heap_are_returned_to_the_system():
    process = psutil.Process()
    pieces = [bytearray(100_000) for _ in range(2_000)]  # below what is mapped on its own
    pieces = pieces[::100]
    before = process.memory_info().rss
    return_free_memory(CPU)
    assert len(pieces) == 20
    assert before - process.memory_info().rss > 100_000_000


def test_the_peak_stays_after_memory_is_returned():
    held = torch.ones(2**24)
    peak = peak_memory_gib(CPU)
    del held
    return_free_memory(CPU)
    assert peak_memory_gib(CPU) >= peak > 2**26 / 2**30


FULL = {
    "the caching allocator": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has"),
    "the runtime": torch.AcceleratorError("CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation' in https"),
    "the driver": RuntimeError("CUDA driver error: out of memory"),
    "cuBLAS": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "cuDNN": RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    "torch on Linux": RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate "
                                   "memory: you tried to allocate 4398046511104 bytes. Error code 12 (Cannot allocate"),
    "torch on Windows": RuntimeError("[enforce fail at alloc_cpu.cpp:124] data. DefaultCPUAllocator: not enough "
                                     "memory: you tried to allocate 4398046511104 bytes."),
    "Python": MemoryError(),
    "Linux": OSError(errno.ENOMEM, "Cannot allocate memory"),
    "safetensors": RuntimeError("unable to mmap 26906 bytes from file <a.safetensors>: Cannot allocate memory (12)"),
    "safetensors on Windows": OSError("页面文件太小，无法完成操作。 (os error 1455)"),
}  # fmt: skip
OTHER = {
    "a bug": torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nSearch for `cudaError"),
    "pinning": RuntimeError("cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned in memory"),
    "a pretended GPU": RuntimeError("Need to provide pin_memory allocator to use pin memory."),
    "layout": RuntimeError("unsupported operation: elements of the input tensor and the written-to tensor refer to "
                           "a single memory location"),
    "a kernel's limit": RuntimeError("out of resource: shared memory, Required: 147456, Hardware limit: 101376."),
    "a message of ours": EnvironmentFault("not enough memory"),
    "a disk": OSError(errno.ENOSPC, "No space left on device"),
    "a value": ValueError("out of memory"),
}  # fmt: skip


@pytest.mark.parametrize("error", FULL.values(), ids=FULL)
def test_a_full_memory_is_told_in_the_words_of_every_library(error):
    assert is_out_of_memory(error)
    with pytest.raises(OutOfMemory, match=r"^The memory is full \(.+\)\. Take less\.$"), enough_memory("Take less."):
        raise error


@pytest.mark.parametrize("error", OTHER.values(), ids=OTHER)
def test_other_errors_that_name_memory_stay_what_they_are(error):
    assert not is_out_of_memory(error)
    with pytest.raises(type(error)) as raised, enough_memory("Take less."):
        raise error
    assert raised.value is error


def test_torch_says_it_in_these_words_here():
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**55, dtype=torch.uint8)
    assert is_out_of_memory(raised.value)
