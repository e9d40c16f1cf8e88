"""The table of memory in config/README.md is the estimate's, and every preset fits its GPU under Windows."""

from pathlib import Path

import pytest
from torch import nn

from persona.config import load_config
from persona.engine.trial import why_not
from persona.model.architecture import layers_in_4_bits, without_weights
from persona.train.estimate.memory import GIB
from persona.train.estimate.presets import full_pack, gpu_size, memory_row, model_config, on_paper

ROOT = Path(__file__).resolve().parents[3]
PRESETS = sorted((ROOT / "config" / "presets").glob("*.json"))
LEAST = 10  # per cent


def page():
    return (ROOT / "config" / "README.md").read_text(encoding="utf-8")


def rows():
    text = page()
    lines = text.partition("<!-- memory -->\n")[2].partition("<!-- /memory -->")[0].splitlines()[2:]
    return {line.split("`")[1]: line for line in lines}


def test_every_preset_has_a_row_and_leaves_a_tenth():
    assert sorted(rows()) == [path.name for path in PRESETS]
    assert len(PRESETS) >= 21
    for name, row in rows().items():
        assert int(row.split("|")[-2].strip().removesuffix("%")) >= LEAST, name


# one of most architectures, and the tightest; all of them would take two minutes
@pytest.mark.parametrize(
    "name",
    [
        *("qwen3-4b-6gb", "qwen2.5-1.5b-8gb", "mistral-7b-v0.3-16gb", "ministral3-8b-12gb", "gemma4-12b-12gb"),
        "qwen3.5-4b-8gb",
    ],
)
def test_the_table_of_memory_is_the_generated_one(name):
    path = ROOT / "config" / "presets" / f"{name}.json"
    assert rows()[path.name] == memory_row(path), "run python -m persona.train.estimate.presets"


def test_the_trial_before_the_first_update_needs_less_than_a_step():
    paper, limit = on_paper(ROOT / "config" / "presets" / "qwen3-4b-6gb.json")  # the least pack
    examples = full_pack(limit)
    assert paper.trial(examples) < paper.step(examples).peak


def test_presets_are_for_gpus_and_their_models_are_known():
    for path in PRESETS:
        assert gpu_size(path) in (6, 8, 12, 16, 24)
        config = load_config(path, [])
        assert model_config(config.model.name_or_path).get_text_config().num_hidden_layers > 20
        assert config.training.gradient_checkpointing


def test_the_table_to_choose_from_says_of_each_preset_what_the_code_says():
    table = page().partition("## Which preset\n")[2].partition("\n\n[How")[0].splitlines()[3:]
    lines = {name.strip("`"): cells for cells in (line[2:-2].split(" | ") for line in table) for name in cells[1:2]}
    assert sorted(lines) == [path.name for path in PRESETS]
    for path in PRESETS:
        config = load_config(path, [])
        model = without_weights(model_config(config.model.name_or_path))
        gpu, _, parameters, _, _, shared = lines[path.name]
        assert gpu == f"{gpu_size(path)} GB", path.name
        assert float(parameters) == round(sum(weight.numel() for weight in model.parameters()) / 1e9, 1), path.name
        assert shared == ("no" if why_not(model.config, config.data.max_length) else "yes"), path.name


def test_the_embeddings_of_gemma_4_are_as_large_as_the_page_says_and_stay_in_16_bits():
    model = without_weights(model_config("google/gemma-4-E4B-it"))
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Embedding)]
    ordinary, in_layers = (2 * model.get_submodule(name).weight.numel() / GIB for name in names)
    assert f"take {in_layers} GiB" in page()
    assert f"another {ordinary} GiB" in page()
    assert not layers_in_4_bits(model).keys() & set(names)
