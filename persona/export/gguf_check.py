"""A GGUF file, reopened and compared with what it was made of: weights, sizes, vocabulary, end tokens, chat template.

Layout and names of the fields: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from gguf import (
    MODEL_ARCH,
    MODEL_ARCH_NAMES,
    GGMLQuantizationType,
    GGUFReader,
    TokenType,
    dequantize,
    get_tensor_name_map,
)
from safetensors import safe_open

from persona.errors import DataError
from persona.model.folders import read_config, tensor_index
from persona.model.render import ChatFormat, Message, prompt_text

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
    unknown: int
    """Tensors that could not be compared one by one, since it is not known here how the converter arranges them."""
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
    named = tensor_names(architecture, config.get("num_hidden_layers") or config.get("n_layer") or 0)
    kind = str(config.get("model_type"))
    stored = {tensor.name: tensor for tensor in reader.tensors}
    seen: set[str] = set()
    problems: list[str] = []
    largest, unknown, tensors = 0.0, 0, tensor_index(model)
    for name, (path, _, info) in tensors.items():
        target, expert = _target(name, named)
        if target is None or target not in stored:
            if not (config.get("tie_word_embeddings") and name.startswith("lm_head")):
                problems.append(f"{name} is missing")
            continue
        seen.add(target)
        with safe_open(path, "pt") as file:
            error = _compare(file, name, info["shape"], stored[target], expert, kind, config)
        if error is None:
            problems.append(f"{name} has other values, or a shape other than {info['shape']}, as {target}")
        else:
            largest = max(largest, error)
    unsure = len(problems)
    extra = sorted(name for name in stored.keys() - seen if not _COMPUTED.search(name))
    tied = config.get("tie_word_embeddings")
    problems += [f"{name} is in no way part of the model" for name in extra if not (tied and name == "output.weight")]
    if problems and kind not in _KNOWN:  # what differs may well be how this converter arranges it
        problems, unknown = [], unsure
    if problems:
        raise DataError(_listed(problems))
    types = {tensor.tensor_type.name for tensor in reader.tensors if tensor.n_elements > 2**12} or {"F32"}
    return GGUFReport(len(tensors), largest, unknown, architecture, "/".join(sorted(types)))


def _listed(problems: Sequence[str]) -> str:
    more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
    return "; ".join(problems[:5]) + more


def tensor_names(architecture: str, layers: int) -> Callable[[str], str | None]:
    """Gives llama.cpp's name for one of Hugging Face; raises `DataError` for an unknown architecture."""
    known: dict[str, MODEL_ARCH] = {name: arch for arch, name in MODEL_ARCH_NAMES.items()}
    if architecture not in known:
        raise DataError(
            f"the installed package gguf does not know the architecture {architecture!r}, so nothing can be compared; "
            "update it (pip install -U gguf)"
        )
    names = get_tensor_name_map(known[architecture], layers)

    def named(name: str) -> str | None:
        shorter = (name, name.removeprefix("transformer."), name.removeprefix("model."))  # as some converters do
        found = (names.get_name(candidate, try_suffixes=(".weight", ".bias")) for candidate in shorter)
        return next((target for target in found if target is not None), None)

    return named


def _target(name: str, named: Callable[[str], str | None]) -> tuple[str | None, int | None]:
    """What llama.cpp calls a tensor, and the expert it is in a tensor of all experts, or None."""
    expert = None
    if match := _EXPERT.fullmatch(name):
        stem = match[1]
        for old, new in _MIXTRAL.items():
            stem = stem.removeprefix("model.").replace(old, new) if old in stem else stem
        name, expert = f"{stem}.{match[3]}", int(match[2])
    return named(name), expert


def _compare(
    file: Any, name: str, shape: list[int], tensor: Any, expert: int | None, kind: str, config: dict[str, Any]
) -> float | None:
    """The largest rounding error, None when it is no rounding."""
    data = tensor.data if expert is None else tensor.data[expert]
    stored_shape = [int(size) for size in reversed(tensor.shape)][0 if expert is None else 1 :]
    arranged = arrangement(name, kind, config)
    wanted = shape[::-1] if arranged == "transposed" and len(shape) == 2 else shape
    if [size for size in stored_shape if size > 1] != [size for size in wanted if size > 1]:
        return None
    largest = 0.0
    for expected, found in _rows(file, name, shape, data, tensor.tensor_type, arranged, config):
        error = _error(expected, found, tensor.tensor_type)
        if error is None:
            return None
        largest = max(largest, error)
    return largest


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


# --- gguf metadata ----------------------------------------------------------------------------------------------------
# What a GGUF file says of its model, compared with the model as it was trained, and put right where one value does.
#
# A model that answers well in training and never stops, or answers gibberish, in a runtime mostly differs in one of
# these: the chat template, the token that ends a reply, the begin token, or the kind of a token.


# Tokens that llama.cpp takes as the end of a reply by their text, whatever the metadata say (src/llama-vocab.cpp)
_ENDS = {
    *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<end_of_turn>", "<|endoftext|>", "</s>"),
    *("<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "<end_of_utterance>", "<eos>", "<turn|>"),
    "<｜end▁of▁sentence｜>",
}
# Kinds of a tokenizer that put the begin token in front unless the metadata say otherwise (the same file)
_BOS_BY_DEFAULT = {"llama", "bert"}
_BOS_BY_PRE_TOKENIZER = ("llama3", "llama-v3", "llama-bpe", "falcon3", "tekken", "chameleon", "pixtral", "lfm2")
_ASKED: tuple[Message, ...] = ({"role": "user", "content": "Who goes there?"},)


def adds_bos(fields: dict[str, Any]) -> bool:
    """Whether a runtime puts the begin token before every prompt of a GGUF file with the metadata `fields`."""
    said = fields.get("tokenizer.ggml.add_bos_token")
    by_default = fields.get("tokenizer.ggml.model") in _BOS_BY_DEFAULT
    by_pre = str(fields.get("tokenizer.ggml.pre")) in _BOS_BY_PRE_TOKENIZER
    return bool(said) if said is not None else by_default or by_pre


def settle(path: Path, fmt: ChatFormat) -> list[str]:
    """Change single values in the file at `path` so that it begins and ends texts as trained; returns what was done."""
    reader, done = open_gguf(path, "r+"), []
    fields = fields_of(reader)
    bos = fmt.tokenizer.bos_token
    unwritten = adds_bos(fields) and not (bos and prompt_text(_ASKED, fmt).startswith(bos))
    if unwritten and _set(reader, "tokenizer.ggml.add_bos_token", False):
        done.append("the runtime will not put a begin token in front, which the chat template does not write")
    if fields.get("tokenizer.ggml.add_eos_token") and _set(reader, "tokenizer.ggml.add_eos_token", False):
        done.append("the runtime will not put an end token behind each prompt")
    if not stops(fields, fmt) and _set(reader, "tokenizer.ggml.eos_token_id", fmt.end_id):
        done.append(f"the end token is {fmt.tokenizer.convert_ids_to_tokens(fmt.end_id)}, with which replies end")
    del reader  # Windows cannot rename a file that is mapped
    return done


def _set(reader: GGUFReader, name: str, value: int | bool) -> bool:
    field = reader.get_field(name)
    if field is None:
        return False
    field.parts[field.data[0]][0] = value
    return True


def stops(fields: dict[str, Any], fmt: ChatFormat) -> bool:
    """Whether llama.cpp ends a reply at the token with which replies were trained to end."""
    named = {fields.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom")}
    return fmt.end_id in named or fmt.tokenizer.convert_ids_to_tokens(fmt.end_id) in _ENDS


def problems_of(fields: dict[str, Any], model: Path, fmt: ChatFormat) -> list[str]:
    """What in the metadata differs from the model in `model`, one sentence each."""
    outer = read_config(model)
    config = outer.get("text_config") or outer
    architecture = fields.get("general.architecture")
    found = []
    for name, key in (
        ("context_length", "max_position_embeddings"),
        ("block_count", "num_hidden_layers"),
        ("embedding_length", "hidden_size"),
        ("attention.head_count", "num_attention_heads"),
        ("attention.head_count_kv", "num_key_value_heads"),
    ):
        has, wants = fields.get(f"{architecture}.{name}"), config.get(key)
        if wants is not None and has is not None and has != wants and has != [wants] * len(_list(has)):
            found.append(f"{architecture}.{name} is {has}, but config.json says {key} {wants}")
    for kind, wants in (("bos", fmt.tokenizer.bos_token_id), ("eos", fmt.tokenizer.eos_token_id)):
        has = fields.get(f"tokenizer.ggml.{kind}_token_id")
        if wants is not None and has is not None and has not in (wants, fmt.end_id):
            found.append(f"its {kind} token is {has}, but the tokenizer's is {wants}")
    if not stops(fields, fmt):
        found.append(f"no runtime would stop at token {fmt.end_id}, with which replies end")
    template = fields.get("tokenizer.chat_template")
    if template != fmt.tokenizer.chat_template:
        found.append("it has no chat template" if template is None else "its chat template is not the trained one")
    return found + _vocabulary_problems(fields, fmt)


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _vocabulary_problems(fields: dict[str, Any], fmt: ChatFormat) -> list[str]:
    texts, kinds = fields.get("tokenizer.ggml.tokens") or [], fields.get("tokenizer.ggml.token_type") or []
    vocabulary: dict[str, int] = fmt.tokenizer.get_vocab()
    if len(texts) <= max(vocabulary.values()):
        return [f"it has {len(texts)} tokens, but the tokenizer's reach {max(vocabulary.values())}"]
    plain = [text.replace("▁", " ") for text in texts]  # SentencePiece's space, which the converter sometimes resolves
    wrong = [text for text, number in vocabulary.items() if plain[number] != text.replace("▁", " ")]
    found = [f"{len(wrong)} tokens have another text, such as {sorted(wrong)[0]!r}"] if wrong else []
    steering = {int(TokenType.CONTROL), int(TokenType.USER_DEFINED)}
    unmarked = [text for text in sorted(fmt.control) if kinds and kinds[vocabulary[text]] not in steering]
    if unmarked:
        found.append(f"{', '.join(unmarked[:3])} would be read as plain text")
    return found


def check_metadata(fields: dict[str, Any], model: Path, fmt: ChatFormat) -> None:
    """Raise `DataError` when the metadata are not those of the model in the folder `model`, with all differences."""
    if problems := problems_of(fields, model, fmt):
        raise DataError("; ".join(problems[:5]))
