"""Memory that is free is given back, so that a run's memory does not grow with the number of its packs."""

import platform

import psutil
import pytest
import torch

from persona.model.loading import peak_memory_gib, return_free_memory

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
