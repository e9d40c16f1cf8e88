"""The scripts one after another, as a person runs them, on the tiny model, with every socket closed."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from making.runs import settings

import convert_dataset
import finetune
import merge_lora_to_fp16
import plot_loss
import test_model as talk
from persona.train.run_folder import next_commands

ROOT = Path(__file__).parent.parent
PLAY = "".join(
    f"SCENE {n}\n\nGuest: What is number {n}?\nKeeper: Aye, number {n} it is. Mind the tide.\n\n" for n in range(1, 21)
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a name that breaks careless programs, and the current one."""
    path = tmp_path / "my 角色 folder"
    path.mkdir()
    shutil.copytree(ROOT / "config", path / "config")
    monkeypatch.chdir(path)
    yield path
    AcceleratorState._reset_state()


def run(monkeypatch, script, *arguments):
    monkeypatch.setattr(sys, "argv", [script.__file__, *map(str, arguments)])
    return script.main()


def test_from_raw_lines_to_a_merged_model(folder, tiny_model, monkeypatch, capsys):
    (folder / "对话 1.txt").write_text(PLAY, encoding="utf-8")
    run(monkeypatch, convert_dataset, "对话 1.txt", "--character", "Keeper", "--output", "data dir")
    report = json.loads((folder / "data dir" / "report.json").read_text(encoding="utf-8"))
    assert report["read"] == report["written"] == 20
    values = settings(folder, tiny_model)
    values["data"] |= {"train_file": "data dir/train.jsonl", "validation_file": "data dir/val.jsonl"}
    values["training"]["output_dir"] = "outputs/守灯人 1"
    (folder / "run.json").write_text(json.dumps(values), encoding="utf-8")
    run(monkeypatch, finetune, "--config", "run.json", "--show", 1)
    assert "⟦Aye, number" in capsys.readouterr().out
    run(monkeypatch, finetune, "--config", "run.json")
    said = capsys.readouterr().out
    assert next_commands(Path("outputs/守灯人 1")) in said
    run_folder = folder / "outputs" / "守灯人 1"
    assert (run_folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    run(monkeypatch, talk, "outputs/守灯人 1", "--prompt", "Who are you?")
    run(monkeypatch, plot_loss, "outputs/守灯人 1", "--save_path", "图/曲线.png")
    assert (folder / "图" / "曲线.png").is_file()
    run(monkeypatch, merge_lora_to_fp16, "outputs/守灯人 1")
    assert "--gguf" in capsys.readouterr().out
    run(monkeypatch, talk, "merged/守灯人 1", "--config", "run.json", "--prompt", "Who are you?", "--load-in-4bit")
    assert (folder / "merged" / "守灯人 1" / "model.safetensors").is_file()


def test_nothing_made_names_a_path_of_this_machine(folder, tiny_model, monkeypatch):
    (folder / "run.json").write_text(json.dumps(settings(folder, tiny_model)), encoding="utf-8")
    run(monkeypatch, finetune, "--config", "run.json")
    run(monkeypatch, merge_lora_to_fp16, "--config", "run.json")
    shared = [*(folder / "outputs" / "tiny" / "adapter").iterdir(), *(folder / "merged" / "tiny").iterdir()]
    assert len(shared) > 10
    for path in shared:
        assert str(tiny_model).encode() not in path.read_bytes(), path.name
        assert str(folder).encode() not in path.read_bytes(), path.name


def test_merging_again_after_moving_the_run(folder, tiny_model, monkeypatch):
    (folder / "run.json").write_text(json.dumps(settings(folder, tiny_model)), encoding="utf-8")
    run(monkeypatch, finetune, "--config", "run.json")
    shutil.move(folder / "outputs" / "tiny", folder / "elsewhere")
    run(monkeypatch, merge_lora_to_fp16, "elsewhere", "--config", "run.json", "--output", "out")
    assert (Path("out") / "config.json").is_file()
