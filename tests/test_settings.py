"""Every setting does something: change one, do the same thing again, and see another run, file or output."""

import contextlib
import io
import json
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from making.runs import adapter_bytes, conversations, metrics, settings, write_jsonl
from making.tiny import TEMPLATES, family, save_model
from safetensors.torch import load_file
from torch.nn.modules.module import register_module_forward_pre_hook

import merge_lora_to_fp16
from persona.config import Config, all_settings, dump_config
from persona.errors import EnvironmentFault
from persona.model.sources import resolve_model
from persona.speak.chat import chat
from persona.speak.speaker import Speaker, load_speaker
from persona.train.run import finetune, prepare

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory, tiny_model):
    """The current folder: two models, the data, and a folder for each run."""
    folder = tmp_path_factory.mktemp("settings")
    settings(folder, tiny_model)
    shutil.copytree(tiny_model, folder / "tiny")
    save_model(folder / "narrow", "llama", family("chatml_default"), intermediate_size=96)
    (folder / "other.jinja").write_text(TEMPLATES["builtin"].replace("User", "Guest"), encoding="utf-8")
    write_jsonl(folder / "others.jsonl", conversations(40)[20:32])
    write_jsonl(folder / "lore.jsonl", conversations(60)[50:55])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder
        train.cache_clear()


# --- what is done, with the settings `config` -------------------------------------------------------------------------


@dataclass
class Run:
    """A finished run of three updates."""

    folder: Path
    passes: Counter[tuple[str, bool, tuple[int, ...]]]
    """How often each kind of module ran, whether in training, and the shape of its input."""


@cache
def train(text: str) -> Run:
    """The run with the settings `text`, in a folder of its own beside the data."""
    passes: Counter[tuple[str, bool, tuple[int, ...]]] = Counter()

    def count(module, inputs):
        if inputs and isinstance(inputs[0], torch.Tensor):
            passes[type(module).__name__, module.training, tuple(inputs[0].shape)] += 1

    folder = Path(f"run-{len(list(Path().glob('run-*')))}")
    folder.mkdir()
    hook = register_module_forward_pre_hook(count)
    try:
        with contextlib.chdir(folder):
            finetune(Config.model_validate_json(text), True, lambda _: None)
    finally:
        hook.remove()
        AcceleratorState._reset_state()  # accelerate keeps the precision of a process's first run
    return Run(folder, passes)


def run_of(config: Config) -> Run:
    return train(dump_config(config))


def output(config: Config) -> Path:
    return run_of(config).folder / config.training.output_dir


def logged(config: Config, name: str) -> list[tuple[int, float]]:
    return [(line["step"], line[name]) for line in metrics(output(config)) if name in line]


def speaker(config: Config) -> Speaker:
    with contextlib.chdir("tiny"):  # any subfolder, as the paths begin with ../
        return load_speaker(config, resolve_model(config.model.name_or_path), None, config.quantization.load_in_4bit)


# --- what is observed -------------------------------------------------------------------------------------------------


def weights(config: Config) -> bytes:
    return adapter_bytes(output(config))


def adapted_tensors(config: Config) -> dict[str, tuple[int, ...]]:
    tensors = load_file(output(config) / "adapter" / "adapter_model.safetensors")
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def learning_rates(config: Config) -> list[tuple[int, float]]:
    return logged(config, "train/learning_rate")


def logged_updates(config: Config) -> list[int]:
    return [step for step, _ in logged(config, "train/loss")]


def held_out_losses(config: Config) -> list[tuple[int, float]]:
    return logged(config, "eval/loss")


def loss_of_the_base(config: Config) -> tuple[int, float]:
    return held_out_losses(config)[0]


def folders(config: Config) -> set[str]:
    folder = run_of(config).folder
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_dir()}


def optimizer_state(config: Config) -> set[str]:
    newest = max(output(config).glob("checkpoint-*"))
    return {str(tensor.dtype) for tensor in load_file(newest / "optimizer.safetensors").values()}


def passes_in_training(config: Config) -> Counter[tuple[int, ...]]:
    return Counter({key: number for key, number in run_of(config).passes.items() if key[1]})


def passes_in_evaluation(config: Config) -> Counter[tuple[int, ...]]:
    return Counter({key: number for key, number in run_of(config).passes.items() if not key[1]})


def samples(config: Config) -> list[str]:
    return (output(config) / "samples.jsonl").read_text(encoding="utf-8").splitlines()


def examples(config: Config) -> list[list[int]]:
    with contextlib.chdir("tiny"):
        return [list(example.prompt_ids) for example in prepare(config, date(2026, 1, 1)).train.examples]


def device(config: Config) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        try:
            return str(speaker(config).model.device)
        except EnvironmentFault as fault:
            return str(fault).partition(";")[0]


def reply(config: Config) -> str:
    torch.manual_seed(0)
    return speaker(config).reply([{"role": "user", "content": "Who are you?"}], lambda _: None)


def prompt_on_the_terminal(config: Config) -> str:
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as shown:
        patch.setattr(sys, "stdin", io.StringIO("/quit\n"))
        chat(speaker(config), None)
    return shown.getvalue()


def merged_files(config: Config) -> dict[str, set[str]]:
    adapter = output(config.model_copy(update={"export": BASE.export}))
    target = Path(f"merged-{len(list(Path().glob('merged-*')))}")
    target.mkdir()
    (target / "settings.json").write_text(dump_config(config), encoding="utf-8")
    words = [f"../{adapter}", "--config", "settings.json", "--output", "merged", "--no-verify"]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()), contextlib.chdir(target):
        patch.setattr(sys, "argv", ["merge_lora_to_fp16.py", *words])
        merge_lora_to_fp16.main()
    files = sorted((target / "merged").glob("*.safetensors"))
    return {path.name: {str(tensor.dtype) for tensor in load_file(path).values()} for path in files}


# --- the cases --------------------------------------------------------------------------------------------------------


def values() -> dict[str, Any]:
    made = {
        "model": {"name_or_path": "../tiny", "device": "cpu"},
        "quantization": {"load_in_4bit": False},
        "lora": {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1},
        "data": {
            "train_file": "../train.jsonl",
            "validation_file": "../val.jsonl",
            "system_prompt": "You keep the lamp.",
            "max_length": 256,
        },
        "training": {
            "output_dir": "outputs/tiny",
            "num_train_epochs": 1,
            "train_batch_size": 4,
            "learning_rate": 0.01,
            "optim": "adamw_torch",
            "precision": "fp32",
        },
        "generation": {"max_new_tokens": 8, "temperature": 0, "repetition_penalty": 1.0},
        "evaluation": {"eval_steps": 2, "sample_prompts": 0},
    }
    return json.loads(json.dumps(made))


BASE = Config.model_validate(values())


def changed(changes: dict[str, Any]) -> Config:
    """BASE with the settings in `changes`, by their dotted names."""
    made = values()
    for name, value in changes.items():
        section, _, key = name.rpartition(".")
        (made.setdefault(section, {}) if section else made)[key] = value
    return Config.model_validate(made)


@dataclass(frozen=True)
class Case:
    """Another value for a setting, and where the difference is seen."""

    value: Any
    observe: Callable[[Config], Any]
    on_top_of: dict[str, Any] = field(default_factory=dict)
    """Settings that both sides have, without which this one cannot act."""


IN_4_BITS = {"quantization.load_in_4bit": True}
LEARNS_NOTHING = {"training.learning_rate": 1e-30, "evaluation.eval_steps": 1}  # so no evaluation is better

CASES = {
    "model.name_or_path": Case("../narrow", adapted_tensors),
    "model.chat_template": Case("../other.jinja", examples),
    "model.device": Case("cuda", device),
    "quantization.load_in_4bit": Case(True, loss_of_the_base),
    "quantization.bnb_4bit_quant_type": Case("fp4", loss_of_the_base, IN_4_BITS),
    "quantization.bnb_4bit_use_double_quant": Case(False, loss_of_the_base, IN_4_BITS),
    "lora.r": Case(8, adapted_tensors),
    "lora.lora_alpha": Case(16, held_out_losses),
    "lora.lora_dropout": Case(0.0, weights),
    "lora.target_modules": Case(["q_proj"], adapted_tensors),
    "data.train_file": Case("../others.jsonl", examples),
    "data.validation_file": Case("../others.jsonl", loss_of_the_base),
    "data.lore_file": Case("../lore.jsonl", examples),
    "data.lore_weight": Case(0.5, examples, {"data.lore_file": "../lore.jsonl"}),
    "data.system_prompt": Case("You are the lamp.", examples),
    "data.max_length": Case(64, examples),
    "training.output_dir": Case("outputs/other", folders),
    "training.num_train_epochs": Case(2, logged_updates),
    "training.train_batch_size": Case(6, logged_updates),
    "training.max_tokens_per_pack": Case(64, passes_in_training),
    "training.learning_rate": Case(0.02, weights),
    "training.lr_scheduler_type": Case("constant", learning_rates),
    "training.warmup_ratio": Case(0.5, learning_rates),
    "training.weight_decay": Case(0.5, weights),
    "training.max_grad_norm": Case(1e-4, weights),
    "training.optim": Case("adamw_8bit", optimizer_state, {"lora.r": 64}),  # 4,096 values, which 8-bit states begin at
    "training.precision": Case("bf16", loss_of_the_base),
    "training.gradient_checkpointing": Case(True, passes_in_training),
    "training.save_steps": Case(2, folders, {"data.validation_file": None}),
    "training.logging_steps": Case(2, logged_updates, {"training.num_train_epochs": 2}),
    "generation.max_new_tokens": Case(4, reply),
    "generation.temperature": Case(1.0, reply),
    "generation.top_p": Case(0.05, reply, {"generation.temperature": 1.0}),
    "generation.repetition_penalty": Case(2.0, reply, {"generation.max_new_tokens": 40}),
    "generation.prompt_label": Case("请输入：", prompt_on_the_terminal),
    "evaluation.eval_steps": Case(1, held_out_losses),
    "evaluation.early_stopping_patience": Case(1, logged_updates, LEARNS_NOTHING),
    "evaluation.max_tokens_per_pack": Case(64, passes_in_evaluation),
    "evaluation.sample_prompts": Case(1, samples),
    "export.dtype": Case("bfloat16", merged_files),
    "export.max_shard_size_gb": Case(1e-4, merged_files),
    "seed": Case(1, weights),
}


def test_every_setting_has_a_case():
    assert sorted(CASES) == sorted(all_settings())


@pytest.mark.parametrize("name", CASES)
def test_a_setting_changes_what_is_observed(name):
    case = CASES[name]
    before, after = changed(case.on_top_of), changed(case.on_top_of | {name: case.value})
    assert before != after
    assert case.observe(before) != case.observe(after)


def test_the_same_settings_show_no_difference():
    sides = {(case.observe.__name__, str(case.on_top_of)): case for case in CASES.values()}
    assert len(sides) > 15
    first = {side: case.observe(changed(case.on_top_of)) for side, case in sides.items()}
    train.cache_clear()
    for side, case in sides.items():
        assert case.observe(changed(case.on_top_of)) == first[side], side
