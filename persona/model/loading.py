"""Tokenizer, base model in 4 or 16 bits, adapter and shards: the border to transformers, PEFT and bitsandbytes."""

import difflib
import warnings
from datetime import date
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from tokenizers import Tokenizer
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoTokenizer, BitsAndBytesConfig
from transformers.utils import logging as transformers_logging

from persona.config import Lora, Quantization
from persona.errors import EnvironmentFault, UsageError
from persona.files import AGAIN, read_json
from persona.model.adapters import read_persona
from persona.model.architecture import (
    layers_in_4_bits,
    linear_names,
    model_class,
    read_architecture,
    skeleton,
    stacked_experts,
    text_layers,
)
from persona.model.device import DTYPES, freed_at_once
from persona.model.render import BUILTIN_TEMPLATE, ChatFormat, chat_format
from persona.model.template import freeze_date

# PEFT 0.21 reads a property that transformers 5.23 deprecates
warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()

# Older models that read pictures have it. It is never copied: processors prefer it to the trained chat_template.jinja.
CHAT_TEMPLATE_OF_TOWERS = "chat_template.json"
# Texts that transformers has encoded otherwise than the tokenizer's own file says (transformers #45488)
_PROBES = ("Hello world", " two  spaces", "line\nbreak\n\n", "don't 3.14 é 你好，世界。", "\ttab (x)")


def load_tokenizer(folder: Path, chat_template: str | None, day: date) -> Any:
    """The tokenizer in `folder` with `chat_template` or its own, dates in it fixed to `day`.

    Raises `UsageError` when the tokenizer cannot be loaded exactly.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, OSError, KeyError) as error:
        raise UsageError(f"The tokenizer in {folder} cannot be loaded: {str(error).splitlines()[0]}") from None
    _check_tokenizer(tokenizer, folder)
    if chat_template is not None:
        path = Path(chat_template)
        if not path.is_file():
            raise UsageError(f"model.chat_template: {path} does not exist; null takes the model's own template.")
        try:
            tokenizer.chat_template = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise UsageError(f"model.chat_template: {path} is not UTF-8 text.") from None
    if isinstance(tokenizer.chat_template, dict):
        tokenizer.chat_template = tokenizer.chat_template.get("default")
    legacy = folder / CHAT_TEMPLATE_OF_TOWERS
    if not tokenizer.chat_template and legacy.is_file():
        tokenizer.chat_template = read_json(legacy).get("chat_template")
    if not tokenizer.chat_template:
        if not tokenizer.eos_token:
            raise UsageError(f"The tokenizer in {folder} has neither a chat template nor an end token; it cannot chat.")
        # behind the token that begins every text of its training Gemma 3 270M has perplexity 100 on the Chinese sample,
        # without it 322; llama.cpp writes it too
        begins = tokenizer.bos_token and tokenizer("a").input_ids[0] == tokenizer.bos_token_id
        tokenizer.chat_template = ("{{ bos_token }}" if begins else "") + BUILTIN_TEMPLATE
    tokenizer.chat_template = freeze_date(tokenizer.chat_template, day)
    return tokenizer


def trained_format(base: Path, adapter: Path | None, chat_template: str | None = None) -> ChatFormat:
    """The chat format of a model: `base`'s tokenizer, template and date as saved with `adapter` or the merged model.

    If nothing was trained, or another tool saved no template, it is `chat_template` or the model's own.
    """
    trained = adapter or base
    persona = read_persona(trained)
    day = date.fromisoformat(persona.date) if persona is not None else date.today()
    saved = trained / "chat_template.jinja"
    as_trained = saved.is_file() and (adapter is not None or persona is not None)
    return chat_format(load_tokenizer(base, str(saved) if as_trained else chat_template, day))


def _check_tokenizer(tokenizer: Any, folder: Path) -> None:
    path = folder / "tokenizer.json"
    if not path.is_file():
        return
    raw = Tokenizer.from_file(str(path))
    for text in _PROBES:
        expected = raw.encode(text, add_special_tokens=False).ids
        ids = tokenizer.encode(text, add_special_tokens=False)
        if ids != expected:
            raise UsageError(
                f"transformers loads the tokenizer in {folder} wrongly: {text!r} becomes {ids}, but its own file "
                f"tokenizer.json says {expected}. Training with it would teach garbage."
            )


def load_base(folder: Path, quantization: Quantization, precision: str, device: torch.device) -> Any:
    """The frozen base model on `device`, in 4 bits or in the run's precision.

    Raises `UsageError` for one that cannot be loaded, and for 4 bits when most of it would stay in 16.
    """
    dtype = DTYPES[precision]
    if quantization.load_in_4bit:
        refuse_experts(skeleton(folder), dtype)
    in_4bit = BitsAndBytesConfig(  # each is set, since bitsandbytes' own defaults are fp4 without double quantization
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=quantization.bnb_4bit_use_double_quant,
        bnb_4bit_compute_dtype=dtype,
    )
    try:
        with freed_at_once(device):
            model, info = model_class(read_architecture(folder)).from_pretrained(
                folder,
                dtype=dtype,
                device_map={"": str(device)},
                trust_remote_code=False,
                output_loading_info=True,
                quantization_config=in_4bit if quantization.load_in_4bit else None,
            )
    except ImportError as error:
        raise EnvironmentFault(
            f"The base model cannot be held in 4 bits here: {error}. Install the pinned requirements, or set "
            "quantization.load_in_4bit to false."
        ) from None
    except (ValueError, KeyError, SafetensorError) as error:
        remote = " It needs code of its own to load, which this toolkit never runs." if "remote" in str(error) else ""
        raise UsageError(f"The model in {folder} cannot be loaded: {str(error).splitlines()[0]}.{remote}") from None
    # transformers fills missing tensors with random numbers and only logs it
    if lacking := sorted(info["missing_keys"]) or sorted(str(key[0]) for key in info["mismatched_keys"]):
        raise UsageError(
            f"{folder} lacks {len(lacking)} tensors of a {model.config.model_type} model, or has them in other shapes, "
            f"such as {lacking[0]}. {AGAIN}"
        )
    model.requires_grad_(False)
    model.config.use_cache = False
    keep_gradients_in_4bit(model)
    if quantization.load_in_4bit and device.type == "cpu":
        _leave_files(model)
    return model


def _leave_files(model: nn.Module) -> None:
    """Copy the weights that are not in 4 bits: as views of the mapped files they would keep all of these in memory."""
    for weight in model.parameters():
        if getattr(weight, "quant_state", None) is None:
            weight.data = weight.data.clone()


def refuse_experts(model: Any, dtype: torch.dtype) -> None:
    """Raise `UsageError` if experts are more of `model` than all that 4 bits hold: they stay as they are.

    transformers holds the experts of a layer in one tensor, and quantizes only linear layers.
    """
    experts = stacked_experts(model)
    linear = sum(layer.weight.numel() for layer in layers_in_4_bits(model).values())
    if experts <= linear:
        return
    whole, gib = sum(weight.numel() for weight in model.parameters()), dtype.itemsize / 2**30
    raise UsageError(
        f"quantization.load_in_4bit: only {linear / whole:.0%} of this {model.config.model_type} model can be held in "
        f"4 bits. Its experts, {experts / whole:.0%} of its weights, would stay in {8 * dtype.itemsize} bits and take "
        f"{experts * gib:.1f} GiB. Take a model without experts, or hold all of it in {8 * dtype.itemsize} bits, "
        f"{whole * gib:.1f} GiB: --set quantization.load_in_4bit=false, and a merged one without --load-in-4bit."
    )


def held_in_4_bits(model: nn.Module) -> tuple[float, int]:
    """The share of the frozen weights of `model` that are in 4 bits, and the bytes of the others."""
    frozen = [weight for weight in model.parameters() if not weight.requires_grad]
    states = [getattr(weight, "quant_state", None) for weight in frozen]
    quantized = sum(state.shape.numel() for state in states if state is not None)
    others = [weight for weight, state in zip(frozen, states, strict=True) if state is None]
    count = sum(weight.numel() for weight in others)
    return quantized / (quantized + count), sum(weight.numel() * weight.element_size() for weight in others)


def keep_gradients_in_4bit(model: nn.Module) -> None:
    """Stop bitsandbytes from repacking 4-bit weights during an evaluation.

    On CPUs with avx512_bf16 a forward in evaluation mode repacks them for a kernel without a backward, and the layers'
    gradients stay lost when training goes on (bitsandbytes 0.50.2, nn/modules.py).
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010 - bitsandbytes' layers are not typed


def _targets(model: Any, lora: Lora) -> list[str]:
    """The full names of the layers that get an adapter; raises `UsageError` for a target that cannot have one."""
    wanted, known = lora.target_modules, linear_names(model)
    wrong = [name for name in wanted if name not in known] if wanted != "all-linear" else []
    if wrong:
        close = difflib.get_close_matches(wrong[0], known, 1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise UsageError(
            f"lora.target_modules: this model has no linear layer {', '.join(map(repr, wrong))} that can have an "
            f"adapter.{hint} It has {', '.join(known)}."
        )
    return [name for name in text_layers(model) if wanted == "all-linear" or name.rpartition(".")[2] in wanted]


def add_adapter(model: Any, lora: Lora, seed: int, base_name: str) -> PeftModel:
    """`model` with a fresh LoRA adapter in float32; raises `UsageError` for a target that no layer has.

    The adapter's files will name `base_name` as its base.
    """
    targets = _targets(model, lora)
    torch.manual_seed(seed)
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.lora_alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=lora.lora_dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    adapted: Any = get_peft_model(model, config)
    adapted.peft_config["default"].base_model_name_or_path = base_name
    adapted.peft_config["default"].target_parameters = None  # of some experts' models PEFT makes it an empty set
    return adapted


def load_adapter(model: Any, folder: Path) -> PeftModel:
    """`model` with the adapter in `folder`, ready to speak."""
    return PeftModel.from_pretrained(model, folder, is_trainable=False, local_files_only=True)  # pyright: ignore


def stop_ids(model: Any, end_id: int, tokenizer: Any) -> list[int]:
    """Every id that ends a reply: those of the template, the tokenizer and the model."""
    own = model.generation_config.eos_token_id if model.generation_config is not None else None
    ids = [end_id, tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])]
    return sorted({i for i in ids if i is not None})


def shard_base(model: Any, device: torch.device, count: int) -> None:
    """Leave on `device` one of `count` parts of each frozen weight; each layer gathers the rest when it computes.

    The output layer, an embedding tied to it, and the adapter stay whole, so that the update and the checkpoints are
    the same as without. Raises `UsageError` for an unknown architecture.
    """
    base = model.get_base_model()
    decoder, head = base.get_decoder(), base.get_output_embeddings()
    lists = (module for module in decoder.modules() if isinstance(module, nn.ModuleList))
    layers = max(lists, key=lambda one: sum(weight.numel() for weight in one.parameters()), default=None)
    if layers is None or decoder is None or decoder is base:
        raise UsageError(f"FSDP cannot share out a {base.config.model_type} model; train it without.")
    whole = {weight for weight in model.parameters() if weight.requires_grad} | set(head.parameters())
    for weight in whole:
        weight.data = weight.data.to(device)
    mesh = init_device_mesh(device.type, (count,))
    # Resharded after every pass, the embedding too: else process 0 would do so alone when it saves
    for module in (*layers, decoder):
        fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
