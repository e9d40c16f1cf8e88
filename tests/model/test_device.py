"""The device that computes: a GPU that cannot be used is named with the way out; its memory, and when it is full."""

import errno
import json
import platform
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from accelerate.state import AcceleratorState
from making.pretended_gpu import PretendedGpu
from making.runs import config

from persona.errors import EnvironmentFault, OutOfMemory
from persona.model import device
from persona.model.device import (
    choose_device,
    enough_memory,
    is_out_of_memory,
    nvidia_gpu,
    peak_memory_gib,
    return_free_memory,
    stay_in_gpu,
    unused_gpu,
)
from persona.train.run import finetune

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]


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
    # Linux counts in lots of pages for each core
    assert peak_memory_gib(CPU) >= peak - 2**-9 > 2**26 / 2**30


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


# --- which device ----------------------------------------------------------------------------------------------------

ROOT = Path(__file__).parents[2]


@pytest.fixture
def machine(monkeypatch):
    """Makes this machine one with a GPU (or none), its driver, a build of torch, and what torch finds."""

    def make(cuda="13.0", smi="NVIDIA GeForce RTX 4060, 581.15", available=False, capability=(8, 9)):
        def run(command, **_):
            if smi is None:
                raise FileNotFoundError(2, "nvidia-smi")
            return SimpleNamespace(returncode=0, stdout=f"{smi}\n")

        def refuse():
            raise RuntimeError("No CUDA GPUs are available\nand more")

        monkeypatch.setattr(device.subprocess, "run", run)
        monkeypatch.setattr(torch, "__version__", f"2.13.0+{'cu' + cuda.replace('.', '') if cuda else 'cpu'}")
        monkeypatch.setattr(torch.version, "cuda", cuda)
        for name, value in {
            "is_available": lambda: available,
            "get_device_capability": lambda: capability,
            "get_device_name": lambda: "NVIDIA GeForce",
            "get_arch_list": lambda: ["sm_75", "sm_80", "sm_120", "compute_120"],
            "init": refuse,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)

    return make


INSTALL = "pip install torch==2.13.0+cu130 --index-url https://download.pytorch.org/whl/cu130"
DRIVER = "install NVIDIA's driver 580 or newer"


@pytest.mark.parametrize(
    ("here", "words", "not_needed"),
    [
        ({"cuda": None}, ["built for the CPU only", "RTX 4060 with driver 581.15", INSTALL], DRIVER),
        ({"cuda": None, "smi": None}, ["nvidia-smi finds no NVIDIA GPU", INSTALL, DRIVER], "torch says"),
        ({"cuda": None, "smi": "NVIDIA RTX A2000, 576.02"}, [INSTALL, DRIVER], "torch says"),
        ({"smi": "NVIDIA GeForce RTX 3060 Ti, 552.44"}, ["built for CUDA 13.0", "driver 552.44", DRIVER], INSTALL),
        ({"cuda": "12.6", "smi": "NVIDIA GeForce GTX 1080, 516.94"}, ["driver 525 or newer"], INSTALL),
        ({}, ["torch says (No CUDA GPUs are available)", "restart"], DRIVER),
        ({"available": True, "capability": (6, 1)}, ["too old for torch 2.13.0+cu130", "GTX 16, RTX 20"], INSTALL),
    ],
)
def test_a_gpu_that_cannot_be_used_is_named_with_the_way_out(machine, here, words, not_needed):
    machine(**here)
    with pytest.raises(EnvironmentFault) as refused:
        choose_device("cuda")
    message = str(refused.value)
    assert message.startswith("model.device is cuda, but ")
    assert message.endswith("add --set model.device=cpu.")
    assert [word for word in words if word not in message] == []
    assert not_needed not in message
    assert choose_device("auto") == choose_device("cpu") == CPU
    note = unused_gpu("auto", CPU)
    assert (note is None) == (here.get("smi", "") is None)
    assert note is None or all(word in note for word in words)
    assert unused_gpu("cpu", CPU) is None


def test_a_gpu_is_taken_unless_the_cpu_is_asked_for(machine):
    machine(available=True, capability=(7, 5))
    assert [choose_device(setting).type for setting in ("cuda", "auto", "cpu")] == ["cuda", "cuda", "cpu"]
    assert unused_gpu("auto", torch.device("cuda")) is None


@pytest.mark.parametrize("answer", ["", "No devices were found", "NVIDIA-SMI has failed because it couldn't"])
def test_nvidia_smi_without_a_gpu_is_no_gpu(machine, answer):
    machine(smi=answer)
    assert nvidia_gpu() is None


def test_a_preset_without_a_gpu_ends_with_the_message_before_any_download():
    presets = sorted((ROOT / "config" / "presets").glob("*.json"))
    assert len(presets) >= 10
    assert {json.loads(path.read_text(encoding="utf-8"))["model"]["device"] for path in presets} == {"cuda"}
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    command = [sys.executable, "finetune.py", "--config", str(presets[0])]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8")
    assert result.returncode == EnvironmentFault.exit_code
    assert re.match(r"model\.device is cuda, but torch .* is built for ", result.stderr)
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("system", "free", "own", "fraction"),
    [("win32", 7, 0, (7 - 0.25) / 8), ("win32", 3, 4, (7 - 0.25) / 8), ("win32", 0.1, 0, 0.0), ("linux", 7, 0, None)],
)
def test_on_windows_the_run_takes_only_the_memory_that_is_free(monkeypatch, system, free, own, fraction):
    fractions = []
    monkeypatch.setattr(device, "sys", SimpleNamespace(platform=system))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (int(free * 2**30), 8 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: own * 2**30)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", fractions.append)
    stay_in_gpu(torch.device("cuda"))
    stay_in_gpu(CPU)
    assert fractions == ([] if fraction is None else [pytest.approx(fraction)])


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """A folder and a process of its own for a run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # a pretended GPU belongs to one thread
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.mark.usefixtures("one_thread", "alone")
def test_a_run_on_windows_begins_with_that_limit(tmp_path, tiny_model, monkeypatch):
    monkeypatch.setattr(device, "sys", SimpleNamespace(platform="win32"))
    with PretendedGpu() as gpu:
        finetune(config(tmp_path, tiny_model, training={"num_train_epochs": 0.1}), True, lambda _: None)
    assert gpu.allowed == pytest.approx(1 - device.SPARE / gpu.total)


@pytest.mark.usefixtures("one_thread", "alone")
def test_the_plan_says_that_the_gpu_is_not_used(tmp_path, tiny_model, monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    monkeypatch.setattr(device, "nvidia_gpu", lambda: ("NVIDIA GeForce RTX 4060", "576.02"))
    messages = []
    finetune(config(tmp_path, tiny_model, training={"num_train_epochs": 0.1}), True, messages.append)
    assert "note: the GPU is not used: torch" in "\n".join(messages)
    assert "RTX 4060 with driver 576.02" in "\n".join(messages)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc keeps freed blocks so")
def test_large_blocks_leave_the_process_while_a_model_is_loaded():
    """Each block of 4 MiB lies before a small one that stays, so that the heap cannot shrink from its end."""
    script = """
from contextlib import nullcontext
import psutil, torch
from persona.model.device import freed_at_once
torch.ones(2**22)  # 16 MiB: glibc keeps freed blocks up to this size from now on
for inside in (freed_at_once(torch.device("cpu")), nullcontext()):
    with inside:
        blocks = [(torch.ones(2**20), torch.ones(2**14)) for _ in range(50)]  # glibc has smaller ones in store
        size = psutil.Process().memory_info().rss
        small = [one for _, one in blocks]
        del blocks
        print((size - psutil.Process().memory_info().rss) // 2**20)
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    inside, outside = map(int, result.stdout.split())
    assert inside > 190, result.stderr
    assert outside < 50


def test_the_peak_is_that_of_this_process_and_not_of_the_one_that_started_it():
    large = torch.ones(2**28)  # 1 GiB
    script = (
        "import torch; from persona.model.device import peak_memory_gib; print(peak_memory_gib(torch.device('cpu')))"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert 0.1 < float(result.stdout) < large.nbytes / 2**30, result.stderr
