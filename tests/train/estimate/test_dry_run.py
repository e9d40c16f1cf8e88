"""finetune.py --dry-run answers from config and tokenizer alone, and its advice works; packs of size auto."""

import json
import re
import sys
from contextlib import chdir
from datetime import date

import psutil
import pytest
import torch
from huggingface_hub import constants
from making.runs import config, metrics, settings

import finetune as script
from persona.config import Config
from persona.errors import UsageError
from persona.model import hub
from persona.model.architecture import read_architecture
from persona.train.estimate import dry_run as module
from persona.train.estimate import forecast as forecasts
from persona.train.estimate.dry_run import dry_run, histogram
from persona.train.estimate.fit import Room
from persona.train.run import finetune, prepare

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def bare_model(tmp_path, tiny_model):
    """A folder with config and tokenizer, without weights."""
    folder = tmp_path / "bare 模型"
    folder.mkdir()
    for path in tiny_model.iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


def run_script(monkeypatch, capsys, folder, model, *words):
    (folder / "settings.json").write_text(json.dumps(settings(folder, model)), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["finetune.py", "--config", str(folder / "settings.json"), *words])
    with chdir(folder):
        script.main()
    return capsys.readouterr().out


def test_config_and_tokenizer_are_enough(monkeypatch, capsys, tmp_path, bare_model):
    out = run_script(monkeypatch, capsys, tmp_path, bare_model, "--dry-run", "--for-gpu", "rtx4060", "--show", "1")
    assert out.count("--- example") == 1
    assert "Verdict: fits" in out
    assert "on paper" in out
    assert "RTX 4060 in fp32, 7.2 GiB for the run" in out
    assert re.search(r"weights in 4 bits +0\.00 GiB", out)
    assert not (tmp_path / "outputs").exists()
    assert not (tmp_path / "logs").exists()


def test_a_preset_can_be_asked_about_where_there_is_no_gpu(monkeypatch, capsys, tmp_path, bare_model):
    words = ["--dry-run", "--set", "model.device=cuda"]
    out = run_script(monkeypatch, capsys, tmp_path, bare_model, *words, "--for-gpu", "rtx3060")
    assert "RTX 3060" in out.partition("Dry run")[2]
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="--for-gpu 8GB"):
            run_script(monkeypatch, capsys, tmp_path, bare_model, *words)


def test_training_still_wants_the_weights(monkeypatch, capsys, tmp_path, bare_model):
    with pytest.raises(UsageError, match=r"model\.safetensors missing"):
        run_script(monkeypatch, capsys, tmp_path, bare_model)


def test_a_model_that_is_there_is_measured_and_nothing_is_left(monkeypatch, capsys, tmp_path, tiny_model):
    out = run_script(monkeypatch, capsys, tmp_path, tiny_model, "--dry-run")
    assert "measured on 2 updates here" in out
    assert not (tmp_path / "outputs").exists()
    assert not list((tmp_path / "logs").glob("*"))


def test_for_gpu_belongs_to_a_dry_run(monkeypatch, capsys, tmp_path, bare_model):
    with pytest.raises(SystemExit):
        run_script(monkeypatch, capsys, tmp_path, bare_model, "--for-gpu", "8GB")
    assert "--dry-run" in capsys.readouterr().err


def test_a_preset_for_cuda_is_answered_without_one(tmp_path, tiny_model):
    wanted = config(tmp_path, tiny_model)
    wanted = wanted.model_copy(update={"model": wanted.model.model_copy(update={"device": "cuda"})})
    material = prepare(wanted, date(2026, 1, 1))
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="--for-gpu 8GB"):
            dry_run(wanted, material, None)
    assert "Verdict: fits" in dry_run(wanted, material, "6GB")


def test_the_hub_is_asked_for_small_files_only(monkeypatch, tmp_path, bare_model):
    asked = []

    def snapshot(name, **options):
        if options.get("local_files_only"):
            raise hub.LocalEntryNotFoundError("nothing")
        asked.append(options["allow_patterns"])
        return str(bare_model)

    monkeypatch.setattr(hub, "snapshot_download", snapshot)
    monkeypatch.setattr(hub.HfApi, "model_info", lambda *_, **__: None)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert hub.hub_model("owner/name", "other", False) == bare_model
    assert not [pattern for pattern in asked[0] if pattern.endswith(("safetensors", "bin", "*"))]
    with pytest.raises(UsageError, match=r"model\.safetensors missing"):
        hub.hub_model("owner/name", "other", True)
    assert "*.safetensors" in asked[1]


def forecast_in(wanted, model, size):
    """The forecast on a GPU with `size` bytes."""
    train = prepare(wanted, date(2026, 1, 1)).train.conversations
    room = Room("a room", "cuda", size, None, True)
    return forecasts.Forecast(wanted, train, read_architecture(model), room, "fp32", "adamw_torch", 0.0)


@pytest.mark.parametrize("share", [0.3, 0.8])
def test_advice_works_when_it_is_followed(monkeypatch, tmp_path, tiny_model, share):
    monkeypatch.setattr("persona.train.estimate.fit.CUDA_CONTEXT", 0.0)  # much more than this model
    wanted = config(tmp_path, tiny_model, train=40, training={"train_batch_size": 40, "optim": "adamw_torch"})
    material = prepare(wanted, date(2026, 1, 1))
    room = Room("a room", "cuda", share * forecast_in(wanted, tiny_model, 1e12).need, None, True)
    monkeypatch.setattr(module, "_room", lambda *_: room)
    text = dry_run(wanted, material, "6GB")
    assert "Verdict: does not fit" in text
    (advice,) = re.findall(r"It fits .* with (.*)", text)
    followed = Config.model_validate(apply(wanted.model_dump(), advice))
    assert "Verdict: fits" in dry_run(followed, material, "6GB")


def apply(values, advice):
    for name, value in re.findall(r"--set (\w+\.\w+)=(\S+)", advice):
        section, _, key = name.partition(".")
        values[section][key] = json.loads(value)
    return values


def test_no_advice_is_given_that_does_not_work(monkeypatch, tmp_path, tiny_model):
    wanted = config(tmp_path, tiny_model)
    monkeypatch.setattr(module, "_room", lambda *_: Room("a room", "cuda", 1e6, None))
    text = dry_run(wanted, prepare(wanted, date(2026, 1, 1)), "6GB")
    assert "Verdict: does not fit" in text
    assert "no pack fits" in text
    assert "smaller model" in text


def test_packs_of_size_auto_are_the_largest_and_a_continued_run_keeps_them(monkeypatch, tmp_path, tiny_model):
    wanted = config(tmp_path, tiny_model, train=16, training={"max_tokens_per_pack": "auto", "num_train_epochs": 1})
    lines = []

    def stop(trainer, _):
        if trainer.progress.step == 3:
            raise KeyboardInterrupt

    with chdir(tmp_path), pytest.raises(KeyboardInterrupt):
        finetune(wanted.model_copy(update={"training": wanted.training.model_copy(update={"save_steps": 2})}), True,
                 lines.append, observers=[stop])  # fmt: skip
    run = tmp_path / "outputs" / "tiny"
    limit = json.loads((run / "run.json").read_text(encoding="utf-8"))["max_tokens_per_pack"]
    assert f"up to {limit:,} tokens at a time" in "\n".join(lines)
    assert json.loads((run / "config.json").read_text(encoding="utf-8"))["training"]["max_tokens_per_pack"] == "auto"
    free = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free._replace(available=1))
    with chdir(tmp_path):
        finetune(wanted, True, lines.append)
    done = json.loads((run / "run.json").read_text(encoding="utf-8"))
    assert done["max_tokens_per_pack"] == limit
    assert done["memory"]["measured_gib"] > 0
    assert "estimated memory" in done["summary"]
    assert len([line for line in metrics(run) if "train/loss" in line]) == 4


def test_packs_of_size_auto_shrink_with_the_memory(monkeypatch, tmp_path, tiny_model):
    monkeypatch.setattr("persona.train.estimate.fit.CUDA_CONTEXT", 0.0)
    wanted = config(tmp_path, tiny_model, train=40, training={"max_tokens_per_pack": "auto", "train_batch_size": 40})
    large = forecast_in(wanted, tiny_model, 1e12)
    assert large.limit == large.work.largest_update
    some = [forecast_in(wanted, tiny_model, share * large.need) for share in (0.1, 0.7, 1.2)]
    limits = [one.limit for one in some]
    assert limits == sorted(limits)
    assert limits[0] == large.work.longest
    assert limits[-1] == large.limit
    assert limits[0] < limits[1] < limits[2]
    assert [one.verdict for one in some[1:]] == ["fits", "fits"]


def test_a_histogram_counts_every_example():
    text = histogram([5, 6, 7, 100, 799])
    assert sum(int(line.split()[-1]) for line in text.splitlines()) == 5
    assert len(text.splitlines()) == 8


def test_a_model_that_cannot_be_counted_on_paper_trains_all_the_same(tmp_path, tiny_model, monkeypatch):
    def broken(setup):
        raise NotImplementedError("no kernel without numbers")

    monkeypatch.setattr(forecasts, "OnPaper", broken)
    messages = []
    adapter = finetune(config(tmp_path, tiny_model, training={"num_train_epochs": 1}), True, messages.append)
    assert (adapter / "adapter_model.safetensors").is_file()
    assert "none: A step of this model cannot be counted on paper (no kernel" in "\n".join(messages)
    auto = config(tmp_path, tiny_model, training={"max_tokens_per_pack": "auto", "output_dir": "outputs/auto"})
    with pytest.raises(UsageError, match="max_tokens_per_pack to a number"):
        finetune(auto, True, messages.append)


def test_a_config_that_cannot_be_read_is_called_so_and_not_a_matter_of_packs(tmp_path, tiny_model):
    wanted = config(tmp_path, tiny_model, training={"max_tokens_per_pack": "auto"})
    train = prepare(wanted, date(2026, 1, 1)).train.conversations
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text('{"model_type": "unheard_of"}', encoding="utf-8")
    forecast = forecasts.forecast_here(wanted, tmp_path / "odd", train, torch.device("cpu"), "fp32", "adamw_torch")
    with pytest.raises(UsageError, match="cannot be loaded") as caught:
        forecast()
    assert "max_tokens_per_pack" not in str(caught.value)


def test_a_cpu_needs_the_files_of_a_base_in_4_bits_beside_its_weights(tmp_path, tiny_model):
    wanted = config(tmp_path, tiny_model, quantization={"load_in_4bit": True})
    material = prepare(wanted, date(2026, 1, 1))
    here = forecasts.Forecast(
        wanted, material.train.conversations, read_architecture(tiny_model), Room("this CPU", "cpu", 1e12, None),
        "fp32", "adamw_torch", 1e9,
    )  # fmt: skip
    lasting = here.step.parts["weights in 4 bits"] + here.step.parts["other weights"]
    assert here.loading == here.resident + 2 * here.paper.weights + lasting
    here.paper.weights = int(6e11)  # so large that loading takes the most: pages of files, which can be taken back
    assert here.need < 1e12 < here.loading
    assert module._verdict(here).startswith("fits: ")
    assert module._verdict(here).endswith(
        "Loading shows up to 1118.6 GiB for a moment, with pages of the model's files."
    )
    assert forecast_in(wanted, tiny_model, 1e12).loading == 0
