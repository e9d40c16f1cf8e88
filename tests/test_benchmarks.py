"""The benchmark measures what it says: one loss in every layout, and fewer computed tokens when they are shared."""

import importlib.util
import json
from pathlib import Path

import pytest
from making.tiny import family, save_model
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.usefixtures("one_thread")


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def throughput():
    return load("throughput")


def test_the_workloads_are_single_exchanges_behind_one_system_prompt(throughput, tmp_path):
    throughput.write_workload(tmp_path / "line.jsonl", throughput.LINE)
    talks = [json.loads(line)["messages"] for line in (tmp_path / "line.jsonl").read_text("utf-8").splitlines()]
    assert len(talks) >= 128
    assert {tuple(message["role"] for message in talk) for talk in talks} == {("system", "user", "assistant")}
    assert {talk[0]["content"] for talk in talks} == {throughput.LINE}


def test_every_layout_has_the_same_loss(throughput, tmp_path):
    model = save_model(tmp_path / "model", "llama", family("chatml_default"))
    data = tmp_path / "card.jsonl"
    throughput.write_workload(data, "You are Tamsin. " * 20)
    figures = {layout: throughput.measure(layout, model, data, 8, 3000) for layout in throughput.OURS}
    padded, packed, shared = (figures[layout] for layout in ("padded", "packed", "shared"))
    assert shared["train_loss"] == pytest.approx(padded["train_loss"], rel=0.01)
    assert packed["computed_tokens"] == packed["tokens"] - 8  # all but the last token of each
    assert shared["computed_tokens"] < 0.6 * packed["computed_tokens"]
    assert 0 < shared["share_of_limit"] < 1
    # every tool stands in the table, with the ratio to the shared run
    table = throughput.report("card", {layout: [one, one] for layout, one in figures.items()}, 8)
    assert [line.split("|")[1].strip() for line in table.splitlines()[-3:]] == ["padded", "packed", "shared"]
    assert table.rstrip().endswith("1.0 (1.0 to 1.0) |")


def test_operations_count_what_a_linear_layer_needs(throughput):
    from making.tiny import model

    from persona.config import Lora
    from persona.model.loading import add_adapter

    tuned = add_adapter(model("llama"), Lora(r=4, lora_dropout=0.0), 0, "tiny")
    layer = 64 * 64 * 2 + 64 * 32 * 2 + 64 * 128 * 3  # q and o, k and v, the gated layer
    adapter = 4 * (128 * 2 + 96 * 2 + 192 * 3)
    expected = 10 * (4 * 2 * layer + 6 * 2 * adapter) + 3 * 4 * 64 * 512 + 6 * 2 * 55 * 16 * 4 * 2
    assert throughput.operations(tuned, 10, 3, 55) == expected


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_both_ways_of_merging_write_the_same_model(tmp_path):
    merge = load("merge")
    tokenizer = save_model(tmp_path / "tokenizer", "llama", family("chatml_default"))
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    merge.make("tiny", base, adapter, tokenizer)
    figures = {way: [merge.measure(way, base, adapter, tmp_path / way)] for way in ("copy", "ours", "peft")}
    copy, ours, theirs = (load_file(tmp_path / way / "model.safetensors") for way in figures)
    assert ours.keys() == theirs.keys() == copy.keys()
    for name, tensor in ours.items():
        assert tensor.shape == copy[name].shape
        assert (tensor - theirs[name]).abs().max() <= 2**-10 * tensor.abs().max()
    assert any(not ours[name].equal(copy[name]) for name in ours)
    assert merge.report(figures, 1e6).splitlines()[2].startswith("| copy |")
