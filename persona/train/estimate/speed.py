"""Seconds of a step on a GPU by a roofline: each operation takes as long as its arithmetic or its memory traffic."""

from collections.abc import Iterable

from persona.train.estimate.gpus import Gpu
from persona.train.estimate.paper import Kernel

# Shares of the data sheet's figures that large operations reach, and the least time of one; from reports on other
# programs, not measured with this one. A GPU gives the true ones: benchmarks/gpu_session.py.
REACHED_LOW, REACHED_SINGLE, REACHED_FUSED, REACHED_BANDWIDTH = 0.75, 0.65, 0.5, 0.8
LEAST = 2e-6
# Python and the driver need this long to start an operation; half of the time on a core of a busy EPYC server
STARTED = 8e-6
ASSUMED = (
    f"{REACHED_LOW:.0%} of the data sheet's 16-bit products ({REACHED_FUSED:.0%} in fused attention), "
    f"{REACHED_BANDWIDTH:.0%} of its bandwidth, {STARTED * 1e6:.0f} µs to start an operation"
)


def seconds(kernels: Iterable[tuple[Kernel, float]], gpu: Gpu) -> float:
    """The time of `kernels` on `gpu`: of its work, or of starting them if that takes longer."""
    work = started = 0.0
    for kernel, times in kernels:
        work += times * seconds_of(kernel, gpu)
        started += times * STARTED
    return max(work, started)


def seconds_of(kernel: Kernel, gpu: Gpu) -> float:
    """The time of one operation on `gpu`."""
    rate = gpu.single * REACHED_SINGLE if kernel.wide else gpu.low * REACHED_LOW
    if "attention" in kernel.name:
        rate = gpu.low * REACHED_FUSED
    return max(kernel.flops / rate, kernel.moved / (gpu.bandwidth * REACHED_BANDWIDTH), LEAST)
