"""Adapter + 16-bit base -> one standard Hugging Face folder, tensor by tensor.

W + (alpha / r) * B A is computed in float32 and rounded once. Only the base's own safetensors are read, never a 4-bit
copy of them, and one tensor at a time, so the memory needed is that of the largest tensor and one output shard.
"""

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from persona.artifacts import CARD, PersonaCard, check_base, copy_tokenizer
from persona.errors import DataError, UsageError
from persona.folders import check_model_folder, tensor_index, weight_files
from persona.storage import ADAPTER_WEIGHTS, publish, write_json

PREFIX = "base_model.model."


@dataclass(frozen=True)
class MergeReport:
    """What a merge did."""

    folder: Path
    tensors: int
    changed: int
    largest_change: float
    shards: int


@dataclass(frozen=True)
class Delta:
    """The low-rank change of one weight matrix."""

    a: torch.Tensor  # (r, in)
    b: torch.Tensor  # (out, r)
    scaling: float

    def added_to(self, weight: torch.Tensor) -> torch.Tensor:
        """`weight` plus this change, in float32."""
        return weight.float() + self.scaling * (self.b.float() @ self.a.float())


def read_deltas(adapter: Path) -> dict[str, Delta]:
    """The adapter's changes by the name of the base tensor they belong to.

    Raises `UsageError` for adapters of another kind than plain LoRA, naming what they have.
    """
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    _refuse_other_kinds(adapter, config)
    weights = load_file(adapter / ADAPTER_WEIGHTS)
    deltas = {}
    for name, a in weights.items():
        if not name.endswith(".lora_A.weight"):
            continue
        layer = name.removesuffix(".lora_A.weight")
        b = weights[f"{layer}.lora_B.weight"]
        rank = a.shape[0]
        scale = config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)
        deltas[f"{layer.removeprefix(PREFIX)}.weight"] = Delta(a, b, scale)
    leftover = [n for n in weights if not n.endswith((".lora_A.weight", ".lora_B.weight"))]
    if leftover or not deltas:
        found = ", ".join(leftover[:3]) if leftover else "nothing"
        raise UsageError(f"{adapter}: expected LoRA matrices only, found {found}; this adapter cannot be merged here.")
    return deltas


def _refuse_other_kinds(adapter: Path, config: dict[str, Any]) -> None:
    kinds = (
        "use_dora",
        "modules_to_save",
        "fan_in_fan_out",
        "rank_pattern",
        "alpha_pattern",
        "trainable_token_indices",
    )
    odd = [key for key in kinds if config.get(key)]
    if config.get("peft_type") != "LORA" or odd or config.get("bias", "none") != "none":
        what = ", ".join(odd) or config.get("peft_type") or "an unknown kind"
        raise UsageError(f"{adapter} is no plain LoRA adapter ({what}); only those can be merged here.")


def merge(base: Path, adapter: Path, output: Path, dtype: torch.dtype, shard_bytes: int) -> MergeReport:
    """Write `output`, complete or not at all; raises `UsageError` when adapter and base do not belong together."""
    check_model_folder(base)
    _check_paths(base, adapter, output)
    card = check_base(adapter, base)
    deltas = read_deltas(adapter)
    _check_shapes(base, deltas, adapter)
    staging = output.with_name(f".staging-{output.name}")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        report = _write_weights(base, deltas, staging, dtype, shard_bytes)
        _write_rest(base, adapter, staging, dtype, card)
        publish(staging, output)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return MergeReport(output, *report)


def _check_paths(base: Path, adapter: Path, output: Path) -> None:
    for source in (base, adapter):
        if output.resolve() == source.resolve() or source.resolve() in output.resolve().parents:
            raise UsageError(f"The output {output} lies in the input {source}; choose another folder with --output.")
    if output.exists() and any(output.iterdir()) and not (output / CARD).is_file():
        raise UsageError(f"{output} exists and is no merged model of ours; choose another folder with --output.")


def _check_shapes(base: Path, deltas: dict[str, Delta], adapter: Path) -> None:
    tensors = tensor_index(base)
    for name, delta in deltas.items():
        wanted = [delta.b.shape[0], delta.a.shape[1]]
        if name not in tensors:
            raise UsageError(f"{adapter} changes {name}, which {base} does not have: it belongs to another model.")
        found = tensors[name][2]["shape"]
        if found != wanted:
            raise UsageError(f"{adapter} changes {name} of shape {wanted}, but in {base} it has {found}.")


def _merged_tensors(
    base: Path, deltas: dict[str, Delta], dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor, float]]:
    """Every tensor of the merged model in the base's order, and the largest change in it (0 where there is none)."""
    for path in weight_files(base):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
                weight = file.get_tensor(name)
                merged, change = weight, 0.0
                if name in deltas:
                    merged = deltas[name].added_to(weight)
                    change = (merged - weight.float()).abs().max().item()
                stored = merged.to(dtype) if merged.is_floating_point() else merged
                if stored.is_floating_point() and not torch.isfinite(stored).all():
                    cause = (
                        "the base already is" if not torch.isfinite(weight).all() else f"outside the range of {dtype}"
                    )
                    advice = "" if "base" in cause else ' Use --set export.dtype="bfloat16".'
                    raise DataError(f"{name} is not finite after merging: {cause}.{advice} Nothing was written.")
                yield name, stored.contiguous(), change


def _write_weights(
    base: Path, deltas: dict[str, Delta], folder: Path, dtype: torch.dtype, shard_bytes: int
) -> tuple[int, int, float, int]:
    shards: list[list[str]] = []
    shard: dict[str, torch.Tensor] = {}
    size = total = changed = 0
    largest = 0.0

    def flush() -> None:
        shards.append(list(shard))
        save_file(shard, folder / f"part-{len(shards)}.safetensors", metadata={"format": "pt"})
        shard.clear()

    for name, tensor, change in _merged_tensors(base, deltas, dtype):
        bytes_here = tensor.numel() * tensor.element_size()
        if shard and size + bytes_here > shard_bytes:
            flush()
            size = 0
        shard[name] = tensor
        size, total = size + bytes_here, total + bytes_here
        changed += change > 0
        largest = max(largest, change)
    flush()
    if not changed:
        raise DataError(
            "The adapter changes nothing: all of its matrices are zero. Was it trained? Nothing was written."
        )
    _name_shards(folder, shards, total)
    return sum(map(len, shards)), changed, largest, len(shards)


def _name_shards(folder: Path, shards: list[list[str]], total: int) -> None:
    if len(shards) == 1:
        (folder / "part-1.safetensors").rename(folder / "model.safetensors")
        return
    weight_map = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"part-{number}.safetensors").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write_rest(base: Path, adapter: Path, folder: Path, dtype: torch.dtype, card: PersonaCard | None) -> None:
    """Configuration, tokenizer, chat template and generation configuration with every token that ends a reply."""
    from datetime import date

    from transformers import AutoConfig, GenerationConfig

    from persona.modeling import load_tokenizer
    from persona.render import chat_format

    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)
    write_json(folder / "config.json", config | {"dtype": str(dtype).removeprefix("torch.")})
    template = adapter / "chat_template.jinja"
    day = date.fromisoformat(card.date) if card is not None else date.today()
    tokenizer = load_tokenizer(base, str(template) if template.is_file() else None, day)
    copy_tokenizer(base, folder, tokenizer.chat_template)
    if (base / "generation_config.json").is_file():
        generation = GenerationConfig.from_pretrained(base)
    else:
        generation = GenerationConfig.from_model_config(AutoConfig.from_pretrained(base))
    own = generation.eos_token_id
    ends = [chat_format(tokenizer).end_id, tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])]
    generation.eos_token_id = sorted({i for i in ends if i is not None})
    generation.save_pretrained(folder)
    if card is not None:
        write_json(folder / CARD, asdict(card))
