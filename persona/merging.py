"""Adapter + 16-bit base -> one standard Hugging Face folder, tensor by tensor.

W + (alpha / r) * B A is computed in float32 and rounded once. Only the base's own safetensors are read, never a 4-bit
copy of them, and one tensor at a time, so the memory needed is that of the largest tensor and one output shard.
"""

import math
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from persona.artifacts import CARD, TOKENIZER_FILES, PersonaCard, check_base, copy_tokenizer
from persona.errors import DataError, EnvironmentFault, UsageError
from persona.folders import check_model_folder, check_safetensors, read_json_object, tensor_index, weight_files
from persona.storage import ADAPTER_WEIGHTS, publish, write_json

PREFIX = "base_model.model."
_HALVES = (".lora_A.weight", ".lora_B.weight")
_OWN_FILES = {"config.json", "generation_config.json", "chat_template.jinja", CARD, *TOKENIZER_FILES}
_OWN_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")


@dataclass(frozen=True)
class MergeReport:
    """What a merge did."""

    folder: Path
    tensors: int
    changed: int
    largest_change: float
    shards: int
    verified_base: bool
    """Whether the adapter says which weights it was trained on; if not, only shapes could be compared."""


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
    config = read_json_object(adapter / "adapter_config.json")
    _refuse_other_kinds(adapter, config)
    check_safetensors(adapter / ADAPTER_WEIGHTS)
    weights = load_file(adapter / ADAPTER_WEIGHTS)
    layers = sorted({name.removesuffix(half) for name in weights for half in _HALVES if name.endswith(half)})
    odd = sorted(weights.keys() ^ {layer + half for layer in layers for half in _HALVES})
    if odd or not layers:
        found = ", ".join(odd[:3]) or "everything"
        raise UsageError(
            f"{adapter}: expected lora_A and lora_B of every layer and nothing else; missing or unknown: {found}. "
            "This adapter cannot be merged here."
        )
    deltas = {}
    for layer in layers:
        a, b = (weights[layer + half] for half in _HALVES)
        if a.dim() != 2 or b.dim() != 2 or b.shape[1] != a.shape[0]:
            raise UsageError(f"{adapter}: lora_A {[*a.shape]} and lora_B {[*b.shape]} of {layer} do not fit together.")
        scale = config["lora_alpha"] / (math.sqrt(a.shape[0]) if config.get("use_rslora") else a.shape[0])
        deltas[f"{layer.removeprefix(PREFIX)}.weight"] = Delta(a, b, scale)
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
    if not isinstance(config.get("lora_alpha"), int | float):
        raise UsageError(f"{adapter / 'adapter_config.json'}: lora_alpha is missing or no number. Copy it again.")


def merge(base: Path, adapter: Path, output: Path, dtype: torch.dtype, shard_bytes: int) -> MergeReport:
    """Write `output`, complete or not at all.

    Raises `UsageError` when adapter and base do not belong together or `output` holds something else, and
    `EnvironmentFault` when the disk is full.
    """
    check_model_folder(base)
    _check_paths(base, adapter, output)
    card = check_base(adapter, base)
    deltas = read_deltas(adapter)
    _check_shapes(base, deltas, adapter)
    folder = output.resolve()
    staging = folder.with_name(f".staging-{folder.name}")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        staging.mkdir(parents=True)
        report = _write_weights(base, deltas, staging, dtype, shard_bytes)
        _write_rest(base, adapter, staging, dtype, card)
        publish(staging, folder)
    except (OSError, SafetensorError) as error:
        raise EnvironmentFault(
            f"The merged model could not be written to {output}: {error}. Nothing of it is left there; make space, or "
            "choose another folder with --output."
        ) from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return MergeReport(output, *report, verified_base=card is not None)


def _check_paths(base: Path, adapter: Path, output: Path) -> None:
    folder, another = output.resolve(), "choose another folder with --output."
    for source in (base, adapter):
        if folder == source.resolve() or source.resolve() in folder.parents:
            raise UsageError(f"The output {output} lies in the input {source}; {another}")
    for path in (folder, *folder.parents):
        if os.path.exists(path) and not os.path.isdir(path):
            raise UsageError(f"The output {output} cannot be a folder, since {path} is a file; {another}")
    if folder in (Path.cwd(), *Path.cwd().parents):
        raise UsageError(f"The output {output} is the current folder or holds it; {another}")
    found = sorted(path.name for path in folder.iterdir()) if os.path.isdir(folder) else []
    strange = [name for name in found if name not in _OWN_FILES and not _OWN_WEIGHTS.fullmatch(name)]
    if strange:
        names = ", ".join(strange[:5]) + (", ..." if len(strange) > 5 else "")
        raise UsageError(f"{output} would be replaced, but holds what no merge wrote: {names}. Move it, or {another}")
    if found and CARD not in found:
        raise UsageError(f"{output} exists and is no merged model of ours (no {CARD}); remove it, or {another}")


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
                merged = deltas[name].added_to(weight) if name in deltas else weight
                stored = merged.to(dtype) if merged.is_floating_point() else merged
                if stored.is_floating_point() and not torch.isfinite(stored).all():
                    cause = (
                        "the base already is" if not torch.isfinite(weight).all() else f"outside the range of {dtype}"
                    )
                    advice = "" if "base" in cause else ' Use --set export.dtype="bfloat16".'
                    raise DataError(f"{name} is not finite after merging: {cause}.{advice} Nothing was written.")
                change = (stored.float() - weight.to(dtype).float()).abs().max().item() if name in deltas else 0.0
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
            f"The adapter changes nothing: rounded to {dtype}, every weight is that of the base. Was it trained? "
            "Nothing was written."
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

    config = read_json_object(base / "config.json")
    config.pop("torch_dtype", None)
    write_json(folder / "config.json", config | {"dtype": str(dtype).removeprefix("torch.")})
    template = adapter / "chat_template.jinja"
    day = date.fromisoformat(card.date) if card is not None else date.today()
    tokenizer = load_tokenizer(base, str(template) if template.is_file() else None, day)
    copy_tokenizer(base, folder, tokenizer.chat_template)
    name = "generation_config.json"
    if (base / name).is_file():
        generation = read_json_object(base / name)
    else:
        generation = GenerationConfig.from_model_config(AutoConfig.from_pretrained(base)).to_diff_dict()
    own = generation.get("eos_token_id")
    ends = [chat_format(tokenizer).end_id, tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])]
    # not by transformers, which refuses to save what it loads: that of Llama 2, for one
    write_json(folder / name, generation | {"eos_token_id": sorted({i for i in ends if i is not None})})
    if card is not None:
        write_json(folder / CARD, asdict(card))
