"""A merged model, or an adapter alone, as a GGUF file: converted by llama.cpp, compared, and only then put in place."""

import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from persona.errors import DataError, EnvironmentFault, UsageError
from persona.export.gguf_check import (
    GGUFReport,
    adds_bos,
    arrangement,
    check_metadata,
    compare_weights,
    fields_of,
    open_gguf,
    permuted,
    settle,
    tensor_names,
)
from persona.export.llama_cpp import ADAPTER_SCRIPT, MODEL_SCRIPT, check_checkout, check_space, run_converter
from persona.files import ADAPTER_WEIGHTS, publish_file, read_json, write_json
from persona.merge.adapter import PREFIX, read_adapter
from persona.merge.changes import LowRank
from persona.merge.weights import skeleton
from persona.model.folders import read_config, tensor_index
from persona.model.render import ChatFormat


@dataclass(frozen=True)
class ModelFile:
    """A GGUF file of a whole model that was compared with it."""

    path: Path
    report: GGUFReport
    adds_bos: bool
    """Whether runtimes put the begin token before a prompt by themselves."""
    changes: list[str]
    """What was put right in its metadata, one sentence each."""


def check_output(output: Path, inputs: list[Path]) -> None:
    """Raise `UsageError` when `output` can be no file of ours."""
    if output.suffix != ".gguf":
        raise UsageError(f"{output}: a GGUF file is named NAME.gguf.")
    if output.is_dir():
        raise UsageError(f"{output} is a folder; name a file in it, as {output / 'NAME.gguf'}.")
    for folder in inputs:
        if folder.resolve() in output.resolve().parents:
            raise UsageError(f"{output} lies in {folder}, which is read for it; choose another place.")


def convert_model(model: Path, output: Path, llama_cpp: Path, outtype: str, fmt: ChatFormat, name: str) -> ModelFile:
    """Write the Hugging Face folder `model` as `output`, complete and compared or not at all.

    Raises `EnvironmentFault` when llama.cpp fails, `DataError` when what it wrote is not the model.
    """
    script = check_checkout(llama_cpp, MODEL_SCRIPT)
    weights = sum(math.prod(info["shape"]) for _, _, info in tensor_index(model).values())
    check_space(output, weights, outtype)
    with _staged(output) as staging, _as_trained(model, fmt) as folder:
        run_converter(script, [folder, "--outfile", staging, "--outtype", outtype, "--model-name", name])
        with _blamed_on(script):
            return _compared(staging, output, model, fmt)


def _compared(staging: Path, output: Path, model: Path, fmt: ChatFormat) -> ModelFile:
    changes = settle(staging, fmt)
    reader = open_gguf(staging)  # its end closes the file: Windows cannot rename one that is mapped
    fields = fields_of(reader)
    report = compare_weights(reader, model)
    check_metadata(fields, model, fmt)
    return ModelFile(output, report, adds_bos(fields), changes)


def convert_adapter(adapter: Path, base: Path, output: Path, llama_cpp: Path) -> int:
    """Write the LoRA adapter in `adapter` as `output`, in float32, for a GGUF file of `base`; returns its tensors.

    Raises `UsageError` for an adapter that is more than LoRA, which llama.cpp cannot hold.
    """
    script = check_checkout(llama_cpp, ADAPTER_SCRIPT)
    weights, alpha = plain_lora(adapter, base)
    check_space(output, sum(tensor.numel() for tensor in weights.values()), "f32")
    with _staged(output) as staging, _scratch(output.with_name(f".converting-{output.stem}")) as folder:
        save_file(weights, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        write_json(folder / "adapter_config.json", {"peft_type": "LORA", "lora_alpha": alpha})
        run_converter(script, [folder, "--base", base, "--outfile", staging, "--outtype", "f32"])
        with _blamed_on(script):
            _compare_adapter(staging, weights, alpha, base)
    return len(weights)


def plain_lora(adapter: Path, base: Path) -> tuple[dict[str, torch.Tensor], float]:
    """The matrices A and B of each changed weight of `base`, by PEFT's names, and the alpha that scales all of them.

    llama.cpp divides one alpha by the rank; ranks, alphas and scalings of single layers are multiplied into their B.
    Raises `UsageError` naming what in the adapter is more than that.
    """
    changes = read_adapter(adapter, skeleton(base), base).changes
    matrices, alpha, weights = {}, 0.0, dict[str, torch.Tensor]()
    for name, found in changes.items():
        change = found[0]
        if len(found) > 1 or not isinstance(change, LowRank) or change.left.dim() != 2 or "embed" in name:
            raise UsageError(
                f"{adapter} changes {name} otherwise than by a pair of LoRA matrices, which an adapter for llama.cpp "
                "cannot hold. Merge it, and convert the whole model with --gguf."
            )
        matrices[f"{PREFIX}{name.removesuffix('.weight')}"] = change
    for layer, change in matrices.items():
        own = change.scaling * change.right.shape[0]
        alpha = alpha or own
        weights[f"{layer}.lora_A.weight"] = change.right.float().contiguous()
        weights[f"{layer}.lora_B.weight"] = (change.left.float() * (own / alpha)).contiguous()
    return weights, alpha


def _compare_adapter(path: Path, weights: dict[str, torch.Tensor], alpha: float, base: Path) -> None:
    reader = open_gguf(path)
    fields = fields_of(reader)
    outer = read_config(base)
    config = outer.get("text_config") or outer
    named = tensor_names(str(fields.get("general.architecture")), config.get("num_hidden_layers") or config["n_layer"])
    stored = {tensor.name: tensor for tensor in reader.tensors}
    problems = []
    if not math.isclose(fields.get("adapter.lora.alpha", 0), alpha, rel_tol=1e-6):
        problems.append(f"alpha is {fields.get('adapter.lora.alpha')}, not {alpha}")
    for name, weight in weights.items():
        plain = name.removeprefix(PREFIX)
        half = "a" if plain.endswith(".lora_A.weight") else "b"
        tensor = f"{plain[: -len('.lora_A.weight')]}.weight"
        target = f"{named(tensor)}.lora_{half}"
        expected, arranged = weight, arrangement(tensor, str(config.get("model_type")), config)
        if half == "b" and arranged == "permuted":
            expected = permuted(expected, tensor, config)
        if arranged == "transposed":  # (B A)^T = A^T B^T
            target, expected = f"{target[:-1]}{'ab'[half == 'a']}", expected.T
        found = stored.pop(target, None)
        if found is None or not np.array_equal(found.data.reshape(expected.shape), expected.numpy()):
            problems.append(f"{plain} {'is missing' if found is None else 'has other values'}")
    problems += [f"{name} is no part of the adapter" for name in sorted(stored)]
    if problems:
        raise DataError("; ".join(problems[:5]))


@contextmanager
def _staged(output: Path) -> Iterator[Path]:
    """A name beside `output` to write to; the file gets its own name when all went well, and is removed otherwise."""
    output.parent.mkdir(parents=True, exist_ok=True)
    staging = output.with_name(f".staging-{output.name}")
    staging.unlink(missing_ok=True)
    try:
        yield staging
        publish_file(staging, output)
    except OSError as error:
        raise EnvironmentFault(f"{output} cannot be written: {error}. Choose another place, or make space.") from None
    finally:
        staging.unlink(missing_ok=True)


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """The empty `folder`, removed at the end; one that a killed process left is emptied."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _as_trained(model: Path, fmt: ChatFormat) -> Iterator[Path]:
    """`model`, or a copy of it without what would make the converter take another chat template than the trained one.

    It prefers the template in tokenizer_config.json, the base's own, to chat_template.jinja (gguf/vocab.py).
    """
    settings = model / "tokenizer_config.json"
    values = read_json(settings) if settings.is_file() else {}
    if values.pop("chat_template", fmt.tokenizer.chat_template) == fmt.tokenizer.chat_template:
        yield model
        return
    whole = model.resolve()
    with _scratch(whole.with_name(f".converting-{whole.name}")) as folder:
        for path in model.iterdir():
            if path.is_file() and path != settings:
                _link(path.resolve(), folder / path.name)
        write_json(folder / settings.name, values)
        yield folder


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copyfile(source, target)


@contextmanager
def _blamed_on(script: Path) -> Iterator[None]:
    """Say of what is found wrong in a file that `script` wrote it, and what to do."""
    try:
        yield
    except DataError as error:
        raise DataError(
            f"{script.name} wrote a GGUF file that is not this model: {error}. It was removed; an earlier file is as "
            f"it was. Update llama.cpp (`git pull` in {script.parent}) and run it again; if the newest one does the "
            "same, its converter is at fault with this model: report it there."
        ) from None
