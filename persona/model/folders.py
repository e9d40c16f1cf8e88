"""Model folders in Hugging Face form: whether one is complete, where its weights are, and which weights they are."""

import hashlib
import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from persona.errors import UsageError
from persona.files import AGAIN, JsonObject, read_json

NOTICE = "NOTICE"  # the sentences that a model's licence wants to be passed on with it
_POINTER = b"version https://git-lfs"  # the content of a large file in a clone without git-lfs


def read_config(folder: Path) -> JsonObject:
    """The model's config.json in `folder`, or an empty dict."""
    path = folder / "config.json"
    return read_json(path) if path.is_file() else {}


def text_config(folder: Path) -> JsonObject:
    """The config.json in `folder`, or its part for the text if the model reads pictures or sound too."""
    config = read_config(folder)
    return config.get("text_config") or config


def missing_parts(folder: Path, weights: bool = True) -> list[str]:
    """The files that `folder` lacks to be a loadable model, or without `weights` to tell of one."""
    missing = [] if (folder / "config.json").is_file() else ["config.json"]
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")):
        missing.append("tokenizer.json")
    if not weights:
        return missing
    files = weight_files(folder)
    missing += [path.name for path in files if not path.is_file()] if files else ["model.safetensors"]
    return missing


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of the model: those in its index, or else all but Mistral's second copy."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        places = read_json(index).get("weight_map")
        names = set(map(str, places.values())) if isinstance(places, dict) else set()
        if not names or not all(name.endswith(".safetensors") for name in names):
            raise UsageError(f"{index}: expected weight_map, the safetensors file of every tensor. {AGAIN}")
        return sorted(folder / name for name in names)
    return sorted(path for path in folder.glob("*.safetensors") if not path.name.startswith("consolidated"))


def check_model_folder(folder: Path, weights: bool = True) -> Path:
    """`folder`, which holds a complete 16- or 32-bit model, or without `weights` at least its config and tokenizer.

    Raises `UsageError` that says what it is instead.
    """
    config = read_config(folder)
    if (folder / "adapter_config.json").is_file():
        raise UsageError(
            f"{folder} is a LoRA adapter, not a model. Give the model it was trained on as model.name_or_path, "
            "and the adapter to test_model.py or merge_lora_to_fp16.py."
        )
    if "training" in config and "model_type" not in config:
        raise UsageError(f"{folder} is the folder of a training run, not a model; its adapter is {folder / 'adapter'}.")
    if quantization := config.get("quantization_config"):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise UsageError(
            f"{folder} is already quantized ({method}). Training and merging start from the 16-bit weights; "
            "download the original model, it is held in 4 bits while training. (The 16-bit weights of models that are "
            "published in 8 or 4 bits are often in a repository of their own, with BF16 in its name.)"
        )
    missing = missing_parts(folder, weights)
    if missing:
        names = ", ".join(sorted(p.name for p in folder.iterdir())[:12]) or "nothing"
        pickles = any(folder.glob("pytorch_model*.bin"))
        why = " Weights in pytorch_model.bin are pickles, which can run code; use safetensors." if pickles else ""
        raise UsageError(f"{folder} is not a complete model: {', '.join(missing)} missing; found {names}.{why}")
    return folder


def fingerprint(folder: Path) -> str:
    """A SHA-256 of the weights in `folder`, whatever their shards: names, types, shapes, and 4 KiB of every tensor."""
    digest = hashlib.sha256()
    for name, (path, start, info) in sorted(tensor_index(folder).items()):
        begin, end = info["data_offsets"]
        with path.open("rb") as file:
            file.seek(start + begin)
            head = file.read(min(end - begin, 4096))
        digest.update(f"{name} {info['dtype']} {info['shape']} ".encode() + head)
    return digest.hexdigest()


def tensor_index(folder: Path) -> dict[str, tuple[Path, int, JsonObject]]:
    """Every tensor in the safetensors files of `folder`: its file, the start of the data section, and its header entry.

    The header is that of the safetensors format: eight bytes of length, then JSON. Raises `UsageError` for other files.
    """
    tensors = {}
    for path in weight_files(folder):
        check_safetensors(path)
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
        header.pop("__metadata__", None)
        tensors |= {name: (path, 8 + size, info) for name, info in header.items()}
    return tensors


def check_safetensors(path: Path) -> None:
    """Raise `UsageError` if `path` is not a whole safetensors file; reads its header, not its tensors."""
    try:
        with path.open("rb") as file:
            start = file.read(len(_POINTER))
        if start == _POINTER:
            raise UsageError(f"{path} is a git-lfs pointer, not the weights: run `git lfs pull`, or download the file.")
        with safe_open(path, "np"):
            pass
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{path} is cut short or damaged ({error}). {AGAIN}") from None
