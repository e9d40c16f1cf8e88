"""A whole run on the tiny model, in a folder of its own, in a second or two."""

import json
from pathlib import Path
from typing import Any

from persona.config import Config

QUESTIONS = ("Who are you?", "What time is it?", "Where is the cat?", "Is it cold?", "Do you sleep?", "What is that?")
REPLIES = ("Aye, I keep the lamp.", "Three lanterns past noon.", "In the bread box.", "Only on Thursdays.")


def conversations(count: int, turns: int = 1) -> list[dict[str, Any]]:
    """Records with `turns` exchanges each, no two alike."""
    records = []
    for number in range(count):
        messages = []
        for turn in range(turns + number % 2):
            question, reply = QUESTIONS[(number + turn) % 6], REPLIES[(number + 2 * turn) % 4]
            messages += [{"role": "user", "content": f"{question} ({number})"}]
            messages += [{"role": "assistant", "content": f"{reply} Mind the tide, {number}."}]
        records.append({"messages": messages, "meta": {"group": f"c{number}", "type": "dialogue"}})
    return records


def write_jsonl(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def settings(
    folder: Path, model: Path, train: int = 12, held_out: int = 3, **changes: dict[str, Any]
) -> dict[str, Any]:
    """The settings of a tiny run in `folder` as values, after writing its data; `changes` go into the sections."""
    write_jsonl(folder / "train.jsonl", conversations(train))
    write_jsonl(folder / "val.jsonl", conversations(train + held_out)[train:])
    values: dict[str, dict[str, Any]] = {
        "model": {"name_or_path": str(model)},
        "quantization": {"load_in_4bit": False},
        "lora": {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1},
        "data": {
            "train_file": str(folder / "train.jsonl"),
            "validation_file": str(folder / "val.jsonl"),
            "system_prompt": "You keep the lamp.",
            "max_length": 256,
        },
        "training": {
            "output_dir": str(folder / "outputs" / "tiny"),
            "num_train_epochs": 2,
            "train_batch_size": 4,
            "learning_rate": 0.01,
            "precision": "fp32",
        },
        "generation": {"max_new_tokens": 8, "temperature": 0, "repetition_penalty": 1.0},
        "evaluation": {"eval_steps": 2, "sample_prompts": 0},
    }
    for section, keys in changes.items():
        values.setdefault(section, {}).update(keys)
    return values


def config(folder: Path, model: Path, train: int = 12, held_out: int = 3, **changes: dict[str, Any]) -> Config:
    """The same as a Config."""
    return Config.model_validate(settings(folder, model, train, held_out, **changes))


def metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def adapter_bytes(run: Path) -> bytes:
    """The weights of the finished adapter."""
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()
