"""GPUs are found by the names that people and drivers give them, and a step's time by their data sheets."""

import pytest

from persona.errors import UsageError
from persona.train.estimate.gpus import GIB, GPUS, find_gpu, known_name


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("rtx4060", "RTX 4060"),
        ("RTX 4060", "RTX 4060"),
        ("4090", "RTX 4090"),
        ("4060 ti 16gb", "RTX 4060 Ti 16GB"),
        ("NVIDIA GeForce RTX 4060 Laptop GPU", "RTX 4060 Laptop"),
        ("NVIDIA GeForce RTX 4060 Ti", "RTX 4060 Ti"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
        ("Tesla T4", "T4"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("GeForce 256", None),
    ],
)
def test_a_gpu_is_known_by_the_names_people_and_drivers_give_it(text, name):
    assert known_name(text) == name


def test_a_size_is_a_gpu_without_a_data_sheet():
    for text in ("8GB", "8 gb", "8GiB", "8G"):
        assert find_gpu(text).memory == 8 * GIB
        assert find_gpu(text).bandwidth == 0


@pytest.mark.parametrize("text", ["rtx4061", "0GB", "5000GB", "", "radeon", "莫言秋"])
def test_an_unknown_gpu_is_answered_with_the_known_ones(text):
    with pytest.raises(UsageError) as caught:
        find_gpu(text)
    assert "8GB" in str(caught.value)
    if not text.endswith("GB"):
        assert all(name in str(caught.value) for name in GPUS)


def test_data_sheets_are_plausible():
    assert len(GPUS) > 30
    for name, gpu in GPUS.items():
        assert 6 <= gpu.memory / GIB <= 80, name
        assert 2e11 <= gpu.bandwidth <= 4e12, name
        assert 1 <= gpu.low / gpu.single <= 20, name
        assert (7, 5) <= gpu.capability <= (12, 0), name


def test_geforce_multiplies_16_bits_at_a_fixed_rate_of_float32():
    """Twice that of float32 from RTX 30 on, four times on RTX 20, whose tensor cores are the same but for float32."""
    compared = 0
    for name, gpu in GPUS.items():
        if name.startswith("RTX"):
            compared += 1
            assert gpu.low / gpu.single == pytest.approx(4 if gpu.capability < (8, 0) else 2, rel=0.01), name
    assert compared == 26


# as hmc-tech.com, fpsbench.com, sysrqmts.com and waredb.com list them: GB/s, and TFLOP/s of 16 bits and of float32
@pytest.mark.parametrize(
    ("name", "bandwidth", "low", "single"),
    [
        ("RTX 3060", 360, 25.5, 12.74),
        ("RTX 3090", 936, 71, 35.58),
        ("RTX 4060", 272, 30.23, 15.11),
        ("RTX 4060 Ti", 288, 44.1, 22.06),
        ("RTX 4090", 1008, 165.15, 82.58),
        ("RTX 5080", 960, 112.6, 56.28),
        ("L4", 300.1, 121, 30.29),
        ("L40S", 864, 362.05, 91.6),
        ("A100", 1555, 312, 19.5),
    ],
)
def test_figures_are_those_that_were_looked_up(name, bandwidth, low, single):
    gpu = GPUS[name]
    found = [gpu.bandwidth / 1e9, gpu.low / 1e12, gpu.single / 1e12]
    assert found == pytest.approx([bandwidth, low, single], rel=0.01)
