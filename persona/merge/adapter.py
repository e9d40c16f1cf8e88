"""An adapter's two files -> the change of every parameter of its base.

PEFT itself reads the settings: it places the adapter on a model without weights, and the layers it makes there give
the names, shapes and scaling of the tensors, for all patterns, ties and variants.
"""

import json
import warnings
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.lora.layer import Embedding, Linear, LoraLayer, ParamWrapper
from peft.tuners.lora.variants import DoraLinearVariant
from peft.tuners.trainable_tokens import TrainableTokensLayer
from safetensors.torch import load_file
from tokenizers import Tokenizer

from persona.errors import DataError, UsageError
from persona.files import ADAPTER_WEIGHTS, read_json
from persona.merge.changes import Added, Change, Decomposed, LowRank, Replaced, Rows
from persona.model.architecture import skeleton
from persona.model.folders import check_safetensors

PREFIX = "base_model.model."
# These start from weights that differ from the base's
_MOVED_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")
_UNMERGEABLE = ("layer_replication", "use_qalora", "alora_invocation_tokens", "arrow_config", "use_bdlora")
_UNMERGEABLE += ("kasa_config", "monteclora_config", "velora_config", "megatron_config")
_EMBEDDINGS = ("embed_tokens.weight", "lm_head.weight", "wte.weight", "word_embeddings.weight")
Weights = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Adapter:
    """The changes by the parameter's name in transformers, and the parameters that share weights with another one."""

    changes: dict[str, list[Change]]
    tied: dict[str, str]
    """Parameter -> the one whose weights it shares, adapter included."""
    untied: dict[str, str]
    """Parameter -> the one whose weights it shared before the adapter made them differ."""


def read_adapter(folder: Path, base: Path) -> Adapter:
    """The changes that the adapter in `folder` makes to the model in `base`.

    Raises `UsageError` naming the tensor or setting that belongs to another model or cannot be merged, `DataError` for
    numbers that are not finite.
    """
    config, model = _read_config(folder), skeleton(base)
    check_safetensors(folder / ADAPTER_WEIGHTS)
    weights = load_file(folder / ADAPTER_WEIGHTS)
    parameters = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    ties: dict[str, str] = dict(model.all_tied_weights_keys)
    _check_vocabulary(folder, base, weights, model)
    wrapped = _wrapped(model, config, folder)
    _check_tensors(folder, base, weights, wrapped, parameters, set(ties) if config.ensure_weight_tying else set())
    for name, tensor in weights.items():
        if not torch.isfinite(tensor).all():
            raise DataError(f"{folder}: {name} holds numbers that are not finite. Merge an earlier checkpoint.")
    changes: dict[str, list[Change]] = {}
    for path, module in wrapped.named_modules():
        for name, change in _changes_of(path, module, weights, folder):
            changes.setdefault(name, []).append(change)
    for key, tensor in weights.items():
        if (name := _plain(key)) in parameters:  # weights trained whole come before what is added to them
            changes.setdefault(name, []).insert(0, Replaced(tensor))
    followers = set(ties) if config.ensure_weight_tying else _following(wrapped)
    changes = {name: change for name, change in changes.items() if name not in followers}
    untied = {name: source for name, source in ties.items() if name not in followers and {name, source} & set(changes)}
    if not changes:
        raise UsageError(f"{folder}: {ADAPTER_WEIGHTS} changes no parameter of {base}.")
    return Adapter(changes, {name: source for name, source in ties.items() if name not in untied}, untied)


def _following(wrapped: Any) -> set[str]:
    """Parameters that take their new rows from the one they are tied to."""
    return {
        f"{_plain(path).removesuffix('.token_adapter')}.weight"
        for path, module in wrapped.named_modules()
        if isinstance(module, TrainableTokensLayer) and module.tied_adapter
    }


def _plain(key: str) -> str:
    """A PEFT name as the base calls it."""
    return key.removeprefix(PREFIX).replace(".base_layer", "").replace(".modules_to_save", "")


def _read_config(folder: Path) -> LoraConfig:
    path = folder / "adapter_config.json"
    values = read_json(path)
    if values.get("peft_type") != "LORA":
        kind = values.get("peft_type") or "an unknown kind"
        raise UsageError(f"{folder} is not a LoRA adapter ({kind}); only LoRA can be merged.")
    if not isinstance(values.get("lora_alpha"), int | float) or not isinstance(values.get("r"), int):
        raise UsageError(f"{path}: lora_alpha or r is missing or is not a number. Copy it again.")
    start = str(values.get("init_lora_weights")).lower()
    odd = [key for key in _UNMERGEABLE if values.get(key)]
    odd += [f"init_lora_weights: {start}"] if start.startswith(_MOVED_BASE) else []
    known = {field.name for field in fields(LoraConfig)}
    odd += [key for key, value in values.items() if value and key not in known and key != "peft_version"]
    if odd:
        raise UsageError(
            f"{folder} cannot be merged: it uses {', '.join(odd)}, which this merge does not know or which cannot be "
            "written into the weights. Use it as an adapter, or convert it with PEFT first."
        )
    try:
        return LoraConfig(**{key: value for key, value in values.items() if key in known})
    except (TypeError, ValueError) as error:
        raise UsageError(f"{path}: PEFT does not accept it: {error}") from None


def _check_vocabulary(folder: Path, base: Path, weights: Weights, model: Any) -> None:
    rows = model.get_input_embeddings().weight.shape[0]
    for key, tensor in weights.items():
        if _plain(key).endswith(_EMBEDDINGS) and tensor.shape[0] != rows:
            raise UsageError(
                f"{folder} was trained with a resized vocabulary: {key} has {tensor.shape[0]} rows, that of {base} "
                f"{rows}. Its new tokens are not in the base's tokenizer; train again without adding tokens."
            )
    files = [path / "tokenizer.json" for path in (folder, base)]
    if not all(path.is_file() for path in files) or files[0].read_bytes() == files[1].read_bytes():
        return
    theirs, own = (Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True) for path in files)
    if strange := sorted(token for token, number in theirs.items() if own.get(token) != number):
        shown = ", ".join(json.dumps(token, ensure_ascii=False) for token in strange[:5])
        raise UsageError(
            f"{folder} was trained with another tokenizer than that in {base}: {len(strange)} tokens are new or have "
            f"other numbers, such as {shown}. Merge it into the model it was trained on, its vocabulary included."
        )


def _wrapped(model: Any, config: LoraConfig, folder: Path) -> Any:
    config.base_model_name_or_path = ""  # PEFT would look for it
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return PeftModel(model, config, low_cpu_mem_usage=True)
    except (ValueError, TypeError, KeyError, AttributeError, NotImplementedError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UsageError(f"{folder} does not fit this model: PEFT says: {reason}") from None


def _check_tensors(
    folder: Path, base: Path, weights: Weights, wrapped: Any, parameters: dict[str, tuple[int, ...]], tied: set[str]
) -> None:
    """Raise `UsageError` unless `weights` are those PEFT would save of `wrapped`; `tied` layers may be absent."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        saved = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    stored = {key: tuple(tensor.shape) for key, tensor in weights.items()}
    shapes = {key: tuple(tensor.shape) for key, tensor in saved.items()}
    known = shapes | {key: parameters[_plain(key)] for key in stored if _plain(key) in parameters}
    layers = tuple(f"{name.rpartition('.')[0]}." for name in tied)
    optional = {key for key in shapes if _plain(key).startswith(layers)}
    if strange := sorted(stored.keys() - known.keys()):
        raise UsageError(
            f"{folder} changes {_plain(strange[0])}, which {base} does not have or the adapter's settings do not name "
            f"({len(strange)} such tensors): it belongs to another model, or cannot be merged here."
        )
    if missing := sorted(shapes.keys() - stored.keys() - optional):
        raise UsageError(f"{folder}: {missing[0]} is missing ({len(missing)} in all); copy it again.")
    if odd := sorted(key for key in stored if stored[key] != known[key]):
        key = odd[0]
        raise UsageError(
            f"{folder} holds {_plain(key)} of shape {[*stored[key]]}, but with its settings and {base} it would be "
            f"{[*known[key]]}: it belongs to another model."
        )


def _changes_of(path: str, module: Any, weights: Weights, folder: Path) -> list[tuple[str, Change]]:
    """The changes that one of PEFT's layers makes, with the names of the parameters."""
    layer = _plain(path)
    if isinstance(module, TrainableTokensLayer) and not module.tied_adapter:
        indices = torch.tensor(module.token_indices["default"])
        rows = weights[f"{path}.trainable_tokens_delta"]
        return [(f"{layer.removesuffix('.token_adapter')}.weight", Rows(indices, rows))]
    pair = [
        f"{path}.lora_embedding_{half}" if isinstance(module, Embedding) else f"{path}.lora_{half}.weight"
        for half in "AB"
    ]
    if not isinstance(module, LoraLayer) or pair[0] not in weights:  # a layer that follows the one it is tied to
        return []
    variant = module.lora_variant.get("default")
    types = (Linear, Embedding, ParamWrapper)
    if type(module) not in types or not (variant is None or isinstance(variant, DoraLinearVariant)):
        unknown = type(variant if variant is not None else module).__name__
        raise UsageError(f"{folder}: the layer {layer} is of PEFT's type {unknown}, which cannot be merged here.")
    scaling = float(module.scaling["default"])
    if isinstance(module, ParamWrapper):
        return [(f"{layer}.{module.parameter_name}", _of_parameter(module, path, weights, scaling))]
    transposed = isinstance(module, Embedding) or bool(getattr(module, "fan_in_fan_out", False))
    a, b = (weights[name] for name in pair)
    low_rank = LowRank(a.T, b.T, scaling) if transposed else LowRank(b, a, scaling)
    magnitude = weights.get(f"{path}.lora_magnitude_vector", weights.get(f"{path}.lora_magnitude_vector.weight"))
    change: Change = low_rank if magnitude is None else Decomposed(low_rank, magnitude.flatten(), transposed)
    bias = weights.get(f"{path}.lora_B.bias")
    added: list[tuple[str, Change]] = [] if bias is None else [(f"{layer}.bias", Added(bias.float() * scaling))]
    return [(f"{layer}.weight", change), *added]


def _of_parameter(module: ParamWrapper, path: str, weights: Weights, scaling: float) -> LowRank:
    """The change of a single parameter, such as the stacked weights of experts (PEFT's `target_parameters`)."""
    a, b = weights[f"{path}.lora_A.weight"], weights[f"{path}.lora_B.weight"]
    if module.num_experts == 1 and module.get_param().dim() == 2:
        return LowRank(b, a, scaling)
    a = a.reshape(module.num_experts, -1, a.shape[-1])  # (experts, r, in)
    b = b.reshape(b.shape[0], -1, module.num_experts).permute(2, 0, 1)  # (experts, out, r)
    if module._did_swap_in_out_features:
        return LowRank(b, a, scaling)
    return LowRank(a.transpose(1, 2), b.transpose(1, 2), scaling)
