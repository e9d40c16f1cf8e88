"""What a path given to a script means, and what a merged model is called."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from making.runs import config
from making.tiny import save_model

from persona.errors import UsageError
from persona.model.adapters import PERSONA, Persona, kind_of, locate, merged_name, public_name, read_persona
from persona.train.run import finetune

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_model):
    """The folder of a finished run, and its settings."""
    folder = tmp_path_factory.mktemp("artifacts")
    made = config(folder, tiny_model, training={"num_train_epochs": 4})
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        finetune(made, True, lambda _: None)
    return folder / "outputs" / "tiny", made


def test_base_only_takes_a_model_that_is_named(run, tmp_path, tiny_model, chatml):
    folder, made = run
    other = save_model(tmp_path / "other", "llama", chatml)
    assert locate(made, str(other), True) == (other, None)
    assert locate(made, str(folder), True) == (tiny_model, None)
    assert locate(made, None, True) == (tiny_model, None)
    with pytest.raises(UsageError, match="neither"):
        locate(made, str(tmp_path / "nowhere"), True)


def test_a_merged_model_is_called_as_its_run(run, tmp_path, monkeypatch):
    folder, _ = run
    checkpoint = next(folder.glob("checkpoint-*"))
    assert merged_name(folder / "adapter") == "tiny"
    assert merged_name(checkpoint) == f"tiny-{checkpoint.name}"
    shutil.copytree(folder / "adapter", tmp_path / "mine")
    assert merged_name(tmp_path / "mine") == "mine"
    monkeypatch.chdir(folder)
    assert merged_name(Path("adapter")) == "tiny"
    monkeypatch.chdir("adapter")
    assert merged_name(Path()) == "tiny"


def merge_script(folder, *arguments):
    command = [sys.executable, str(ROOT / "merge_lora_to_fp16.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", cwd=folder)


def test_the_script_run_inside_a_run_takes_its_name_and_harms_nothing(run, tmp_path):
    folder = shutil.copytree(run[0], tmp_path / "mine")
    (folder / "merged" / "precious").mkdir(parents=True)
    settings = ["--config", str(ROOT / "config" / "default.json")]
    done = merge_script(folder, "adapter", *settings)
    assert done.returncode == 0, done.stderr
    assert "only shapes were compared" not in done.stdout
    assert sorted(path.name for path in (folder / "merged").iterdir()) == ["mine", "precious"]
    (folder / "adapter" / PERSONA).unlink()
    again = merge_script(folder, "adapter", *settings, "--output", "again")
    assert again.returncode == 0, again.stderr
    assert "does not say which weights it was trained on; only shapes were compared.\n" in again.stdout
    refused = merge_script(folder, "adapter", *settings, "--output", "merged")
    assert refused.returncode == 2
    assert "precious" in refused.stderr
    assert (folder / "merged" / "precious").is_dir()


def test_a_name_longer_than_any_file():
    assert kind_of(Path("x" * 5000)) == "missing"
    assert public_name("x" * 5000) == "x" * 5000


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"mood": "odd"}, "mood"),
        ({"date": "yesterday"}, "yesterday"),
        ({"date": None}, "null"),
    ],
)
def test_a_persona_of_another_form_is_named(tmp_path, change, says):
    persona = Persona("base", "0" * 64, None, "2024-05-01")
    (tmp_path / PERSONA).write_text(json.dumps(dataclasses.asdict(persona)), encoding="utf-8")
    assert read_persona(tmp_path) == persona
    (tmp_path / PERSONA).write_text(json.dumps(dataclasses.asdict(persona) | change), encoding="utf-8")
    with pytest.raises(UsageError, match=says) as refused:
        read_persona(tmp_path)
    assert str(tmp_path / PERSONA) in str(refused.value)


def test_a_broken_config_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(UsageError, match=r"config\.json:1:2"):
        kind_of(tmp_path)
