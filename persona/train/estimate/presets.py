"""The memory of the presets on paper, and its table in config/README.md: `python -m persona.train.estimate.presets`."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from persona.config import load_config
from persona.files import write_text
from persona.model.render import Example
from persona.train.estimate.fit import with_losses
from persona.train.estimate.gpus import WINDOWS_KEEPS
from persona.train.estimate.memory import GIB, OnPaper, Setup


def _text(
    kind: str, width: int, inner: int, layers: int, heads: int, groups: int, vocabulary: int, tied: bool, **more: object
) -> Mapping[str, Any]:
    """The sizes of a decoder of text, under the names that config.json gives them."""
    sizes = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers}
    heads_of = {"num_attention_heads": heads, "num_key_value_heads": groups}
    rest = {"vocab_size": vocabulary, "tie_word_embeddings": tied}
    return {"model_type": kind, **sizes, **heads_of, **rest, **more}


_QWEN3 = {"head_dim": 128, "max_position_embeddings": 40960}
_LLAMA = {"head_dim": 128, "max_position_embeddings": 131072}
_MISTRAL = {"head_dim": 128, "max_position_embeddings": 32768, "sliding_window": None}
_QWEN3_5 = {
    **{"head_dim": 256, "max_position_embeddings": 262144, "linear_conv_kernel_dim": 4},
    **{"linear_num_key_heads": 16, "linear_num_value_heads": 32, "linear_key_head_dim": 128},
    **{"linear_value_head_dim": 128, "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 8},
}
_GEMMA4 = {"head_dim": 256, "global_head_dim": 512, "final_logit_softcapping": 30.0}
_SLIDING = ["sliding_attention"] * 5 + ["full_attention"]
# The config.json of each model on the hub, as far as it says sizes: for a model that reads pictures or sound those of
# its towers too, which stay in memory with it
_MODELS: dict[str, Mapping[str, Any]] = {
    "Qwen/Qwen2.5-1.5B-Instruct": _text(
        "qwen2", 1536, 8960, 28, 12, 2, 151936, True, max_position_embeddings=32768
    ),
    "Qwen/Qwen2.5-14B-Instruct": _text(
        "qwen2", 5120, 13824, 48, 40, 8, 152064, False, max_position_embeddings=32768
    ),
    "Qwen/Qwen3-4B-Instruct-2507": _text("qwen3", 2560, 9728, 36, 32, 8, 151936, True, **_QWEN3),
    "Qwen/Qwen3-8B": _text("qwen3", 4096, 12288, 36, 32, 8, 151936, False, **_QWEN3),
    "Qwen/Qwen3-14B": _text("qwen3", 5120, 17408, 40, 40, 8, 151936, False, **_QWEN3),
    # transformers loads their text alone
    "Qwen/Qwen3.5-4B": _text("qwen3_5_text", 2560, 9216, 32, 16, 4, 248320, True, **_QWEN3_5),
    "Qwen/Qwen3.5-9B": _text("qwen3_5_text", 4096, 12288, 32, 16, 4, 248320, False, **_QWEN3_5),
    "meta-llama/Llama-3.1-8B-Instruct": _text("llama", 4096, 14336, 32, 32, 8, 128256, False, **_LLAMA),
    "meta-llama/Llama-3.2-3B-Instruct": _text("llama", 3072, 8192, 28, 24, 8, 128256, True, **_LLAMA),
    "mistralai/Mistral-7B-Instruct-v0.3": _text("mistral", 4096, 14336, 32, 32, 8, 32768, False, **_MISTRAL),
    "mistralai/Mistral-Nemo-Instruct-2407": _text("mistral", 5120, 14336, 40, 32, 8, 131072, False, **_MISTRAL),
    "mistralai/Ministral-3-8B-Instruct-2512-BF16": {
        **{"model_type": "mistral3", "tie_word_embeddings": False},
        "text_config": _text(
            "ministral3", 4096, 14336, 34, 32, 8, 131072, False, head_dim=128, max_position_embeddings=262144
        ),
        "vision_config": {
            **{"model_type": "pixtral", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24},
            **{"num_attention_heads": 16, "patch_size": 14, "image_size": 1540},
        },
    },
    "google/gemma-4-E4B-it": {
        "model_type": "gemma4",
        "text_config": _text(
            *("gemma4_text", 2560, 10240, 42, 8, 2, 262144, True),
            **_GEMMA4,
            **{"layer_types": _SLIDING * 7, "sliding_window": 512, "num_kv_shared_layers": 18},
            **{"vocab_size_per_layer_input": 262144, "hidden_size_per_layer_input": 256},
        ),
        "vision_config": {
            **{"model_type": "gemma4_vision", "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 16},
            **{"num_attention_heads": 12, "num_key_value_heads": 12, "head_dim": 64, "use_clipped_linears": True},
        },
        "audio_config": {
            **{"model_type": "gemma4_audio", "hidden_size": 1024, "num_hidden_layers": 12, "num_attention_heads": 8},
            **{"output_proj_dims": 1536, "use_clipped_linears": True},
        },
    },
    "google/gemma-4-12B-it": {
        "model_type": "gemma4_unified",
        "text_config": _text(
            *("gemma4_unified_text", 3840, 15360, 48, 16, 8, 262144, True),
            **_GEMMA4,
            **{"layer_types": _SLIDING * 8, "sliding_window": 1024, "attention_k_eq_v": True},
            **{"num_global_key_value_heads": 1, "use_bidirectional_attention": "vision"},
        ),
        "vision_config": {"model_type": "gemma4_unified_vision", "mm_embed_dim": 3840, "mm_posemb_size": 1120},
        "audio_config": {"model_type": "gemma4_unified_audio", "audio_embed_dim": 640},
    },
}  # fmt: skip
# A character card, and exchanges of which the reply is learned: a little longer than in the two samples
_SHARED, _EXCHANGE, _LEARNED = 300, 100, 70
_BEGIN, _END = "<!-- memory -->\n", "<!-- /memory -->"


def model_config(name: str) -> Any:
    """The configuration of the model `name` of a preset, without the hub."""
    parts = copy.deepcopy(dict(_MODELS[name]))  # transformers changes what it is given
    return AutoConfig.for_model(parts.pop("model_type"), **parts)


def full_pack(tokens: int) -> list[Example]:
    """Examples that fill a pack of `tokens`: a character card, and exchanges that go on from it."""
    examples = []
    for number in range(max(1, (tokens - _SHARED) // _EXCHANGE)):
        own = [_SHARED + number, *range(_EXCHANGE)]  # all begin differently
        asked = (*range(_SHARED), *own[: _EXCHANGE - _LEARNED])
        examples.append(Example(asked, tuple(own[_EXCHANGE - _LEARNED : _EXCHANGE + 1])))
    return examples


def memory_table(presets: Path) -> str:
    """A Markdown table of the memory that each preset in the folder `presets` needs, in GiB."""
    lines = [
        "| preset | `max_tokens_per_pack` | weights | adapter, gradients, optimizer | activations, workspace | "
        "**on the GPU** | pack halved | left with Windows |",
        "|---|---|---|---|---|---|---|---|",
    ]
    order = sorted(presets.glob("*.json"), key=lambda path: (gpu_size(path), path.stem))
    return "\n".join([*lines, *map(memory_row, order)]) + "\n"


def on_paper(preset: Path) -> tuple[OnPaper, int]:
    """The model of the file `preset` on paper, on a GPU in bf16, and the tokens of a full pack."""
    config = load_config(preset, [])
    checkpointing, shape = config.training.gradient_checkpointing, model_config(config.model.name_or_path)
    setup = Setup(shape, config.lora, config.quantization, "bf16", "cuda", "adamw_8bit", checkpointing)
    return OnPaper(setup), config.training.pack_limit


def gpu_size(preset: Path) -> int:
    """Gigabytes of the GPU that the file's name promises."""
    return int(preset.stem.rpartition("-")[2].removesuffix("gb"))


def memory_row(path: Path) -> str:
    """The row of one preset."""
    paper, limit = on_paper(path)
    steps = [paper.step(full_pack(tokens)) for tokens in (limit, limit // 2)]
    trial = paper.trial(full_pack(limit))
    needs = [with_losses(step, "cuda") + max(trial - step.peak, 0) for step in steps]
    parts = list(steps[0].parts.values())
    room = gpu_size(path) * GIB - WINDOWS_KEEPS
    figures = [sum(parts[:2]), sum(parts[2:5]), sum(parts[5:])]
    cells = [f"`{path.name}`", f"{limit:,}", *(f"{value / GIB:.1f}" for value in figures)]
    cells += [f"**{needs[0] / GIB:.1f}**", f"{needs[1] / GIB:.1f}", f"{1 - needs[0] / room:.0%}"]
    return f"| {' | '.join(cells)} |"


def write_table(folder: Path) -> None:
    """Write the table of the presets in `folder` between the two markers of its README.md."""
    page = folder / "README.md"
    before, begin, rest = page.read_text(encoding="utf-8").partition(_BEGIN)
    _, end, after = rest.partition(_END)
    write_text(page, before + begin + memory_table(folder / "presets") + end + after)


if __name__ == "__main__":
    write_table(Path("config"))
