"""The memory of the presets on paper, and its table in config/README.md: `python -m persona.train.estimate.presets`."""

from pathlib import Path
from typing import Any

from transformers import AutoConfig

from persona.config import load_config
from persona.files import write_text
from persona.model.render import Example
from persona.train.estimate.fit import with_losses
from persona.train.estimate.gpus import WINDOWS_KEEPS
from persona.train.estimate.memory import GIB, OnPaper, Setup

# From the config.json of each model on the hub
_QWEN3 = {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 40960}
_LLAMA = {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256, "max_position_embeddings": 131072}
_MISTRAL = {"num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 32768, "sliding_window": None}
# architecture, width, feed-forward width, layers, heads, tied embeddings, and what is common to a family
_MODELS: dict[str, tuple[str, int, int, int, int, bool, dict[str, Any]]] = {
    "Qwen/Qwen2.5-1.5B-Instruct": ("qwen2", 1536, 8960, 28, 12, True,
                                   {"num_key_value_heads": 2, "vocab_size": 151936, "max_position_embeddings": 32768}),
    "Qwen/Qwen2.5-14B-Instruct": ("qwen2", 5120, 13824, 48, 40, False,
                                  {"num_key_value_heads": 8, "vocab_size": 152064, "max_position_embeddings": 32768}),
    "Qwen/Qwen3-4B-Instruct-2507": ("qwen3", 2560, 9728, 36, 32, True, _QWEN3),
    "Qwen/Qwen3-8B": ("qwen3", 4096, 12288, 36, 32, False, _QWEN3),
    "Qwen/Qwen3-14B": ("qwen3", 5120, 17408, 40, 40, False, _QWEN3),
    "meta-llama/Llama-3.1-8B-Instruct": ("llama", 4096, 14336, 32, 32, False, _LLAMA),
    "meta-llama/Llama-3.2-3B-Instruct": ("llama", 3072, 8192, 28, 24, True, _LLAMA),
    "mistralai/Mistral-7B-Instruct-v0.3": ("mistral", 4096, 14336, 32, 32, False, _MISTRAL | {"vocab_size": 32768}),
    "mistralai/Mistral-Nemo-Instruct-2407": ("mistral", 5120, 14336, 40, 32, False, _MISTRAL | {"vocab_size": 131072}),
}  # fmt: skip
# A character card, and exchanges of which the reply is learned: a little longer than in the two samples
_SHARED, _EXCHANGE, _LEARNED = 300, 100, 70
_BEGIN, _END = "<!-- memory -->\n", "<!-- /memory -->"


def model_config(name: str) -> Any:
    """The configuration of the model `name` of a preset, without the hub."""
    kind, width, inner, layers, heads, tied, rest = _MODELS[name]
    sizes = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers}
    return AutoConfig.for_model(kind, **sizes, num_attention_heads=heads, tie_word_embeddings=tied, **rest)


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
    needs = [with_losses(step.parts, "cuda") + max(trial - step.peak, 0) for step in steps]
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
