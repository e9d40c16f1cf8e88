"""The table of memory in config/README.md is the estimate's, and every preset fits its GPU under Windows."""

from pathlib import Path

import pytest

from persona.config import load_config
from persona.train.estimate.presets import full_pack, gpu_size, memory_row, model_config, on_paper

ROOT = Path(__file__).resolve().parents[3]
PRESETS = sorted((ROOT / "config" / "presets").glob("*.json"))
LEAST = 10  # per cent


def rows():
    text = (ROOT / "config" / "README.md").read_text(encoding="utf-8")
    lines = text.partition("<!-- memory -->\n")[2].partition("<!-- /memory -->")[0].splitlines()[2:]
    return {line.split("`")[1]: line for line in lines}


def test_every_preset_has_a_row_and_leaves_a_tenth():
    assert sorted(rows()) == [path.name for path in PRESETS]
    assert len(PRESETS) >= 13
    for name, row in rows().items():
        assert int(row.split("|")[-2].strip().removesuffix("%")) >= LEAST, name


# one of each architecture, and the tightest; all of them would take a minute
@pytest.mark.parametrize("name", ["qwen3-4b-6gb", "qwen2.5-1.5b-8gb", "mistral-7b-v0.3-16gb"])
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
        assert model_config(config.model.name_or_path).num_hidden_layers > 20
        assert config.training.gradient_checkpointing
