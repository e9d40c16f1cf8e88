"""The architecture of a base: its class in transformers, its language part, and the layers that an adapter may change.

Models that read pictures or sound are wrappers: a decoder of text, and towers whose output it takes as tokens. They are
trained on text alone, so nothing outside the decoder is ever changed.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.quantizers_utils import should_convert_module

from persona.console import excerpt
from persona.errors import UsageError
from persona.model.device import is_out_of_memory

_PAST_THE_LAYER = frozenset({"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"})  # as PEFT 0.21 lists them


def read_architecture(folder: Path) -> Any:
    """The configuration in `folder`, as transformers reads it; raises `UsageError` if it cannot."""
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, KeyError, OSError) as error:
        remote = " It needs code of its own to load, which this toolkit never runs." if "remote" in str(error) else ""
        raise UsageError(f"The model in {folder} cannot be loaded: {str(error).splitlines()[0]}.{remote}") from None


def model_class(config: Any) -> Any:
    """The class of transformers that loads a model of this configuration to speak; raises `UsageError` if none does.

    If there is one for the text alone, as for Qwen3.5, it is that one: the towers are not loaded then.
    """
    if type(config) in AutoModelForCausalLM._model_mapping:
        return AutoModelForCausalLM
    if type(config) in AutoModelForImageTextToText._model_mapping and not config.is_encoder_decoder:
        return AutoModelForImageTextToText
    raise UsageError(
        f"A model of the kind {config.model_type} cannot be trained to speak: transformers knows no decoder of text "
        "for it. Choose a chat model, or a base model that continues text."
    )


def skeleton(folder: Path, dtype: torch.dtype | None = None) -> Any:
    """The model in `folder` without weights, on torch's meta device; raises `UsageError` if its kind is not known."""
    return without_weights(read_architecture(folder), dtype)


def without_weights(config: Any, dtype: torch.dtype | None = None) -> Any:
    """A model of this configuration on torch's meta device; raises `UsageError` if it cannot be made."""
    kind = model_class(config)
    try:
        with torch.device("meta"):
            model = kind.from_config(config, dtype=dtype, trust_remote_code=False)
    except (ValueError, TypeError, KeyError, OSError, ImportError, AttributeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UsageError(f"A model of the kind {config.model_type} cannot be made here: {reason}") from None
    if kind is AutoModelForImageTextToText and (
        model.get_decoder() in (None, model) or model.get_output_embeddings() is None
    ):
        raise UsageError(f"A model of the kind {config.model_type} has no decoder of text that can be trained alone.")
    return model


def language_modules(model: Any) -> set[nn.Module]:
    """The modules that compute text from text: the decoder with everything below it, and the output layer."""
    return {*model.get_decoder().modules(), model.get_output_embeddings()}


def text_layers(model: Any) -> dict[str, Any]:
    """The linear layers that an adapter may change, by name: those of the language part without its output layer.

    No router of experts is among them: some are subclasses of a linear layer that return two tensors, and the others
    decide rather than compute. Stacked weights of experts are not linear layers.
    """
    inside, head = language_modules(model), model.get_output_embeddings()
    kinds = ("Linear", "Linear4bit", "Conv1D")  # the last is GPT-2's
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if layer in inside and layer is not head and type(layer).__name__ in kinds and not _of_router(name)
    }
    # Mamba's kernels take the weight of its last projection past the layer, and PEFT refuses it
    barred = {"out_proj"} if model.config.get_text_config().model_type in _PAST_THE_LAYER else set[str]()
    barred |= {last for last in map(_last, layers) if _moved_by_peft(last, model)}
    return {name: layer for name, layer in layers.items() if _last(name) not in barred}


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _moved_by_peft(last: str, model: Any) -> bool:
    """Whether PEFT would adapt stacked experts instead of a layer whose name ends so, such as a shared expert's.

    It takes the names of some architectures for those of transformers 4, where each expert had layers so called.
    """
    config = LoraConfig(target_modules=[last])
    try:
        convert_peft_config_for_transformers(config, model, None)
    except ValueError:  # another name would have to be there too
        return True
    return bool(config.target_parameters)


def _of_router(name: str) -> bool:
    """Whether the layer of this name decides which experts compute, or how much the shared one counts."""
    return any(part in ("gate", "shared_expert_gate") or "router" in part for part in name.split("."))


def linear_names(model: Any) -> list[str]:
    """The last parts of the names of `text_layers`, in order of appearance."""
    return list(dict.fromkeys(map(_last, text_layers(model))))


def layers_in_4_bits(model: Any) -> dict[str, Any]:
    """The layers that transformers quantizes when it loads `model` in 4 bits, by name.

    Stacked weights of experts are not layers, and stay as they are.
    """
    # as quantizers/base.py of transformers 5.23 has it, which asks while tied weights are still two
    last = [name for name, _ in model.named_parameters(remove_duplicate=False)][-1]
    ties, head = model.all_tied_weights_keys, model.get_output_embeddings()
    kept = [key.removesuffix(".weight") for key in (*ties, *ties.values(), last)]
    kept += [name for name, layer in model.named_modules() if layer is head]
    kept += model._keep_in_fp32_modules or ()
    return {
        name: layer
        for name, layer in model.named_modules()
        if (type(layer) is nn.Linear or isinstance(layer, Conv1D)) and should_convert_module(name, kept)
    }


def stacked_experts(model: Any) -> int:
    """How many weights are those of experts that are stacked in one tensor a layer."""
    convolutions = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    inside = (one for one in language_modules(model) if not isinstance(one, convolutions))
    weights = (weight for one in inside for weight in one._parameters.values())
    return sum(weight.numel() for weight in weights if weight is not None and weight.ndim == 3)


@contextmanager
def computable(model: Any) -> Iterator[None]:
    """Turn a failure of the first passes of `model` into `UsageError`: transformers cannot compute it at all."""
    try:
        yield
    except (RuntimeError, ValueError, TypeError, AttributeError, LookupError, ImportError) as error:
        if is_out_of_memory(error) or re.search("same device|CUDA error", str(error)):  # ours, or the driver's
            raise
        raise UsageError(
            f"transformers cannot compute this {model.config.model_type} model: {excerpt(str(error), 200)}. Its "
            "config.json may not fit its weights, or it needs a package or device that is missing. Take another model."
        ) from error


def looks_ahead(model: Any) -> bool:
    """Whether a token of `model` depends on tokens behind it: then it would learn to copy them, not to speak.

    The gradient of the first token's logits with respect to the inputs behind it is exactly zero if it does not.
    Raises `UsageError` for a model that cannot be computed.
    """
    inputs = []

    def keep(_module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        inputs.append(output.detach().requires_grad_())
        return inputs[-1]

    embedding = model.get_input_embeddings()
    hook, mode = embedding.register_forward_hook(keep), model.training
    try:
        ids = torch.arange(1, 5, device=embedding.weight.device)[None]
        with computable(model):
            first = model.eval()(input_ids=ids, use_cache=False).logits[0, 0]
            (gradient,) = torch.autograd.grad(first.float().logsumexp(-1), inputs[:1])
    finally:
        hook.remove()
        model.train(mode)
    own, others = gradient[0, 0].abs().max(), gradient[0, 1:].abs().max()
    return bool(others > 1e-3 * own)
