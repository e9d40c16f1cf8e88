"""Every script writes and replaces its files by Windows' rules: none that is open or mapped is renamed or deleted."""

import json
import os
import shutil
import signal
import sys
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from making.runs import settings
from making.windows_rules import WindowsRules
from safetensors.torch import load_file, save_file

import convert_dataset
import evaluate_model
import finetune
import merge_lora_to_fp16
from persona import files
from persona.errors import EnvironmentFault, Interrupted
from persona.merge import verify
from persona.train import run as training
from persona.train.checkpoints import checkpoints
from persona.train.run_folder import set_aside

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="only Linux lists what a process has mapped"),
]


# --- the rules themselves --------------------------------------------------------------------------------------------


def read_mapped(path):
    """A tensor whose memory is the file."""
    save_file({"weight": torch.ones(2000)}, path)
    return load_file(path)["weight"]


def read_open(path):
    path.write_bytes(b"text")
    return path.open("rb")


@pytest.mark.parametrize("read", [read_mapped, read_open])
@pytest.mark.parametrize(
    "change",
    [
        lambda folder: (folder / "a 灯").unlink(),
        lambda folder: os.remove(folder / "a 灯"),
        lambda folder: (folder / "a 灯").rename(folder / "b"),
        lambda folder: (folder / "b").replace(folder / "a 灯"),
        lambda folder: folder.rename(folder.with_name("other")),
        lambda folder: shutil.rmtree(folder),
    ],
)
def test_a_file_that_is_held_is_found(tmp_path, read, change):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "b").write_bytes(b"new")
    kept = read(folder / "a 灯")
    way = "mapped" if read is read_mapped else "open"
    with WindowsRules(tmp_path) as rules:
        with pytest.raises(PermissionError, match=f"is {way}, at test_windows"):
            change(folder)
        assert len(rules.broken) == 1
        del kept
        change(folder)
    assert len(rules.broken) == 1


# --- the scripts by these rules --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def home(tmp_path_factory, tiny_model):
    """A folder with data and the settings of a run that saves after each of its six updates, with torch's AdamW."""
    folder = tmp_path_factory.mktemp("on windows 文件")
    values = settings(folder, tiny_model, training={"save_steps": 1, "output_dir": "outputs/tiny"})
    values["training"]["optim"] = "adamw_torch"
    (folder / "run.json").write_text(json.dumps(values), encoding="utf-8")
    lines = "".join(f"Visitor: Who rings bell {n}?\nTamsin: Aye, I ring bell {n}.\n\n" for n in range(30))
    (folder / "dialogue.txt").write_text(lines, encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def _there(home, monkeypatch):
    monkeypatch.chdir(home)
    yield
    AcceleratorState._reset_state()


def call(monkeypatch, folder, script, *arguments):
    """The script's main under the rules, which it must not break."""
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, arguments)])
    with WindowsRules(folder) as rules:
        try:
            script.main()
        finally:
            assert rules.broken == []
            assert rules.checked > 0


def stop_after_two(trainer, update):
    """An observer that sends this process a signal after update 2."""
    if trainer.progress.step == 2:
        os.kill(os.getpid(), signal.SIGTERM)


RUN = ("--config", "run.json")


def test_training_is_stopped_continued_over_four_saves_and_started_anew(home, monkeypatch):
    original = training.finetune
    with monkeypatch.context() as patch:
        patch.setattr(training, "finetune", lambda *arguments: original(*arguments, observers=[stop_after_two]))
        with pytest.raises(Interrupted):
            call(patch, home, finetune, *RUN)
    run = home / "outputs" / "tiny"
    assert [path.name for path in checkpoints(run)] == ["checkpoint-1", "checkpoint-2"]
    call(monkeypatch, home, finetune, *RUN)
    assert checkpoints(run)[-1].name == "checkpoint-6"
    assert len(checkpoints(run)) in (2, 3)  # the two newest and the best
    AcceleratorState._reset_state()
    call(monkeypatch, home, finetune, *RUN, "--resume", "never")
    assert (home / "outputs" / "tiny.1" / "adapter").is_dir()
    assert (home / "logs" / "tiny.1").is_dir()


@pytest.fixture(scope="module")
def trained(home):
    """The folder of a finished run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        patch.setattr(sys, "argv", ["finetune.py", *RUN])
        finetune.main()
        AcceleratorState._reset_state()
    return home / "outputs" / "tiny"


@pytest.mark.parametrize(
    ("script", "arguments", "written"),
    [
        (merge_lora_to_fp16, ["outputs/tiny", "--output", "merged one"], "merged one/model.safetensors"),
        (convert_dataset, ["dialogue.txt", "--character", "Tamsin", "--output", "data one"], "data one/train.jsonl"),
        (evaluate_model, ["report", "outputs/tiny", "--limit", "2"], "outputs/tiny/report.html"),
    ],
    ids=["merge", "convert", "report"],
)
def test_what_is_there_is_replaced(home, trained, monkeypatch, script, arguments, written):
    for _ in range(2):
        call(monkeypatch, home, script, *arguments)
        before = (home / written).stat().st_ino
    call(monkeypatch, home, script, *arguments)
    assert (home / written).stat().st_ino != before


def test_a_merged_model_that_was_verified_as_it_is_stored_is_not_mapped(home, trained, tiny_model, monkeypatch):
    memory = SimpleNamespace(available=2**30 + 500_000)  # enough for bf16 alone, so that the file's tensors may be used
    monkeypatch.setattr(verify.psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr(verify, "ROUGH", verify.Tolerance(0.02, 0.2))  # near ties of a tiny model; files matter here
    for _ in range(2):
        call(monkeypatch, home, merge_lora_to_fp16, "outputs/tiny", "--set", "export.dtype=bfloat16")
    assert verify.plan_proof(tiny_model, trained / "adapter", None).precision == "bf16"


# --- a file that another program holds for a moment ------------------------------------------------------------------


class Scanner:
    """A virus scanner that holds new files: the first `times` renames to a name fail."""

    def __init__(self, monkeypatch, times, name):
        self.failed = 0
        for call in ("rename", "replace"):
            monkeypatch.setattr(files.Path, call, self._held(getattr(files.Path, call), times, name))

    def _held(self, original, times, name):
        def rename(path, target):
            if target.name == name and self.failed < times:
                self.failed += 1
                raise PermissionError(13, "The process cannot access the file", str(path))
            return original(path, target)

        return rename


@pytest.fixture
def windows(monkeypatch):
    """The pauses between two tries on Windows, which are not waited for."""
    pauses = []
    monkeypatch.setattr(files.sys, "platform", "win32")
    monkeypatch.setattr(files.time, "sleep", pauses.append)
    return pauses


def test_a_rename_that_fails_twice_succeeds_at_the_third(tmp_path, monkeypatch, windows):
    folder, new = tmp_path / "merged", tmp_path / "new"
    folder.mkdir()
    new.mkdir()
    (new / "which").write_text("new", encoding="utf-8")
    scanner = Scanner(monkeypatch, 2, "merged")
    files.publish(new, folder)
    assert (folder / "which").read_text(encoding="utf-8") == "new"
    assert scanner.failed == len(windows) == 2
    assert 1 <= sum(windows) <= 2
    Scanner(monkeypatch, 2, "run.json")
    for text in ("one", "two"):
        files.write_text(tmp_path / "run.json", text)
    assert (tmp_path / "run.json").read_text(encoding="utf-8") == "two"
    assert len(windows) == 4


def test_a_rename_that_fails_three_times_leaves_the_old_folder(tmp_path, monkeypatch, windows):
    folder, new = tmp_path / "merged", tmp_path / "new"
    for path in (folder, new):
        path.mkdir()
        (path / "which").write_text(path.name, encoding="utf-8")
    Scanner(monkeypatch, 3, "merged")
    with pytest.raises(PermissionError):
        files.publish(new, folder)
    assert (folder / "which").read_text(encoding="utf-8") == "merged"


def test_elsewhere_nothing_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(files.time, "sleep", pytest.fail)
    Scanner(monkeypatch, 1, "run.json")
    with pytest.raises(PermissionError):
        files.write_text(tmp_path / "run.json", "text")


def test_a_run_that_cannot_be_set_aside_stays_whole(tmp_path, monkeypatch, windows):
    monkeypatch.chdir(tmp_path)
    run, logs = tmp_path / "outputs" / "tiny", tmp_path / "logs" / "tiny"
    for folder in (run / "checkpoint-1", logs):
        folder.mkdir(parents=True)
    for path in (run / "run.json", run / "metrics.jsonl", logs / "events"):
        path.write_bytes(b"{}")
    before = sorted(tmp_path.rglob("*"))
    with monkeypatch.context() as patch:
        Scanner(patch, 3, "metrics.jsonl")
        with pytest.raises(EnvironmentFault, match="cannot be set aside.*TensorBoard"):
            set_aside(run, pytest.fail)
    assert sorted(tmp_path.rglob("*")) == before
    messages = []
    (tmp_path / "logs" / "tiny.1").mkdir()  # of a run whose own folder was deleted
    set_aside(run, messages.append)
    assert messages == [f"The earlier run was set aside as {run}.2."]
    assert (tmp_path / "outputs" / "tiny.2" / "metrics.jsonl").is_file()
    assert (tmp_path / "logs" / "tiny.2" / "events").is_file()
