"""The user's own llama.cpp: what its converter has to know of a model, asked before the work, and how it is run.

Its scripts are named by their file names and read as text; nothing of them is imported here.
"""

import ast
import errno
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path
from typing import Any

from gguf import MODEL_TENSOR, TensorNameMap
from safetensors import safe_open

from persona.errors import EnvironmentFault, UsageError
from persona.files import JsonObject
from persona.model.folders import read_config, tensor_index, text_config

MODEL_SCRIPT = "convert_hf_to_gguf.py"
ADAPTER_SCRIPT = "convert_lora_to_gguf.py"
# Bytes a weight takes: Q8_0 holds 32 weights in 32 bytes and a float16
_SIZES = {"f16": 2.0, "bf16": 2.0, "q8_0": 34 / 32, "f32": 4.0}
_UPDATE = "Update it (`git pull` in that folder), or take a newer copy of llama.cpp."


def check_checkout(folder: Path, script: str) -> Path:
    """The converter `script` in `folder`; raises `UsageError` when that is no llama.cpp source folder."""
    path = folder.expanduser() / script
    if path.is_file():
        return path
    fault = "it does not exist" if not folder.expanduser().is_dir() else f"it holds no {script}"
    raise UsageError(
        f"--llama-cpp {folder}: {fault}. Give the folder of llama.cpp's source, which holds its converters: "
        "`git clone --depth 1 https://github.com/ggml-org/llama.cpp`. (Programs alone, as in its releases, cannot "
        "convert.)"
    )


def check_model(model: Path, tokenizer: Any, folder: Path) -> None:
    """Raise `UsageError` for what would make a GGUF file that fails or answers gibberish.

    `model` is a Hugging Face folder, `folder` the llama.cpp that is to convert it.
    """
    config, outer = text_config(model), read_config(model)
    architectures = outer.get("architectures") or []
    sources = _sources(folder)
    if not any(f'"{name}"' in text for name in architectures for text in sources):
        raise UsageError(
            f"llama.cpp in {folder} does not know {' or '.join(architectures) or 'a model without architectures'}, "
            f"which is what {model} is. {_UPDATE}"
        )
    _check_vocabulary(model, config, tokenizer)
    _check_head(model, config.get("tie_word_embeddings", outer.get("tie_word_embeddings")))
    _check_pre_tokenizer(model, tokenizer, sources, folder)


def _sources(folder: Path) -> list[str]:
    """The converters' source texts; newer versions have them in a package `conversion`."""
    paths = [folder / MODEL_SCRIPT, *sorted((folder / "conversion").glob("*.py"))]
    return [path.read_text(encoding="utf-8", errors="replace") for path in paths if path.is_file()]


def _named(model: Path, kind: MODEL_TENSOR) -> tuple[str, list[int]] | None:
    """The tensor of `model` that is its input or output embedding, by the names that llama.cpp knows."""
    known = {f"{name}.weight" for name in TensorNameMap.mappings_cfg[kind]}
    shapes = ((name, info["shape"]) for name, (_, _, info) in tensor_index(model).items() if name in known)
    return next(shapes, None)


def _check_vocabulary(model: Path, config: JsonObject, tokenizer: Any) -> None:
    embedding = _named(model, MODEL_TENSOR.TOKEN_EMBD)
    if embedding is None:
        return  # an architecture with names of its own; the converter will say what it thinks of it
    rows, largest = embedding[1][0], max(tokenizer.get_vocab().values())
    declared = config.get("vocab_size", rows)
    if declared != rows:
        raise UsageError(
            f"{model}: config.json says vocab_size {declared}, but {embedding[0]} has {rows} rows. The vocabulary was "
            "resized, or files of two models were mixed; take config.json and weights from the same model."
        )
    if largest >= rows:
        added = sorted(text for text, number in tokenizer.get_vocab().items() if number >= rows)
        raise UsageError(
            f"{model}: the tokenizer's tokens reach {largest}, but {embedding[0]} has only {rows} rows, so "
            f"{', '.join(added[:3])} stand for nothing. Tokens were added without weights; use the tokenizer files "
            "that belong to these weights."
        )


def _check_head(model: Path, tied: bool | None) -> None:
    embedding, head = _named(model, MODEL_TENSOR.TOKEN_EMBD), _named(model, MODEL_TENSOR.OUTPUT)
    if tied is False and embedding and not head:
        raise UsageError(f"{model}: config.json says tie_word_embeddings false, but the output layer is missing.")
    if not (tied and embedding and head):
        return
    index = tensor_index(model)
    parts = []
    for name, _ in (embedding, head):
        with safe_open(index[name][0], "pt") as file:
            parts.append(file.get_tensor(name))
    if parts[0].shape != parts[1].shape or not parts[0].equal(parts[1]):
        raise UsageError(
            f"{model}: config.json says that input and output layer are one (tie_word_embeddings), but {head[0]} "
            f"differs from {embedding[0]}, and llama.cpp would drop it. Set tie_word_embeddings to false there."
        )


def _check_pre_tokenizer(model: Path, tokenizer: Any, sources: Iterable[str], folder: Path) -> None:
    """Ask for the fingerprint by which the converter knows how a byte-level BPE tokenizer splits text into words."""
    path = model / "tokenizer.json"
    if not path.is_file() or (model / "tokenizer.model").is_file():
        return
    raw = json.loads(path.read_text(encoding="utf-8"))
    if raw.get("model", {}).get("type") != "BPE" or "ByteLevel" not in json.dumps(raw.get("pre_tokenizer")):
        return
    for text in sources:
        probe = re.search(r"^\s*chktxt = ('.*')$", text, re.MULTILINE)
        if probe is None:
            continue
        fingerprint = sha256(str(tokenizer.encode(ast.literal_eval(probe[1]))).encode()).hexdigest()
        if fingerprint in text:
            return
        raise UsageError(
            f"llama.cpp in {folder} does not know how the tokenizer in {model} splits text (pre-tokenizer "
            f"{fingerprint[:12]}...). {_UPDATE} If the newest one does not know it either, tokenizer.json is not the "
            "base's own any more: copy it again from the base, never save a tokenizer over it."
        )


def check_space(output: Path, weights: int, outtype: str) -> None:
    """Raise `EnvironmentFault` when the disk of `output` has no room for `weights` numbers of type `outtype`."""
    place = next(folder for folder in output.resolve().parents if folder.is_dir())
    # 64 MiB for the vocabulary and the rest
    needed, free = weights * _SIZES[outtype] + 2**26, shutil.disk_usage(place).free
    if needed > free:
        raise EnvironmentFault(
            f"{output} will need {needed / 1e9:.1f} GB, but only {free / 1e9:.1f} GB are free in {place}. Make space, "
            "or name a file on another disk."
        )


def run_converter(script: Path, arguments: list[str | Path]) -> None:
    """Run one of llama.cpp's converters with this Python; raises `EnvironmentFault` with what to do when it fails."""
    environment = {"HF_HUB_OFFLINE": "1", "PYTHONUTF8": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, str(script), *map(str, arguments)]
    result = subprocess.run(
        command, capture_output=True, text=True, encoding="utf-8", errors="replace", env=os.environ | environment
    )
    if result.returncode != 0:
        code, output = result.returncode, result.stderr + result.stdout
        lines = [line.rstrip() for line in output.splitlines() if line.strip()]
        errors = [line.strip() for line in lines if re.match(r"[\w.]*(Error|Exception|Fault)\b|ERROR", line)]
        fault = [f"exit code {code}", *errors][-1]
        tail = "\n".join(f"  | {line}" for line in lines[-6:])
        raise EnvironmentFault(f"{script.name} failed: {fault}\n{_advice(script, code, output)}\n{tail}")


def _advice(script: Path, code: int, output: str) -> str:
    if package := re.search(r"No module named '([\w.]+)'", output):
        name = package[1].partition(".")[0]
        if name in ("conversion", "gguf"):
            return f"{script.parent} is not complete: copy or clone the whole of llama.cpp."
        return f"It needs the Python package {name}: pip install {name.replace('_', '-')}"
    if "pre-tokenizer was not recognized" in output or "is not supported" in output:
        return f"It does not know this model. {_UPDATE}"
    if re.search(r"([Nn]ot found|Missing).*tokenizer\.model", output):
        return (
            "It wants tokenizer.model. Copy that file from the base model's page into the base's folder and merge "
            "again; the tokenizer files travel as they are."
        )
    if os.strerror(errno.ENOSPC) in output:
        return "The disk is full. Make space, or name a file on another disk."
    if "MemoryError" in output or code in (-9, 137):
        return "The memory was full. Close other programs, and run it again."
    if re.search(r"Can not map tensor|AttributeError|ImportError|unrecognized arguments|TypeError", output):
        return f"This version of llama.cpp and this model or these libraries do not fit together. {_UPDATE}"
    return f"These are its last lines. If they say nothing to you: {_UPDATE}"
