"""A small stand-in for llama.cpp's converters: Llama and Qwen3 models, and adapters, to GGUF; with a fault if asked.

Written from the description of the format, not from those programs; it knows how they arrange a Llama's weights.
"""

import json
from pathlib import Path

import gguf
import numpy as np
from safetensors.numpy import load_file


def _permuted(weight, heads):
    return weight.reshape(heads, 2, len(weight) // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def _arranged(name, weight, config, fault):
    if fault == "order" or config["model_type"] == "qwen3" or not name.endswith(("q_proj.weight", "k_proj.weight")):
        return weight
    return _permuted(weight, config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"])


def convert_model(folder: Path, outfile: Path, outtype: str, name: str, fault: str = "") -> None:
    """Write the Llama or Qwen3 model in `folder` as a GGUF file, with `fault` in it."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    architecture = "qwen3" if config["model_type"] == "qwen3" else "llama"
    writer = gguf.GGUFWriter(outfile, architecture)
    writer.add_name(name)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"] // (2 if fault == "context" else 1))
    writer.add_embedding_length(config["hidden_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    if architecture == "qwen3":
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    _add_vocabulary(writer, folder, config["vocab_size"], fault)
    known = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(known[architecture], config["num_hidden_layers"])
    tensors = load_file(folder / "model.safetensors")
    if fault == "missing":
        tensors.pop(sorted(tensors)[3])
    kind = {"f16": gguf.GGMLQuantizationType.F16, "q8_0": gguf.GGMLQuantizationType.Q8_0}.get(outtype)
    for number, (tensor, weight) in enumerate(tensors.items()):
        values = _arranged(tensor, weight.astype(np.float32), config, fault)
        values = values * 1.01 if fault == "values" and number == 5 else values
        matrix = values.ndim > 1
        stored = gguf.quantize(values, kind if matrix and kind else gguf.GGMLQuantizationType.F32)
        target = names.get_name(tensor, try_suffixes=(".weight",))
        writer.add_tensor(target, stored, raw_dtype=kind if matrix else None)
    if fault == "extra":
        writer.add_tensor("blk.0.attn_rot.weight", np.zeros((4, 4), np.float32))
    _close(writer)
    if fault == "cut":
        outfile.write_bytes(outfile.read_bytes()[:5000])


def _add_vocabulary(writer, folder, rows, fault):
    raw = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    texts = {number: text for text, number in raw["model"]["vocab"].items()}
    special = {token["id"]: token["content"] for token in raw["added_tokens"]}
    plain = {token["id"] for token in raw["added_tokens"] if not token["special"]}
    tokens = [(texts | special).get(number, f"[PAD{number}]") for number in range(rows)]
    tokens = [tokens[1], tokens[0], *tokens[2:]] if fault == "tokens" else tokens
    control = gguf.TokenType.NORMAL if fault == "plain" else gguf.TokenType.CONTROL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens[:-5] if fault == "short" else tokens)
    types = dict.fromkeys(special, control) | dict.fromkeys(plain, gguf.TokenType.USER_DEFINED)
    writer.add_token_types([types.get(n, gguf.TokenType.NORMAL) for n in range(rows)])
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in raw["model"]["merges"]])
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    numbers = {text: number for number, text in special.items()}
    writer.add_eos_token_id(0 if fault == "end" else numbers[settings["eos_token"]])
    writer.add_bos_token_id(numbers[settings.get("bos_token") or settings["eos_token"]])
    writer.add_add_bos_token(fault == "bos")
    writer.add_add_eos_token(fault == "eos")
    if fault != "no template":
        # the base's own, in its settings, comes first
        written = (folder / "chat_template.jinja").read_text(encoding="utf-8")
        writer.add_chat_template(settings.get("chat_template", written))


def convert_adapter(folder: Path, base: Path, outfile: Path, fault: str = "") -> None:
    """Write the LoRA adapter in `folder` as a GGUF file, with `fault` in it."""
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    writer = gguf.GGUFWriter(outfile, "llama")
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, 1.0 if fault == "alpha" else float(settings["lora_alpha"]))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    tensors = load_file(folder / "adapter_model.safetensors")
    if fault == "missing":
        tensors.pop(sorted(tensors)[2])
    for name, weight in tensors.items():
        layer, half = name.removeprefix("base_model.model.").rsplit(".lora_", 1)
        tensor, first = f"{layer}.weight", half.startswith("A")
        values = weight.astype(np.float32) if first else _arranged(tensor, weight.astype(np.float32), config, fault)
        writer.add_tensor(f"{names.get_name(tensor, try_suffixes=('.weight',))}.lora_{half[0].lower()}", values)
    _close(writer)


def _close(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
