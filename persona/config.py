"""The settings of a run: one JSON file, checked in full before anything heavy is imported.

Each setting says its name, type, bounds, default and meaning once, here; the JSON Schema and the README's table are
generated from it. Unknown keys are errors, all mistakes are reported together, and values are never coerced.
"""

import difflib
import json
import re
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from persona.errors import UsageError
from persona.files import read_json

# --- foreign names ----------------------------------------------------------------------------------------------------
# Names of settings that people bring from other tools, and what replaces them here.

FOREIGN_NAMES = {
    "per_device_train_batch_size": "training.train_batch_size (conversations in one weight update, over all devices = "
    "per_device_train_batch_size x gradient_accumulation_steps x devices)",
    "gradient_accumulation_steps": "training.train_batch_size (it already counts the whole update); memory is "
    "training.max_tokens_per_pack",
    "grad_accum": "training.train_batch_size (it already counts the whole update)",
    "max_steps": "training.num_train_epochs (a fraction is fine)",
    "batch_size": "training.train_batch_size (conversations in one weight update)",
    "micro_batch_size": "training.max_tokens_per_pack (tokens in memory at a time)",
    "per_device_eval_batch_size": "evaluation.max_tokens_per_pack (tokens in memory at a time)",
    "eval_batch_size": "evaluation.max_tokens_per_pack (tokens in memory at a time)",
    "cutoff_len": "data.max_length",
    "max_seq_length": "data.max_length",
    "max_seq_len": "data.max_length",
    "model_max_length": "data.max_length",
    "lora_rank": "lora.r",
    "lora_r": "lora.r",
    "rank": "lora.r",
    "alpha": "lora.lora_alpha",
    "lora_target": "lora.target_modules",
    "lora_target_modules": "lora.target_modules",
    "dropout": "lora.lora_dropout",
    "evaluation_strategy": "evaluation.eval_steps (updates between evaluations; null = once an epoch)",
    "eval_strategy": "evaluation.eval_steps (updates between evaluations; null = once an epoch)",
    "save_strategy": "training.save_steps (updates between checkpoints; null = once an epoch)",
    "load_best_model_at_end": "evaluation.early_stopping_patience (the best adapter is always the one kept)",
    "epochs": "training.num_train_epochs",
    "num_epochs": "training.num_train_epochs",
    "lr": "training.learning_rate",
    "warmup_steps": "training.warmup_ratio (a share of all updates, 0 to 1)",
    "optimizer": "training.optim",
    "bf16": 'training.precision: "bf16"',
    "fp16": 'training.precision: "fp16"',
    "model_name": "model.name_or_path",
    "model_name_or_path": "model.name_or_path",
    "base_model": "model.name_or_path",
    "template": "model.chat_template (null = the model's own, which is nearly always right)",
    "dataset": "data.train_file",
    "settings_file": "data.lore_file",
    "settings_weight": "data.lore_weight",
    "val_file": "data.validation_file",
    "eval_file": "data.validation_file",
    "val_size": "convert_dataset.py --val-ratio",
    "load_in_8bit": "quantization.load_in_4bit",
    "quantization_bit": "quantization.load_in_4bit (true or false)",
    "logging_dir": "training.output_dir (TensorBoard goes to logs/<its last part>)",
    "report_to": "nothing: TensorBoard and metrics.jsonl are always written, and nothing is uploaded",
    "max_tokens": "generation.max_new_tokens",
    "do_sample": "generation.temperature (0 = greedy)",
}


DEFAULT_CONFIG = Path("config/default.json")
_SECRET = re.compile(r"(hf|hub|access|auth|api)_?token|^token$|api_?key|password|secret", re.IGNORECASE)


class Section(BaseModel):
    """A group of settings; strict, frozen, and closed to unknown names."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


class Model(Section):
    """Which language model is tuned, and where it runs."""

    name_or_path: str = Field(min_length=1)
    """The embedded default `smollm2-135m-instruct`, a folder in Hugging Face form, a GGUF file, or a hub id."""
    chat_template: str | None = Field(default=None, min_length=1)
    """A Jinja file that replaces the model's own chat template; null keeps the model's own."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Where to compute: `auto` takes the GPU when there is one."""


class Quantization(Section):
    """How the frozen base model is held in memory while training."""

    load_in_4bit: bool = True
    """Hold the base in 4 bits (QLoRA); false holds it in 16 bits."""
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    """The 4-bit number format; nf4 is the one of the QLoRA paper (arXiv 2305.14314)."""
    bnb_4bit_use_double_quant: bool = True
    """Quantize the quantization constants too; saves about 0.4 bit a weight."""


class Lora(Section):
    """The adapter: two thin matrices beside each chosen linear layer (arXiv 2106.09685)."""

    r: int = Field(default=16, ge=1, le=1024)
    """Rank of the adapter; more learns more and memorises more."""
    lora_alpha: float = Field(default=32.0, gt=0)
    """The adapter's output is scaled by lora_alpha / r; twice r is usual."""
    lora_dropout: float = Field(default=0.05, ge=0, lt=1)
    """Share of the adapter's inputs dropped while training."""
    target_modules: Literal["all-linear"] | list[str] = Field(default="all-linear", min_length=1)
    """`all-linear`, or a list of layer names such as ["q_proj", "v_proj"]."""


class Data(Section):
    """What is learned from."""

    train_file: str = Field(min_length=1)
    """Conversations to learn, as `convert_dataset.py` writes them."""
    validation_file: str | None = Field(default=None, min_length=1)
    """Conversations held out to measure on; null trains without evaluation."""
    lore_file: str | None = Field(default=None, min_length=1)
    """Questions about the character's world and background texts, mixed into training; null for none."""
    lore_weight: float = Field(default=1.0, ge=0, le=100)
    """How many times the lore file is repeated; a fraction is a seeded choice."""
    system_prompt: str | None = None
    """System prompt of conversations without one: text, or @FILE; null takes the most frequent in the data."""
    max_length: int = Field(default=2048, ge=16)
    """Longest example in tokens; older turns are dropped to fit, never part of a reply."""


class Training(Section):
    """How it is learned."""

    output_dir: str = Field(min_length=1)
    """Folder of the run; TensorBoard goes to a folder of the same name in `logs`."""
    num_train_epochs: float = Field(default=3.0, gt=0, le=1000)
    """Passes over the training data."""
    train_batch_size: int = Field(default=8, ge=1)
    """Conversations behind one weight update, over all devices."""
    max_tokens_per_pack: int = Field(default=2048, ge=16)
    """Tokens in memory at a time; lower it when memory runs out, it never changes what is learned."""
    learning_rate: float = Field(default=2e-4, gt=0, le=1)
    """Peak step size; 1e-4 to 3e-4 for models of 1B and more, up to 1e-3 for the small embedded one."""
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = "cosine"
    """Course of the learning rate after the warm-up."""
    warmup_ratio: float = Field(default=0.05, ge=0, lt=1)
    """Share of all updates over which the learning rate rises from zero."""
    weight_decay: float = Field(default=0.0, ge=0, le=1)
    """Pull of the adapter's weights towards zero, decoupled (AdamW)."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients longer than this are scaled down to it."""
    optim: Literal["auto", "adamw_torch", "adamw_8bit", "paged_adamw_8bit"] = "auto"
    """Optimizer; `auto` is paged_adamw_8bit on CUDA and adamw_torch elsewhere."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Arithmetic; `auto` is bf16 where the device has it, else fp16 on CUDA and fp32 on the CPU."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: much less memory, about a third more time."""
    save_steps: int | None = Field(default=None, ge=1)
    """Updates between checkpoints; null saves once an epoch. The best one is always saved too."""
    logging_steps: int = Field(default=1, ge=1)
    """Updates between lines of training metrics."""


class Generation(Section):
    """How the tuned model speaks in `test_model.py`."""

    max_new_tokens: int = Field(default=256, ge=1)
    """Longest reply in tokens."""
    temperature: float = Field(default=0.7, ge=0, le=5)
    """Randomness of the choice of words; 0 always takes the likeliest."""
    top_p: float = Field(default=0.9, gt=0, le=1)
    """Choose among the likeliest tokens that together have this probability."""
    repetition_penalty: float = Field(default=1.05, ge=1, le=2)
    """Above 1 makes tokens that were already used less likely (arXiv 1909.05858)."""
    prompt_label: str = "You: "
    """What stands before the line you type in chat."""


class Evaluation(Section):
    """When and how the held-out loss is measured."""

    eval_steps: int | None = Field(default=None, ge=1)
    """Updates between evaluations; null evaluates once an epoch."""
    early_stopping_patience: int | None = Field(default=3, ge=1)
    """Stop after this many evaluations in a row without improvement; null never stops early."""
    max_tokens_per_pack: int = Field(default=2048, ge=16)
    """Tokens in memory at a time while evaluating; never changes the result."""
    sample_prompts: int = Field(default=4, ge=0, le=64)
    """Held-out prompts answered at every evaluation, so that you hear it learn (`samples.jsonl`); 0 is none."""


class Export(Section):
    """The merged model."""

    dtype: Literal["float16", "bfloat16"] = "float16"
    """Number format of the merged weights; llama.cpp reads both."""
    max_shard_size_gb: float = Field(default=4.0, gt=0)
    """Largest safetensors file in gigabytes (10^9 bytes)."""


class Config(Section):
    """Every setting of a run."""

    model: Model
    quantization: Quantization = Quantization()
    lora: Lora = Lora()
    data: Data
    training: Training
    generation: Generation = Generation()
    evaluation: Evaluation = Evaluation()
    export: Export = Export()
    seed: int = Field(default=0, ge=0, le=2**32 - 1)
    """Order of the data, start of the adapter and dropout: the same seed gives the same run."""

    @model_validator(mode="before")
    @classmethod
    def _drop_schema_line(cls, value: Any) -> Any:
        return {k: v for k, v in value.items() if k != "$schema"} if isinstance(value, dict) else value


def load_config(path: Path, overrides: list[str]) -> Config:
    """The settings in `path`, changed by `section.key=value` overrides; raises `UsageError` naming every mistake."""
    if path.is_dir():
        raise UsageError(f"{path} is a folder; name the JSON file in it, for example {path / 'config.json'}.")
    if not path.exists():
        raise UsageError(f"{path}: no such file. Start from config/default.json or one of config/presets/.")
    values = read_json(path, "JSON has no comments, no comma after the last item, and only double quotes.")
    mistakes = [problem for text in overrides if (problem := _override(values, text)) is not None]
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        mistakes += _explain(error.errors())
        config = None
    if mistakes or config is None:
        count = "1 mistake" if len(mistakes) == 1 else f"{len(mistakes)} mistakes"
        source = f"{path}" + (" with --set" if overrides else "")
        raise UsageError(f"{count} in the settings ({source}):\n" + "\n".join(f"  - {line}" for line in mistakes))
    return config


def _override(values: dict[str, Any], text: str) -> str | None:
    name, equals, raw = text.partition("=")
    path = name.strip().split(".")
    if not equals or not all(path):
        return f"--set {text}: expected section.key=value, for example --set training.learning_rate=1e-4"
    is_text = _is_text(path)
    try:
        value = json.loads(raw)
    except json.JSONDecodeError:
        value = raw
    except (ValueError, RecursionError):
        if not is_text:
            return (
                f"--set {name.strip()}: no setting takes a number this long or brackets this deep; write a plain value"
            )
        value = raw
    if is_text and value is not None and not isinstance(value, str):
        value = raw  # a folder may be called 2024
    section: Any = values
    for key in path[:-1]:
        section = section.setdefault(key, {})
        if not isinstance(section, dict):
            return f"--set {text}: {key} is not a section"
    section[path[-1]] = value
    return None


def _is_text(path: list[str]) -> bool:
    section = Config.model_fields.get(path[0])
    field = getattr(section.annotation, "model_fields", {}).get(path[-1]) if section and len(path) == 2 else None
    return field is not None and field.annotation in (str, str | None)


def setting_names() -> list[str]:
    """The dotted name of every setting, in the order of the file."""
    names = []
    for section, field in Config.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            names += [f"{section}.{key}" for key in kind.model_fields]
        else:
            names.append(section)
    return names


def _explain(details: list[ErrorDetails]) -> list[str]:
    """One line a setting; the alternatives of a union become one sentence."""
    lines: dict[str, str] = {}
    for detail in details:
        # pydantic adds the branch of a union to the place: literal['all-linear'], list[str]
        place = [str(part) for part in detail["loc"] if "[" not in str(part)]
        name = ".".join(place)
        if detail["type"] == "extra_forbidden":
            lines[name] = _explain_unknown(name, place[-1])
        elif detail["type"] == "missing":
            lines[name] = f"{name} is missing, and it has no default"
        elif name in lines:
            lines[name] += f" or {_expected(detail)}"
        else:
            found = json.dumps(detail["input"], ensure_ascii=False, default=str)
            lines[name] = f"{name}: found {found}; expected {_expected(detail)}"
    return list(lines.values())


_TYPES = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text in double quotes",
    "string_too_short": "some text",
    "list_type": "a list",
    "too_short": "at least one name",
    "model_type": "a section in braces {...}",
    "finite_number": "a finite number",
}


def _expected(detail: ErrorDetails) -> str:
    wanted = _TYPES.get(detail["type"], detail["msg"].replace("Input should be ", "a value "))
    quoted = isinstance(detail["input"], str) and detail["type"] in {"int_type", "float_type", "bool_type"}
    return wanted + " (without quotation marks)" if quoted else wanted


def _explain_unknown(name: str, key: str) -> str:
    if _SECRET.search(key):
        return f"{name}: keys and tokens do not belong into this file; log in with `hf auth login` instead"
    if key in FOREIGN_NAMES:
        return f"{name} is not a setting here; use {FOREIGN_NAMES[key]}"
    known = setting_names()
    if key in known:
        section, _, inner = key.partition(".")
        return f'{name}: a name with a dot is for --set; here write "{section}": {{"{inner}": ...}}'
    close = difflib.get_close_matches(name, known, 1, 0.6)
    if not close:
        by_key = {setting.rpartition(".")[2]: setting for setting in known}
        close = [by_key[match] for match in difflib.get_close_matches(key, by_key, 1, 0.6)]
    hint = f"did you mean {close[0]}?" if close else f"the sections are {', '.join(Config.model_fields)}"
    return f"{name} is not a setting; {hint}"


def dump_config(config: Config) -> str:
    """`config` as JSON text with every setting, which loads back equal."""
    return json.dumps(config.model_dump(), ensure_ascii=False, indent=2) + "\n"


def schema_text() -> str:
    """The JSON Schema of the settings file, for editors; `python -m persona.config` writes it to config/schema.json."""
    schema = Config.model_json_schema()
    schema["properties"] = {"$schema": {"type": "string"}} | schema["properties"]
    return json.dumps(schema, ensure_ascii=False, indent=2) + "\n"


def settings_table() -> str:
    """A Markdown table of every setting with its default and meaning, as it stands in the README."""
    lines = ["| setting | default | meaning |", "|---|---|---|"]
    for name in setting_names():
        section, _, key = name.rpartition(".")
        owner = Config.model_fields[section].annotation if section else Config
        field = owner.model_fields[key]  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]
        default = json.dumps(field.default, ensure_ascii=False) if not field.is_required() else "(required)"
        lines.append(f"| `{name}` | `{default}` | {field.description} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    Path("config/schema.json").write_text(schema_text(), encoding="utf-8", newline="\n")
