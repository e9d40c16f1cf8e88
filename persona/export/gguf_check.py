"""A GGUF file, reopened and compared with its model: weights, sizes, vocabulary, end tokens, chat template.

Layout and names of the fields: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. A model that answers well in
training but never stops or answers gibberish in a runtime mostly differs in its metadata: the chat template, the token
that ends a reply, the begin token, or the type of a token. They are corrected if one value is enough.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from gguf import (
    MODEL_ARCH,
    MODEL_ARCH_NAMES,
    GGMLQuantizationType,
    GGUFReader,
    ReaderTensor,
    TokenType,
    dequantize,
    get_tensor_name_map,
)
from safetensors import safe_open

from persona.errors import DataError, EnvironmentFault, VerificationFailed
from persona.export import runtime
from persona.files import JsonObject
from persona.merge.verify import check_prompts, other_prompt, trained_prompts
from persona.model.folders import read_config, tensor_index, text_config
from persona.model.render import ChatFormat, Message, prompt_text
from persona.model.token_cache import decode

# How the converter (conversion/*.py of llama.cpp) arranges weights, by model_type of config.json. Rows of q and k are
# put in the order of the rotary embedding that llama.cpp has for these:
_PERMUTED = {"llama", "mistral", "ministral3", "mixtral", "smollm3", "granite", "granitemoe"}
# a norm's weight is stored plus one:
_NORM_PLUS_ONE = {"gemma", "gemma2", "gemma3", "gemma3_text"}
# linear layers are stored as (in, out), GPT-2's Conv1D:
_TRANSPOSED = {"gpt2"}
# and nothing is changed:
_PLAIN = {"qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "phi3", "stablelm", "starcoder2", "olmo2", "smollm"}
_KNOWN = _PERMUTED | _NORM_PLUS_ONE | _TRANSPOSED | _PLAIN
_COMPUTED = re.compile(r"rope_freqs|rope_factors")  # tensors that a converter makes from config.json
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(.*)")
_CHUNK = 2**22  # numbers that are compared at a time


@dataclass(frozen=True)
class GGUFReport:
    """The comparison of a GGUF file that is the model."""

    tensors: int
    largest_error: float
    """The largest rounding of a weight."""
    unknown: int
    """Tensors that could not be compared, because it is not known here how the converter arranges them."""
    outside: int
    """Tensors of the model that read pictures or sound, which a GGUF file of the text does not hold."""
    architecture: str
    type_name: str
    adds_bos: bool
    """Whether runtimes put the begin token before a prompt by themselves."""


def open_gguf(path: Path, mode: Literal["r", "r+"] = "r") -> GGUFReader:
    """The file, memory-mapped; raises `DataError` if it is not a GGUF file or is cut short."""
    try:
        return GGUFReader(path, mode)
    except (ValueError, KeyError, IndexError, OverflowError, OSError) as error:
        raise DataError(f"{path} is not a whole GGUF file: {error}") from None


def fields_of(reader: GGUFReader) -> JsonObject:
    """The metadata as Python values by name."""
    return {name: field.contents() for name, field in reader.fields.items()}


def compare_weights(reader: GGUFReader, model: Path) -> GGUFReport:
    """Compare every weight with the Hugging Face folder `model`; raises `DataError` naming the tensors that differ."""
    config, fields = text_config(model), fields_of(reader)
    architecture = str(fields.get("general.architecture"))
    to_gguf, tied = tensor_names(architecture, config), config.get("tie_word_embeddings")
    stored = {tensor.name: tensor for tensor in reader.tensors}
    compared, problems, largest, index = set[str](), list[str](), 0.0, tensor_index(model)
    outside, has_towers = 0, "text_config" in read_config(model)
    for name, (path, _, info) in index.items():
        target, expert = _target(name, to_gguf)
        if has_towers and target is None and "language_model." not in name:
            outside += 1
            continue
        if target is None or target not in stored:
            problems += [] if tied and name.startswith("lm_head") else [f"{name} is missing"]
            continue
        compared.add(target)
        with safe_open(path, "pt") as file:
            error = _compare(file, name, info["shape"], stored[target], expert, config)
        if error is None:
            problems.append(f"{name} has other values, or a shape other than {info['shape']}, as {target}")
        largest = max(largest, error or 0.0)
    unknown = 0
    if config.get("model_type") in _KNOWN:
        extra = sorted(name for name in stored.keys() - compared if not _COMPUTED.search(name))
        problems += [f"{name} is not part of the model" for name in extra if not (tied and name == "output.weight")]
    else:  # the differences may well be the arrangement of this converter
        problems, unknown = [], len(problems)
    if problems:
        raise DataError(listed(problems))
    types = {tensor.tensor_type.name for tensor in reader.tensors if tensor.n_elements > 2**12} or {"F32"}
    count, type_name = len(index) - outside, "/".join(sorted(types))
    return GGUFReport(count, largest, unknown, outside, architecture, type_name, adds_bos(fields))


def listed(problems: Sequence[str]) -> str:
    """The first five problems and the number of the others."""
    more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
    return "; ".join(problems[:5]) + more


def tensor_names(architecture: str, config: JsonObject) -> Callable[[str], str | None]:
    """A function from Hugging Face's name of a tensor to llama.cpp's; raises `DataError` for unknown architectures."""
    known: dict[str, MODEL_ARCH] = {name: arch for arch, name in MODEL_ARCH_NAMES.items()}
    if architecture not in known:
        raise DataError(
            f"the installed package gguf does not know the architecture {architecture!r}, so nothing can be compared; "
            "update it (pip install -U gguf)"
        )
    names = get_tensor_name_map(known[architecture], config.get("num_hidden_layers") or config.get("n_layer") or 0)

    def to_gguf(name: str) -> str | None:
        name = name.replace("language_model.", "")  # of a model with towers
        shorter = (name, name.removeprefix("transformer."), name.removeprefix("model."))  # as some converters do
        targets = (names.get_name(candidate, try_suffixes=(".weight", ".bias")) for candidate in shorter)
        return next((target for target in targets if target is not None), None)

    return to_gguf


def _target(name: str, to_gguf: Callable[[str], str | None]) -> tuple[str | None, int | None]:
    """llama.cpp's name of a tensor, and the expert it is in a tensor of all experts, or None."""
    match = _EXPERT.fullmatch(name)
    if match is None:
        return to_gguf(name), None
    stem, number, rest = match.groups()
    if "block_sparse_moe.experts" in stem:  # Mixtral
        stem = stem.removeprefix("model.").replace("block_sparse_moe.experts", "feed_forward.experts")
    return to_gguf(f"{stem}.{rest}"), int(number)


def _compare(
    file: Any, name: str, shape: list[int], tensor: ReaderTensor, expert: int | None, config: JsonObject
) -> float | None:
    """The largest rounding error, None if the values or the shape differ by more than rounding."""
    data = tensor.data if expert is None else tensor.data[expert]
    stored_shape = [int(size) for size in reversed(tensor.shape)][0 if expert is None else 1 :]
    arranged = arrangement(name, config)
    expected_shape = shape[::-1] if arranged == "transposed" and len(shape) == 2 else shape
    if [size for size in stored_shape if size > 1] != [size for size in expected_shape if size > 1]:
        return None
    largest = 0.0
    for expected, stored in _rows(file, name, shape, data, tensor.tensor_type, arranged, config):
        error = _error(expected, stored, tensor.tensor_type)
        if error is None:
            return None
        largest = max(largest, error)
    return largest


def arrangement(name: str, config: JsonObject) -> str:
    """How the converter arranges the tensor `name` of the model with this config.json."""
    kind = config.get("model_type")
    if kind in _PERMUTED and re.search(r"\.[qk]_proj\.(weight|bias)$", name):
        return "permuted"
    if kind in _NORM_PLUS_ONE and name.endswith("norm.weight"):
        return "plus one"
    if kind in _TRANSPOSED and re.search(r"\.c_(attn|proj|fc)\.weight$", name):
        return "transposed"
    return "plain"


def permuted(weight: torch.Tensor, name: str, config: JsonObject) -> torch.Tensor:
    """The rows of a q or k projection in llama.cpp's order: halves of each head interleaved."""
    heads = config["num_attention_heads"]
    if ".k_proj." in name:
        heads = config.get("num_key_value_heads") or heads
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def _rows(
    file: Any, name: str, shape: list[int], data: Any, type_: Any, arranged: str, config: JsonObject
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Original and stored numbers in float32, some rows at a time."""
    original, count = file.get_slice(name), shape[0]
    if arranged == "permuted":
        original = permuted(file.get_tensor(name), name, config)
    elif arranged == "transposed":
        original, count = file.get_tensor(name).T, shape[-1]
    rows = data if len(shape) == 1 else data.reshape(count, -1)
    step = count if len(shape) == 1 else max(1, _CHUNK * count // max(1, prod(shape)))
    for begin, end in pairwise([*range(0, count, step), count]):
        part = original[begin:end]
        expected = part.float().numpy()
        stored = dequantize(np.ascontiguousarray(rows[begin:end]), type_)
        if arranged == "plus one":  # the converter adds in the number format of the file
            rounded = (part + 1).float().numpy()
            expected = np.where(stored == rounded, rounded, expected + 1)
        yield expected.reshape(stored.shape), stored


def _error(expected: np.ndarray, stored: np.ndarray, type_: GGMLQuantizationType) -> float | None:
    """The largest difference, or None when it is more than rounding to `type_` explains."""
    difference = np.abs(expected - stored)
    if type_ == GGMLQuantizationType.Q8_0:
        # half a step of 1/127 of the largest in the block of 32, and the step itself is a float16
        blocks = np.abs(expected).reshape(-1, 32).max(axis=1, keepdims=True)
        allowed = np.broadcast_to(blocks * (0.5 / 127 + 2**-10) + 127 * 2.0**-24, (len(blocks), 32))
        allowed = allowed.reshape(expected.shape)
    else:
        relative, least = {"F32": (0, 0), "F16": (2**-11, 2**-25), "BF16": (2**-8, 2**-133)}[type_.name]
        allowed = np.abs(expected) * relative + least
    if not np.isfinite(stored).all() or (difference > allowed).any():
        return None
    return float(difference.max(initial=0))


# Tokens that llama.cpp takes as the end of a reply by their text, whatever the metadata say (src/llama-vocab.cpp)
_ENDS = {
    *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<end_of_turn>", "<|endoftext|>", "</s>"),
    *("<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "<end_of_utterance>", "<eos>", "<turn|>"),
    "<｜end▁of▁sentence｜>",
}
# Types of a tokenizer that put the begin token in front unless the metadata say otherwise (the same file)
_BOS_BY_DEFAULT = {"llama", "bert"}
_BOS_BY_PRE_TOKENIZER = ("llama3", "llama-v3", "llama-bpe", "falcon3", "tekken", "chameleon", "pixtral", "lfm2")
_QUESTION: tuple[Message, ...] = ({"role": "user", "content": "Who goes there?"},)


def adds_bos(fields: JsonObject) -> bool:
    """Whether a runtime puts the begin token before every prompt of a GGUF file with the metadata `fields`."""
    setting = fields.get("tokenizer.ggml.add_bos_token")
    by_default = fields.get("tokenizer.ggml.model") in _BOS_BY_DEFAULT
    by_pre = str(fields.get("tokenizer.ggml.pre")) in _BOS_BY_PRE_TOKENIZER
    return bool(setting) if setting is not None else by_default or by_pre


def correct_metadata(path: Path, fmt: ChatFormat) -> list[str]:
    """Correct single values in the file at `path`, so that it begins and ends texts as trained; returns the changes."""
    reader, changes = open_gguf(path, "r+"), []
    fields = fields_of(reader)
    bos = fmt.tokenizer.bos_token
    unwritten = adds_bos(fields) and not (bos and prompt_text(_QUESTION, fmt).startswith(bos))
    if unwritten and _set(reader, "add_bos_token", False):
        changes.append("the runtime will not put a begin token in front, which the chat template does not write")
    if fields.get("tokenizer.ggml.add_eos_token") and _set(reader, "add_eos_token", False):
        changes.append("the runtime will not put an end token behind each prompt")
    if not stops(fields, fmt) and _set(reader, "eos_token_id", fmt.end_id):
        changes.append(f"the end token is {fmt.tokenizer.convert_ids_to_tokens(fmt.end_id)}, with which replies end")
    del reader  # Windows cannot rename a file that is mapped
    return changes


def _set(reader: GGUFReader, name: str, value: int | bool) -> bool:
    field = reader.get_field(f"tokenizer.ggml.{name}")
    if field is not None:
        field.parts[field.data[0]][0] = value
    return field is not None


def stops(fields: JsonObject, fmt: ChatFormat) -> bool:
    """Whether llama.cpp ends a reply at the token with which replies were trained to end."""
    ends = {fields.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom")}
    return fmt.end_id in ends or fmt.tokenizer.convert_ids_to_tokens(fmt.end_id) in _ENDS


def check_metadata(fields: JsonObject, model: Path, fmt: ChatFormat) -> None:
    """Raise `DataError` with the differences between the metadata and the model in the folder `model`."""
    config, architecture = text_config(model), fields.get("general.architecture")
    problems = []
    for name, key in (
        ("context_length", "max_position_embeddings"),
        ("block_count", "num_hidden_layers"),
        ("embedding_length", "hidden_size"),
        ("attention.head_count", "num_attention_heads"),
        ("attention.head_count_kv", "num_key_value_heads"),
    ):
        stored, expected = fields.get(f"{architecture}.{name}"), config.get(key)
        if name == "block_count" and expected is not None:  # llama.cpp counts those of multi-token prediction too
            expected += fields.get(f"{architecture}.nextn_predict_layers", 0)
        values = stored if isinstance(stored, list) else [stored]
        if None not in (stored, expected) and any(value != expected for value in values):
            problems.append(f"{architecture}.{name} is {stored}, but config.json says {key} {expected}")
    for kind, expected in (("bos", fmt.tokenizer.bos_token_id), ("eos", fmt.tokenizer.eos_token_id)):
        stored = fields.get(f"tokenizer.ggml.{kind}_token_id")
        if None not in (stored, expected) and stored not in (expected, fmt.end_id):
            problems.append(f"its {kind} token is {stored}, but the tokenizer's is {expected}")
    if not stops(fields, fmt):
        problems.append(f"no runtime would stop at token {fmt.end_id}, with which replies end")
    template = fields.get("tokenizer.chat_template")
    if template != fmt.tokenizer.chat_template:
        problems.append("it has no chat template" if template is None else "its chat template is not the trained one")
    if problems := problems + _vocabulary_problems(fields, fmt):
        raise DataError(listed(problems))
    check_prompts(fmt.tokenizer, str(template), fmt)


def check_served(path: Path, fmt: ChatFormat) -> list[str]:
    """Compare the prompts that llama.cpp makes of the file at `path` with the trained ones, whatever it is sent.

    Returns a note if it could not be tried; raises `VerificationFailed`.
    """
    untried = "llama.cpp itself was not asked which prompt it makes of this file"
    if not runtime.is_there():
        return [f"{untried}: pip install {runtime.WHEEL} brings its runtime, and --gguf then asks it"]
    asked = trained_prompts(fmt)
    requests = [{"messages": messages, "chat_template_kwargs": sent} for messages, sent, _ in asked]
    try:
        prompts = runtime.served(path, requests)
    except EnvironmentFault as error:
        return [f"{untried}: {error}"]
    for (messages, sent, trained), ids in zip(asked, prompts, strict=True):
        if ids != trained:
            text = ids if isinstance(ids, str) else decode(ids, fmt.tokenizer)
            raise VerificationFailed(
                f"{other_prompt('llama.cpp', messages, sent, text, fmt)} Merge without --gguf and serve the folder by "
                "vLLM or transformers, or train with a simpler template (model.chat_template)."
            )
    return []


def _vocabulary_problems(fields: JsonObject, fmt: ChatFormat) -> list[str]:
    texts, types = fields.get("tokenizer.ggml.tokens") or [], fields.get("tokenizer.ggml.token_type") or []
    vocabulary: dict[str, int] = fmt.tokenizer.get_vocab()
    if len(texts) <= max(vocabulary.values()):
        return [f"it has {len(texts)} tokens, but the tokenizer's reach {max(vocabulary.values())}"]
    plain = [text.replace("▁", " ") for text in texts]  # SentencePiece's space, which the converter sometimes resolves
    wrong = sorted(text for text, number in vocabulary.items() if plain[number] != text.replace("▁", " "))
    problems = [f"{len(wrong)} tokens have another text, such as {wrong[0]!r}"] if wrong else []
    steering = {int(TokenType.CONTROL), int(TokenType.USER_DEFINED)}
    if unmarked := [text for text in sorted(fmt.control) if types and types[vocabulary[text]] not in steering]:
        problems.append(f"{', '.join(unmarked[:3])} would be read as plain text")
    return problems
