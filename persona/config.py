"""The settings of a run: one JSON file, checked in full before anything heavy is imported.

Every setting is defined here; `python -m persona.config` writes the JSON Schema and the table in config/README.md.
Unknown keys are errors, all mistakes are reported together, and values are never coerced.
"""

import difflib
import json
import os
import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from persona.errors import UsageError
from persona.files import JsonObject, read_json, write_text

_NAMES_ELSEWHERE = {
    "per_device_train_batch_size": "training.train_batch_size (conversations in one weight update, over all devices = "
    "per_device_train_batch_size x gradient_accumulation_steps x devices)",
    "gradient_accumulation_steps": "training.train_batch_size (it already counts the whole update); "
    "memory is training.max_tokens_per_pack",
    "grad_accum": "training.train_batch_size (it already counts the whole update)",
    "max_steps": "training.num_train_epochs (a fraction is fine)",
    "batch_size": "training.train_batch_size (conversations in one weight update)",
    "micro_batch_size": "training.max_tokens_per_pack (tokens in memory at a time)",
    "per_device_eval_batch_size eval_batch_size": "evaluation.max_tokens_per_pack (tokens in memory at a time)",
    "cutoff_len max_seq_length max_seq_len model_max_length": "data.max_length",
    "lora_rank lora_r rank": "lora.r",
    "alpha": "lora.lora_alpha",
    "lora_target lora_target_modules": "lora.target_modules",
    "dropout": "lora.lora_dropout",
    "evaluation_strategy eval_strategy": "evaluation.eval_steps (updates between evaluations; null = once an epoch)",
    "save_strategy": "training.save_steps (updates between checkpoints; null = once an epoch)",
    "load_best_model_at_end": "evaluation.early_stopping_patience (the best adapter is always the one kept)",
    "epochs num_epochs": "training.num_train_epochs",
    "lr": "training.learning_rate",
    "warmup_steps": "training.warmup_ratio (a share of all updates, 0 to 1)",
    "optimizer": "training.optim",
    "bf16": 'training.precision: "bf16"',
    "fp16": 'training.precision: "fp16"',
    "model_name model_name_or_path base_model": "model.name_or_path",
    "template": "model.chat_template (null = the model's own, which is nearly always right)",
    "dataset": "data.train_file",
    "settings_file": "data.lore_file",  # our own names until lore was called lore
    "settings_weight": "data.lore_weight",
    "val_file eval_file": "data.validation_file",
    "val_size": "convert_dataset.py --val-ratio",
    "load_in_8bit": "quantization.load_in_4bit",
    "quantization_bit": "quantization.load_in_4bit (true or false)",
    "logging_dir": "training.output_dir (TensorBoard goes to logs/<its last part>)",
    "report_to": "nothing: TensorBoard and metrics.jsonl are always written, and nothing is uploaded",
    "max_tokens": "generation.max_new_tokens",
    "do_sample": "generation.temperature (0 = greedy)",
}
FOREIGN_NAMES = {name: advice for names, advice in _NAMES_ELSEWHERE.items() for name in names.split()}
"""Names of settings that people bring from other tools, and the setting to use here."""

DEFAULT_CONFIG = Path("config/default.json")
_SECRET = re.compile(r"(hf|hub|access|auth|api)_?token|^token$|api_?key|password|secret", re.IGNORECASE)


class Section(BaseModel):
    """A group of settings; strict, frozen, and closed to unknown names."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


class Model(Section):
    """The language model to tune, and the device it runs on."""

    name_or_path: str = Field(min_length=1)
    """Base model: embedded `smollm2-135m-instruct` or `gemma3-270m`, a Hugging Face folder, GGUF file, or hub id."""
    chat_template: str | None = Field(default=None, min_length=1)
    """Jinja file to use instead of the model's own chat template; null keeps the model's own."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Device to compute on; `auto` takes the GPU if there is one, `cuda` stops if there is none."""


class Quantization(Section):
    """The base model's number format in memory during training."""

    load_in_4bit: bool = True
    """Hold the base model in 4 bits (QLoRA) to save memory; false holds it in `training.precision`."""
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    """4-bit number format; nf4 is the one from the QLoRA paper (arXiv 2305.14314)."""
    bnb_4bit_use_double_quant: bool = True
    """Quantize the quantization constants too; saves about 0.4 bit per weight."""


class Lora(Section):
    """The adapter: two thin matrices beside each chosen linear layer (arXiv 2106.09685)."""

    r: int = Field(default=16, ge=1, le=1024)
    """Rank of the adapter; a higher rank learns more and memorises more."""
    lora_alpha: float = Field(default=32.0, gt=0)
    """Scale of the adapter: its output is multiplied by lora_alpha / r; twice r is usual."""
    lora_dropout: float = Field(default=0.05, ge=0, lt=1)
    """Share of the adapter's inputs dropped at random while training."""
    target_modules: Literal["all-linear"] | list[str] = Field(default="all-linear", min_length=1)
    """Layers that get an adapter: `all-linear`, or a list of names such as ["q_proj", "v_proj"]."""


class Data(Section):
    """The texts to learn from and to measure on."""

    train_file: str = Field(min_length=1)
    """Conversations to learn, in the format that `convert_dataset.py` writes."""
    validation_file: str | None = Field(default=None, min_length=1)
    """Held-out conversations to measure the loss on; null trains without evaluation."""
    lore_file: str | None = Field(default=None, min_length=1)
    """Lore to mix into training: questions about the character's world and background texts; null for none."""
    lore_weight: float = Field(default=1.0, ge=0, le=100)
    """Copies of the lore file in training; a fraction adds a random part of it, chosen by the seed."""
    system_prompt: str | None = None
    """System prompt for conversations without one: text, or @FILE; null takes the most frequent in the data."""
    max_length: int = Field(default=2048, ge=16)
    """Longest example in tokens; older turns are dropped to fit, never part of a reply."""


class Training(Section):
    """The training run: length, batch, learning rate, memory and files."""

    output_dir: str = Field(min_length=1)
    """Folder for the run's results; TensorBoard logs go to a folder of the same name in `logs`."""
    num_train_epochs: float = Field(default=3.0, gt=0, le=1000)
    """Passes over the training data; a fraction is fine."""
    train_batch_size: int = Field(default=8, ge=1)
    """Conversations per weight update, over all devices."""
    max_tokens_per_pack: Annotated[int, Field(ge=16)] | Literal["auto"] = 2048
    """Tokens in memory at a time; lower it when memory runs out, or `auto`. It never changes the learned result."""
    learning_rate: float = Field(default=2e-4, gt=0, le=1)
    """Peak learning rate; 1e-4 to 3e-4 for models of 1B and more, up to 1e-3 for the small embedded one."""
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = "cosine"
    """Course of the learning rate after the warm-up."""
    warmup_ratio: float = Field(default=0.05, ge=0, lt=1)
    """Share of all updates over which the learning rate rises to its peak."""
    weight_decay: float = Field(default=0.0, ge=0, le=1)
    """Decay of the adapter's weights towards zero, decoupled as in AdamW."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Largest norm of the gradient; a longer gradient is scaled down to it."""
    optim: Literal["auto", "adamw_torch", "adamw_8bit", "paged_adamw_8bit"] = "auto"
    """Optimizer; `auto` is adamw_8bit on a GPU and adamw_torch on the CPU."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Number format to compute in; `auto` is bf16 if the device has it, else fp16 on a GPU and fp32 on the CPU."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: much less memory, about a third more time."""
    save_steps: int | None = Field(default=None, ge=1)
    """Updates between checkpoints; null saves once an epoch. The best one is always saved too."""
    logging_steps: int = Field(default=1, ge=1)
    """Updates between lines of training metrics."""

    @property
    def pack_limit(self) -> int:
        """`max_tokens_per_pack` as a number; raises `ValueError` for `auto`, which a run replaces at its start."""
        return int(self.max_tokens_per_pack)


class Generation(Section):
    """The replies of the tuned model in chat and in samples."""

    max_new_tokens: int = Field(default=256, ge=1)
    """Longest reply in tokens."""
    temperature: float = Field(default=0.7, ge=0, le=5)
    """Randomness of the reply; 0 always takes the likeliest token."""
    top_p: float = Field(default=0.9, gt=0, le=1)
    """Sample from the likeliest tokens that together have this probability."""
    repetition_penalty: float = Field(default=1.05, ge=1, le=2)
    """Penalty on tokens that were already used; 1 is none (arXiv 1909.05858)."""
    prompt_label: str = "You: "
    """Text shown before the line you type in chat."""


class Evaluation(Section):
    """The measurements of the held-out loss during training."""

    eval_steps: int | None = Field(default=None, ge=1)
    """Updates between evaluations; null evaluates once an epoch."""
    early_stopping_patience: int | None = Field(default=3, ge=1)
    """Evaluations in a row without improvement after which training stops; null never stops early."""
    max_tokens_per_pack: int = Field(default=2048, ge=16)
    """Tokens in memory at a time while evaluating; it never changes the result."""
    sample_prompts: int = Field(default=4, ge=0, le=64)
    """Held-out prompts answered at every evaluation, so that you hear it learn (`samples.jsonl`); 0 for none."""


class Export(Section):
    """The files of the merged model."""

    dtype: Literal["float16", "bfloat16"] = "float16"
    """Number format of the merged weights; llama.cpp reads both."""
    max_shard_size_gb: float = Field(default=4.0, gt=0)
    """Largest safetensors file (shard) in gigabytes (10^9 bytes)."""


class Config(Section):
    """All settings of a run."""

    model: Model
    quantization: Quantization = Quantization()
    lora: Lora = Lora()
    data: Data
    training: Training
    generation: Generation = Generation()
    evaluation: Evaluation = Evaluation()
    export: Export = Export()
    seed: int = Field(default=0, ge=0, le=2**32 - 1)
    """Seed for the order of the data, the adapter's start and dropout: the same seed gives the same run."""


def load_config(path: Path, overrides: list[str]) -> Config:
    """The settings in `path`, changed by `section.key=value` overrides; raises `UsageError` naming every mistake."""
    if os.path.isdir(path):
        raise UsageError(f"{path} is a folder; name the JSON file in it, for example {path / 'config.json'}.")
    if not os.path.exists(path):  # Path.exists() raises for a name longer than a file's may be
        raise UsageError(f"{path}: no such file. Start from config/default.json or one of config/presets/.")
    values = read_json(path, "JSON has no comments, no comma after the last item, and only double quotes.")
    values.pop("$schema", None)  # for editors
    mistakes = [problem for text in overrides if (problem := _override(values, text)) is not None]
    if "\\u0000" in json.dumps(values):
        mistakes.append("a text holds the character \\u0000, which can be in no path and no prompt; delete it")
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        mistakes += _explain(error.errors())
    else:
        if not mistakes:
            return config
    count = "1 mistake" if len(mistakes) == 1 else f"{len(mistakes)} mistakes"
    source = f"{path} with --set" if overrides else f"{path}"
    raise UsageError(f"{count} in the settings ({source}):\n" + "\n".join(f"  - {line}" for line in mistakes))


def _override(values: JsonObject, text: str) -> str | None:
    """Put `section.key=value` into `values`; returns the mistake in it, or None."""
    name, equals, raw = text.partition("=")
    path = name.strip().split(".")
    if not equals or not all(path):
        return f"--set {text}: expected section.key=value, for example --set training.learning_rate=1e-4"
    field = all_settings().get(".".join(path))
    is_text = field is not None and field.annotation in (str, str | None)
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as error:
        if not is_text and not isinstance(error, json.JSONDecodeError):
            return f"--set {name.strip()}: the number is too long or the brackets too deep; write a plain value"
        value = raw
    if is_text and value is not None and not isinstance(value, str):
        value = raw  # a folder may be called 2024
    section = values
    for key in path[:-1]:
        section = section.setdefault(key, {})
        if not isinstance(section, dict):
            return f"--set {text}: {key} is not a section"
    section[path[-1]] = value
    return None


def all_settings() -> dict[str, FieldInfo]:
    """Every setting by its dotted name, in the order of the file."""
    fields = {}
    for name, field in Config.model_fields.items():
        kind = field.annotation
        inside = kind.model_fields if isinstance(kind, type) and issubclass(kind, Section) else {}
        fields |= {f"{name}.{key}": inner for key, inner in inside.items()} or {name: field}
    return fields


def _explain(details: list[ErrorDetails]) -> list[str]:
    """One line for every wrong setting; the alternatives of a union become one sentence."""
    lines: dict[str, str] = {}
    for detail in details:
        # without the branch of a union, which pydantic adds: literal['all-linear'], list[str]
        place = [str(part) for part in detail["loc"] if "[" not in str(part)]
        name = ".".join(place)
        if detail["type"] == "extra_forbidden":
            lines[name] = _explain_unknown(name, place[-1])
        elif detail["type"] == "missing":
            lines[name] = f"{name} is missing, and it has no default"
        elif name in lines:
            lines[name] += f" or {_expected(detail)}"
        else:
            value = json.dumps(detail["input"], ensure_ascii=False, default=str)
            lines[name] = f"{name}: found {value}; expected {_expected(detail)}"
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
    known = all_settings()
    if key in known:
        section, _, inner = key.partition(".")
        return f'{name}: a name with a dot is for --set; here write "{section}": {{"{inner}": ...}}'
    by_key = {setting.rpartition(".")[2]: setting for setting in known}
    similar = difflib.get_close_matches
    close = similar(name, known, 1) or [by_key[match] for match in similar(key, by_key, 1)]
    hint = f"did you mean {close[0]}?" if close else f"the sections are {', '.join(Config.model_fields)}"
    return f"{name} is not a setting; {hint}"


def dump_config(config: Config) -> str:
    """`config` as JSON text with every setting, which loads back equal."""
    return json.dumps(config.model_dump(), ensure_ascii=False, indent=2) + "\n"


def schema_text() -> str:
    """The JSON Schema of the settings file, for editors."""
    schema = Config.model_json_schema()
    schema["properties"] = {"$schema": {"type": "string"}} | schema["properties"]
    return json.dumps(schema, ensure_ascii=False, indent=2) + "\n"


def settings_table() -> str:
    """A Markdown table of every setting with its default and meaning."""
    lines = ["| setting | default | meaning |", "|---|---|---|"]
    for name, field in all_settings().items():
        default = json.dumps(field.default, ensure_ascii=False) if not field.is_required() else "(required)"
        lines.append(f"| `{name}` | `{default}` | {field.description} |")
    return "\n".join(lines) + "\n"


def write_generated(folder: Path) -> None:
    """Write schema.json in `folder`, and the table of settings between the two markers of its README.md."""
    write_text(folder / "schema.json", schema_text())
    page = folder / "README.md"
    before, begin, rest = page.read_text(encoding="utf-8").partition("<!-- settings -->\n")
    _, end, after = rest.partition("<!-- /settings -->")
    write_text(page, before + begin + settings_table() + end + after)


if __name__ == "__main__":
    write_generated(Path("config"))
