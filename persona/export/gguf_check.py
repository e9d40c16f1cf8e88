"""A GGUF file, reopened and compared with what it was made of: weights, sizes, vocabulary, end tokens, chat template.

Layout and names of the fields: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGMLQuantizationType, GGUFReader, dequantize, get_tensor_name_map
from safetensors import safe_open

from persona.errors import DataError
from persona.folders import read_config, tensor_index

# How the converter (conversion/*.py of llama.cpp) arranges weights, by model_type of config.json. Rows of q and k are
# put in the order of the rotary embedding that llama.cpp has for these:
_PERMUTED = {"llama", "mistral", "mixtral", "smollm3", "granite", "granitemoe"}
# a norm's weight is stored plus one:
_NORM_PLUS_ONE = {"gemma", "gemma2", "gemma3", "gemma3_text"}
# linear layers are stored as (in, out), GPT-2's Conv1D:
_TRANSPOSED = {"gpt2"}
# and nothing is changed:
_PLAIN = {"qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "phi3", "stablelm", "starcoder2", "olmo2", "smollm"}
_KNOWN = _PERMUTED | _NORM_PLUS_ONE | _TRANSPOSED | _PLAIN
_COMPUTED = re.compile(r"rope_freqs|rope_factors")  # tensors that a converter makes from config.json
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(.*)")
_MIXTRAL = {"block_sparse_moe.experts": "feed_forward.experts"}
_CHUNK = 2**22  # numbers that are compared at a time


@dataclass(frozen=True)
class GGUFReport:
    """What was compared, when all of it fitted."""

    tensors: int
    largest_error: float
    """Largest difference of a weight from the original, by rounding alone."""
    as_sets: int
    """Tensors whose order of numbers is not known here; only their sorted values were compared."""
    architecture: str
    type_name: str


def open_gguf(path: Path, mode: Literal["r", "r+"] = "r") -> GGUFReader:
    """The file, memory-mapped; raises `DataError` when it is none or cut short."""
    try:
        return GGUFReader(path, mode)
    except (ValueError, KeyError, IndexError, OverflowError, OSError) as error:
        raise DataError(f"{path} is not a whole GGUF file: {error}") from None


def fields_of(reader: GGUFReader) -> dict[str, Any]:
    """The metadata as Python values by name."""
    return {name: field.contents() for name, field in reader.fields.items()}


def compare_weights(reader: GGUFReader, model: Path) -> GGUFReport:
    """Compare every weight with the Hugging Face folder `model`; raises `DataError` naming what differs."""
    outer = read_config(model)
    config = outer.get("text_config") or outer
    fields = fields_of(reader)
    architecture = str(fields.get("general.architecture"))
    place = tensor_names(architecture, config.get("num_hidden_layers") or config.get("n_layer") or 0)
    kind = str(config.get("model_type"))
    stored = {tensor.name: tensor for tensor in reader.tensors}
    seen: set[str] = set()
    problems: list[str] = []
    largest, as_sets, tensors = 0.0, 0, tensor_index(model)
    for name, (path, _, info) in tensors.items():
        target, expert = _target(name, place)
        if target is None or target not in stored:
            if not (config.get("tie_word_embeddings") and name.startswith("lm_head")):
                problems.append(f"{name} is missing")
            continue
        seen.add(target)
        with safe_open(path, "pt") as file:
            error, ordered = _compare(file, name, info["shape"], stored[target], expert, kind, config)
        as_sets += not ordered
        if error is None:
            problems.append(f"{name} has other values, or a shape other than {info['shape']}, as {target}")
        else:
            largest = max(largest, error)
    extra = sorted(name for name in stored.keys() - seen if not _COMPUTED.search(name))
    problems += [f"{name} is in no way part of the model" for name in extra if name != "output.weight"]
    if "output.weight" in extra and not config.get("tie_word_embeddings"):
        problems.append("output.weight is in no way part of the model")
    if problems:
        raise DataError(_listed(problems))
    types = {tensor.tensor_type.name for tensor in reader.tensors if tensor.n_elements > 2**12} or {"F32"}
    return GGUFReport(len(tensors), largest, as_sets, architecture, "/".join(sorted(types)))


def _listed(problems: Sequence[str]) -> str:
    more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
    return "; ".join(problems[:5]) + more


def tensor_names(architecture: str, layers: int) -> Any:
    """llama.cpp's names by those of Hugging Face; raises `DataError` for an architecture this package does not know."""
    known: dict[str, MODEL_ARCH] = {name: arch for arch, name in MODEL_ARCH_NAMES.items()}
    if architecture not in known:
        raise DataError(
            f"the installed package gguf does not know the architecture {architecture!r}, so nothing can be compared; "
            "update it (pip install -U gguf)"
        )
    return get_tensor_name_map(known[architecture], layers)


def _target(name: str, place: Any) -> tuple[str | None, int | None]:
    """What llama.cpp calls a tensor, and the expert it is in a tensor of all experts, or None."""
    expert = None
    if match := _EXPERT.fullmatch(name):
        stem = match[1]
        for old, new in _MIXTRAL.items():
            stem = stem.removeprefix("model.").replace(old, new) if old in stem else stem
        name, expert = f"{stem}.{match[3]}", int(match[2])
    return place.get_name(name, try_suffixes=(".weight", ".bias")), expert


def _compare(
    file: Any, name: str, shape: list[int], tensor: Any, expert: int | None, kind: str, config: dict[str, Any]
) -> tuple[float | None, bool]:
    """The largest rounding error, None when it is no rounding; and whether the order of the numbers was compared."""
    data = tensor.data if expert is None else tensor.data[expert]
    stored_shape = [int(size) for size in reversed(tensor.shape)][0 if expert is None else 1 :]
    arranged = arrangement(name, kind, config)
    wanted = shape[::-1] if arranged == "transposed" and len(shape) == 2 else shape
    if [size for size in stored_shape if size > 1] != [size for size in wanted if size > 1]:
        return None, True
    largest = 0.0
    for expected, found in _rows(file, name, shape, data, tensor.tensor_type, arranged, config):
        error = _error(expected, found, tensor.tensor_type)
        if error is None:
            if kind in _KNOWN:
                return None, True
            return _error_of_set(file.get_tensor(name), data, tensor.tensor_type), False
        largest = max(largest, error)
    return largest, True


def arrangement(name: str, kind: str, config: dict[str, Any]) -> str:
    """How the converter rearranges the tensor `name` of a model of type `kind`."""
    if kind in _PERMUTED and re.search(r"\.[qk]_proj\.(weight|bias)$", name):
        return "permuted"
    if kind in _NORM_PLUS_ONE and name.endswith("norm.weight"):
        return "plus one"
    if kind in _TRANSPOSED and re.search(r"\.c_(attn|proj|fc)\.weight$", name):
        return "transposed"
    return "plain"


def permuted(weight: torch.Tensor, name: str, config: dict[str, Any]) -> torch.Tensor:
    """The rows of a q or k projection in llama.cpp's order: halves of each head interleaved."""
    heads = config["num_attention_heads"]
    if ".k_proj." in name:
        heads = config.get("num_key_value_heads") or heads
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def _rows(
    file: Any, name: str, shape: list[int], data: Any, type_: Any, arranged: str, config: dict[str, Any]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Original and stored numbers in float32, some rows at a time."""
    whole = file.get_slice(name)
    if arranged in ("permuted", "transposed"):
        weight = file.get_tensor(name)
        whole = permuted(weight, name, config) if arranged == "permuted" else weight.T
    count = whole.shape[0] if isinstance(whole, torch.Tensor) else shape[0]
    stored = data if len(shape) == 1 else data.reshape(count, -1)
    step = max(1, _CHUNK * count // max(1, int(np.prod(shape))))
    if len(shape) == 1:
        step = count
    for begin, end in pairwise([*range(0, count, step), count]):
        expected = whole[begin:end].float().numpy()
        found = dequantize(np.ascontiguousarray(stored[begin:end]), type_)
        yield (expected + 1 if arranged == "plus one" else expected).reshape(found.shape), found


def _error(expected: np.ndarray, found: np.ndarray, type_: GGMLQuantizationType) -> float | None:
    """The largest difference, or None when it is more than rounding to `type_` explains."""
    difference = np.abs(expected - found)
    if type_ == GGMLQuantizationType.Q8_0:
        # half a step of 1/127 of the largest in the block of 32, and the step itself is a float16
        blocks = np.abs(expected).reshape(-1, 32).max(axis=1, keepdims=True)
        allowed = np.broadcast_to(blocks * (0.5 / 127 + 2**-10) + 127 * 2.0**-24, (len(blocks), 32))
        allowed = allowed.reshape(expected.shape)
    else:
        relative, least = {"F32": (0, 0), "F16": (2**-11, 2**-25), "BF16": (2**-8, 2**-133)}[type_.name]
        allowed = np.abs(expected) * relative + least
    if not np.isfinite(found).all() or (difference > allowed).any():
        return None
    return float(difference.max(initial=0))


def _error_of_set(weight: torch.Tensor, data: Any, type_: GGMLQuantizationType) -> float | None:
    found = np.sort(dequantize(np.ascontiguousarray(data), type_).ravel())
    difference = np.abs(np.sort(weight.float().numpy().ravel()) - found)
    close = difference <= np.abs(found) * 2**-6 + np.abs(found).max() * 2**-7
    return float(difference.max()) if close.all() else None
