"""The prompts that llama.cpp itself makes of a GGUF file, by the server in the wheel xllamacpp if it is installed.

Its Jinja is a program of its own, which sends values of its own and rewrites messages that it thinks a template cannot
take. The server runs in another process, since llama.cpp ends the whole process at some faults, and only on this
machine; nothing is generated.
"""

import importlib
import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

from persona.errors import EnvironmentFault
from persona.files import JsonObject

WHEEL = "xllamacpp"
_SECONDS = 600  # loading a file of 16 GB from a slow disk
_MARK = "prompts: "  # the server writes lines of its own


def is_there() -> bool:
    """Whether the wheel is installed."""
    return find_spec(WHEEL) is not None


def served(gguf: Path, requests: Sequence[JsonObject]) -> list[list[int] | str]:
    """The ids of the prompt that llama.cpp makes of each request to its chat, or the words with which it refuses it.

    Raises `EnvironmentFault` with its last words if it cannot load the file, or does not answer in time.
    """
    package = str(Path(__file__).resolve().parents[2])
    paths = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "persona.export.runtime", str(gguf)]
    environment = os.environ | {"PYTHONPATH": paths, "PYTHONUTF8": "1"}
    try:
        result = subprocess.run(
            command, input=json.dumps(list(requests)), capture_output=True, text=True, encoding="utf-8",
            errors="replace", env=environment, timeout=_SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise EnvironmentFault(f"llama.cpp did not answer within {_SECONDS / 60:.0f} minutes") from None
    for line in result.stdout.splitlines():
        if line.startswith(_MARK):
            return json.loads(line.removeprefix(_MARK))
    lines = [line.strip() for line in (result.stdout + result.stderr).splitlines() if line.strip()]
    raise EnvironmentFault(f"llama.cpp could not load it: {lines[-1] if lines else f'exit code {result.returncode}'}")


def _serve(gguf: str, requests: Sequence[JsonObject]) -> list[list[int] | str]:
    wheel: Any = importlib.import_module(WHEEL)
    params = wheel.CommonParams()
    params.model.path = gguf
    params.n_ctx, params.n_batch, params.n_ubatch, params.n_parallel = 512, 32, 32, 1
    params.n_gpu_layers, params.no_extra_bufts = 0, True  # the weights stay on the disk, where they are not read
    params.warmup = params.fit_params = False
    server = wheel.Server(params)

    def ask(path: str, body: JsonObject) -> JsonObject:
        data, kind = json.dumps(body).encode(), {"Content-Type": "application/json"}
        with opener.open(urllib.request.Request(server.listening_address + path, data, kind)) as reply:
            return json.load(reply)

    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    prompts: list[list[int] | str] = []
    for request in requests:
        try:
            text = ask("/apply-template", request)["prompt"]
        except HTTPError as error:
            prompts.append(error.read().decode("utf-8", "replace"))
            continue
        prompts.append(ask("/tokenize", {"content": text, "add_special": True, "parse_special": True})["tokens"])
    return prompts


if __name__ == "__main__":
    print(f"\n{_MARK}{json.dumps(_serve(sys.argv[1], json.load(sys.stdin)))}", flush=True)
    os._exit(0)  # without the server's farewells
