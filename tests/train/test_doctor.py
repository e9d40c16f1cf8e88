"""What the doctor says of a machine: as it is, and as other people's machines are."""

import getpass
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections import namedtuple
from importlib import metadata
from pathlib import Path

import bitsandbytes
import pytest
import torch
from making.pretended_gpu import PretendedGpu
from matplotlib import font_manager

from persona.engine import attention, flash
from persona.engine.attention import form_of
from persona.model import device
from persona.train import curves, doctor

ROOT = Path(__file__).parents[2]


def answering(monkeypatch, error=None):
    def urlopen(request, timeout):
        if error is not None:
            raise error
        return subprocess.Popen([sys.executable, "-c", ""])  # anything with __enter__

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)


def test_a_machine_without_faults_is_ready_and_each_check_is_there_once(monkeypatch):
    answering(monkeypatch, urllib.error.HTTPError("https://x", 403, "no", {}, None))
    checks = list(doctor.checked())
    names = "Python packages torch GPU 4-bits attention memory disk fonts model-hub"
    assert [check.name for check in checks] == [name.replace("-", " ") for name in names.split()]
    assert [check for check in checks if check.state == "fault"] == []
    lines = []
    monkeypatch.setattr(doctor, "checked", lambda: iter(checks))
    assert doctor.examine(lines.append, None) == 0
    assert "Ready to train." in lines[-1]


def test_a_fault_is_the_exit_code(monkeypatch):
    monkeypatch.setattr(doctor, "checked", lambda: iter([doctor.Check("GPU", "fault", "none", "buy one\nor two")]))
    lines = []
    assert doctor.examine(lines.append, None) == 4
    assert lines[0].splitlines() == ["fault  GPU          none", f"{' ' * 20}-> buy one", f"{' ' * 20}-> or two"]
    assert "1 of 1" in lines[1]


def test_a_missing_package_is_a_fault_and_another_version_a_note(monkeypatch):
    assert doctor.packages().state == "ok"
    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "9.9" if name == "peft" else real(name))
    assert (doctor.packages().state, "peft 9.9 (pinned " in doctor.packages().text) == ("note", True)

    def absent(name):
        if name == "gguf":
            raise metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(metadata, "version", absent)
    check = doctor.packages()
    assert (check.state, check.text, check.advice) == ("fault", "not installed: gguf", doctor.INSTALL)


def test_a_torch_that_cannot_be_imported_ends_the_checks_with_the_way_out(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    *_, last = doctor.checked()
    assert (last.name, last.state, "pip install" in last.advice) == ("torch", "fault", True)


def test_an_unused_gpu_is_a_fault_and_none_a_note(monkeypatch):
    monkeypatch.setattr(device, "nvidia_gpu", lambda: None)
    assert doctor.gpu().state == "note"
    monkeypatch.setattr(device, "nvidia_gpu", lambda: ("NVIDIA GeForce RTX 4060", "551.23"))
    check = doctor.gpu()
    assert check.state == "fault"
    assert "RTX 4060" in check.text
    assert "driver 580" in check.text


def test_a_gpu_is_named_with_its_memory_and_multiplies(monkeypatch):
    monkeypatch.setattr(device, "nvidia_gpu", lambda: ("NVIDIA GeForce RTX 4060", "581.42"))
    with PretendedGpu(gib=8, name="NVIDIA GeForce RTX 4060") as gpu:
        lines = [doctor.gpu(), doctor.four_bits(), doctor.attention()]
        taken = torch.empty(3 * 2**30, dtype=torch.uint8, device="cuda")
        assert (doctor.gpu().state, doctor.gpu().advice[:14]) == ("note", "close programs")
        del taken
    assert [line.state for line in lines] == ["ok", "ok", "ok"]
    assert "RTX 4060 (compute capability 8.9), driver 581.42, 8.0 of 8.0 GiB free, trains in bf16" in lines[0].text
    assert "on the cuda" in lines[1].text
    assert lines[2].text == "flash: FlashAttention is built in, and compute capability 8.9 has it"
    assert gpu.mixes == []


@pytest.mark.parametrize(
    ("gpu", "words"),
    [
        ({"has_flash": False}, "efficient: this torch is built without FlashAttention"),
        ({"capability": (7, 5)}, "efficient: FlashAttention needs compute capability 8.0"),
    ],
)
def test_attention_is_that_of_training_on_the_same_gpu(gpu, words):
    with PretendedGpu(**gpu):
        check = doctor.attention()
        dtype = device.DTYPES[device.choose_precision("auto", torch.device("cuda"))]
        choice = form_of(torch.device("cuda", 0), dtype, *doctor.HEADS)
    assert check.state == "ok"
    assert check.text.startswith(words)
    assert choice.reason in check.text


def test_a_fused_kernel_that_is_wrong_here_is_not_called_good(monkeypatch):
    real = flash.forward

    def wrong(*given):
        out, lse = real(*given)
        return out * 1.1, lse

    monkeypatch.setattr(flash, "forward", wrong)
    attention._fault.cache_clear()
    try:
        with PretendedGpu():
            check = doctor.attention()
    finally:
        attention._fault.cache_clear()
    assert (check.state, "flash attention was" in check.text) == ("note", True)


def test_four_bits_that_multiply_wrongly_are_found(monkeypatch):
    assert doctor.four_bits().state == "ok"
    real = bitsandbytes.functional.dequantize_4bit
    monkeypatch.setattr(bitsandbytes.functional, "dequantize_4bit", lambda *given: real(*given) * 1.05)
    assert doctor.four_bits().state == "fault"


def test_an_error_in_a_check_is_its_line():
    def broken():
        raise RuntimeError("CUDA error: no kernel image\nlong explanation")

    check = doctor._guarded("4 bits", broken)
    assert (check.state, check.text) == ("fault", "RuntimeError: CUDA error: no kernel image")


@pytest.mark.parametrize(("free", "state"), [(4e9, "fault"), (20e9, "note"), (31e9, "ok")])
def test_little_disk(monkeypatch, free, state):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1e12, 0, free))
    assert doctor.disk().state == state


def test_the_hub_answers_or_the_mirror_is_named_without_the_password(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "https://me:secret@mirror.example/hf")
    answering(monkeypatch)
    assert (doctor.hub().state, doctor.hub().text) == ("ok", "mirror.example answers")
    answering(monkeypatch, urllib.error.URLError("timed out"))
    check = doctor.hub()
    assert check.state == "note"
    assert "mirror.example does not answer (timed out)" in check.text
    assert "HF_ENDPOINT" in check.advice
    monkeypatch.setenv("HF_ENDPOINT", "not a url")
    assert doctor.hub().state == "note"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE" in doctor.hub().text


def test_the_report_names_nobody(monkeypatch, tmp_path):
    home = tmp_path / "home" / "李雷"
    (home / "project").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USERPROFILE", str(home))
    monkeypatch.setattr(getpass, "getuser", lambda: "lilei")
    monkeypatch.chdir(home / "project")
    text = f"lilei wrote {home / 'project' / 'a.json'} and {home / 'models'}, not lileis"
    assert (
        doctor.without_private_parts(text).replace("\\", "/")
        == "(user) wrote (project)/a.json and ~/models, not lileis"
    )


def test_the_script_writes_its_report(tmp_path, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    file = tmp_path / "报告.txt"
    command = [sys.executable, str(ROOT / "finetune.py"), "--doctor", "--report", str(file)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", cwd=ROOT, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert "127.0.0.1 does not answer" in file.read_text(encoding="utf-8")
    command[-1] = str(tmp_path / "none" / "report.txt")
    done = subprocess.run([*command[:2], *command[3:]], capture_output=True, encoding="utf-8", cwd=ROOT, timeout=60)
    assert (done.returncode, "goes with --doctor" in done.stderr) == (2, True)


def test_a_font_installed_after_matplotlib_listed_them_is_found(monkeypatch):
    path = font_manager.findfont("DejaVu Serif")
    others = [font for font in font_manager.fontManager.ttflist if font.name != "DejaVu Serif"]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", others)
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: [path, str(ROOT / "README.md")])
    monkeypatch.setattr(curves, "_CJK_FONTS", ["DejaVu Serif"])
    curves._families.cache_clear()
    try:
        assert curves._families() == ["DejaVu Sans", "DejaVu Serif"]
    finally:
        curves._families.cache_clear()
