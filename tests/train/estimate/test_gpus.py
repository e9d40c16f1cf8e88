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
