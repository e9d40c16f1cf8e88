"""A merged model, or an adapter alone, as a GGUF file: converted by llama.cpp, compared, and only then put in place."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from persona.errors import DataError, EnvironmentFault, UsageError
from persona.export.gguf_check import (
    GGUFReport,
    arrangement,
    check_metadata,
    check_served,
    compare_weights,
    correct_metadata,
    fields_of,
    listed,
    open_gguf,
    permuted,
    tensor_names,
)
from persona.export.llama_cpp import (
    ADAPTER_SCRIPT,
    MODEL_SCRIPT,
    check_checkout,
    check_space,
    run_converter,
)
from persona.files import ADAPTER_WEIGHTS, appearing_file, check_file, scratch, write_json
from persona.merge.adapter import PREFIX, read_adapter
from persona.merge.changes import LowRank
from persona.model.folders import tensor_index, text_config
from persona.model.render import ChatFormat


def check_output(output: Path, option: str, inputs: list[Path]) -> None:
    """Raise `UsageError` if `output` cannot be a GGUF file that we write: its name, a folder, a place in `inputs`."""
    if output.suffix != ".gguf":
        raise UsageError(f"{output}: a GGUF file is named NAME.gguf.")
    check_file(output, option)
    for folder in inputs:
        if folder.resolve() in output.resolve().parents:
            raise UsageError(f"{output} is inside {folder}, which the conversion reads; choose another place.")


def convert_model(
    model: Path, output: Path, llama_cpp: Path, outtype: str, fmt: ChatFormat
) -> tuple[GGUFReport, list[str]]:
    """Write the Hugging Face folder `model` as `output`, complete and compared or not at all.

    Returns the comparison, and a sentence for each corrected value. Raises `EnvironmentFault` when llama.cpp fails,
    `DataError` when its file is not the model, and `VerificationFailed` when it would not write the trained prompt.
    """
    script = check_checkout(llama_cpp, MODEL_SCRIPT)
    weights = sum(math.prod(info["shape"]) for _, _, info in tensor_index(model).values())
    check_space(output, weights, outtype)
    with _converted_to(output, script) as staging:
        run_converter(
            script,
            [model, "--outfile", staging, "--outtype", outtype, "--model-name", output.stem, *_drafts(model, script)],
        )
        return _compared(staging, model, fmt)


def _drafts(model: Path, script: Path) -> list[str]:
    """The converter's option for a Qwen3.5 or Qwen3-Next in `model` without layers for multi-token prediction, if any.

    The published ones have them, but transformers does not save them again; llama.cpp fails for want of them.
    """
    kind, names = str(text_config(model).get("model_type", "")), tensor_index(model)
    without = kind.startswith(("qwen3_5", "qwen3_next")) and not any("mtp." in name for name in names)
    return ["--no-mtp"] if without and "--no-mtp" in script.read_text(encoding="utf-8") else []


def _compared(path: Path, model: Path, fmt: ChatFormat) -> tuple[GGUFReport, list[str]]:
    notes = correct_metadata(path, fmt)
    reader = open_gguf(path)
    report = compare_weights(reader, model)
    check_metadata(fields_of(reader), model, fmt)
    del reader  # Windows cannot rename a file that is mapped
    return report, notes + check_served(path, fmt)


def convert_adapter(adapter: Path, base: Path, output: Path, llama_cpp: Path) -> int:
    """Write the LoRA adapter in `adapter` as `output`, in float32, for a GGUF file of `base`; returns its tensors.

    Raises `UsageError` for an adapter that is more than LoRA, which llama.cpp cannot hold.
    """
    script = check_checkout(llama_cpp, ADAPTER_SCRIPT)
    weights, alpha = plain_lora(adapter, base)
    check_space(output, sum(tensor.numel() for tensor in weights.values()), "f32")
    copy = output.with_name(f".converting-{output.stem}")
    with _converted_to(output, script) as staging, scratch(copy) as folder:
        save_file(weights, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        write_json(folder / "adapter_config.json", {"peft_type": "LORA", "lora_alpha": alpha})
        run_converter(script, [folder, "--base", base, "--outfile", staging, "--outtype", "f32"])
        _compare_adapter(staging, weights, alpha, base)
    return len(weights)


def plain_lora(adapter: Path, base: Path) -> tuple[dict[str, torch.Tensor], float]:
    """The matrices A and B of each changed weight of `base`, by PEFT's names, and the alpha that scales all of them.

    llama.cpp divides one alpha by the rank; ranks, alphas and scalings of single layers are multiplied into their B.
    Raises `UsageError` naming the first change that is not a pair of such matrices.
    """
    alpha, weights = 0.0, dict[str, torch.Tensor]()
    for name, (change, *more) in read_adapter(adapter, base).changes.items():
        if more or not isinstance(change, LowRank) or change.left.dim() != 2 or "embed" in name:
            raise UsageError(
                f"{adapter} changes {name} otherwise than by a pair of LoRA matrices, which an adapter for llama.cpp "
                "cannot hold. Merge it, and convert the whole model with --gguf."
            )
        own = change.scaling * change.right.shape[0]
        alpha = alpha or own
        layer = f"{PREFIX}{name.removesuffix('.weight')}"
        weights[f"{layer}.lora_A.weight"] = change.right.float().contiguous()
        weights[f"{layer}.lora_B.weight"] = (change.left.float() * (own / alpha)).contiguous()
    return weights, alpha


def _compare_adapter(path: Path, weights: dict[str, torch.Tensor], alpha: float, base: Path) -> None:
    reader, config = open_gguf(path), text_config(base)
    fields = fields_of(reader)
    to_gguf = tensor_names(str(fields.get("general.architecture")), config)
    stored = {tensor.name: tensor.data for tensor in reader.tensors}
    problems = []
    if not math.isclose(fields.get("adapter.lora.alpha", 0), alpha, rel_tol=1e-6):
        problems.append(f"alpha is {fields.get('adapter.lora.alpha')}, not {alpha}")
    for name, weight in weights.items():
        layer, half, _ = name.removeprefix(PREFIX).rsplit(".", 2)
        arranged = arrangement(f"{layer}.weight", config)
        if half == "lora_B" and arranged == "permuted":
            weight = permuted(weight, f"{layer}.weight", config)
        if arranged == "transposed":  # (B A)^T = A^T B^T
            half, weight = "lora_B" if half == "lora_A" else "lora_A", weight.T
        values = stored.pop(f"{to_gguf(f'{layer}.weight')}.{half.lower()}", None)
        if values is None or not np.array_equal(values.reshape(weight.shape), weight.numpy()):
            problems.append(f"{name.removeprefix(PREFIX)} {'is missing' if values is None else 'has other values'}")
    problems += [f"{name} is not part of the adapter" for name in sorted(stored)]
    if problems:
        raise DataError(listed(problems))


@contextmanager
def _converted_to(output: Path, script: Path) -> Iterator[Path]:
    """A name beside `output` for `script` to write to, which becomes `output` when the block ends well.

    Raises `EnvironmentFault` if the disk refuses it, and says with a `DataError` which script wrote the wrong file.
    """
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with appearing_file(output) as staging:
            yield staging
    except OSError as error:
        raise EnvironmentFault(f"{output} cannot be written: {error}. Choose another place, or make space.") from None
    except DataError as error:
        raise DataError(
            f"{script.name} wrote a GGUF file that is not this model: {error}. It was removed; an earlier file is as "
            f"it was. Update llama.cpp (`git pull` in {script.parent}) and run it again; if the newest one does the "
            "same, its converter is at fault with this model: report it there."
        ) from None
