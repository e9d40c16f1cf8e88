"""The benchmarks measure what they say: one loss in every layout, fewer computed tokens when they are shared."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from making.tiny import family, save_model
from safetensors.torch import load_file

from persona.config import load_config
from persona.engine.fused import KNOWN
from persona.errors import DataError, EnvironmentFault
from persona.train.estimate.presets import model_config

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


# --- the session on a GPU ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gpu_session():
    return load("gpu_session")


@pytest.fixture
def _a_process_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("HF_DEACTIVATE_ASYNC_LOAD", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr("sys.path", list(sys.path))
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.mark.usefixtures("_a_process_of_its_own")
def test_a_session_on_the_pretended_gpu_measures_each_step_and_writes_it_at_once(gpu_session, tmp_path, capsys):
    file, written = tmp_path / "figures.json", []

    with gpu_session.pretended(True) as run:

        def planted(name):
            written.append(len(json.loads(file.read_text("utf-8"))["steps"]) if file.exists() else 0)
            if name == "four_bits":
                raise RuntimeError(f"planted in {Path.home()} and {ROOT}")
            return run(name)

        session = gpu_session.measure_all(file, planted, True)
    assert written == list(range(7))  # a session that breaks off keeps the steps before
    assert json.loads(file.read_text("utf-8")) == session
    steps = session["steps"]
    assert [name for name, entry in steps.items() if "fault" in entry] == ["four_bits"]
    assert steps["four_bits"]["fault"] == "RuntimeError: planted in ~ and (project)"
    for private in (str(Path.home()), str(ROOT), str(tmp_path)):
        assert private not in file.read_text("utf-8")
    assert "2/7 4 bits on the GPU and on the CPU ... failed: RuntimeError: planted" in capsys.readouterr().out
    figures = {name: entry["figures"] for name, entry in steps.items() if "figures" in entry}
    assert figures["machine"]["gpu"] == "Pretended GPU"
    assert len(figures["machine"]["checks"]) >= 8
    for one in figures["equivalences"].values():
        for form in gpu_session.FORMS:
            assert one[form]["gradients"] <= one["allowed"]["gradients"]
            assert one[form]["scores"] == ["float32"]
            assert one[form]["same_gradients_again"]
    assert max(form["difference"] for form in figures["fused_attention"]["400"].values()) < 0.02
    (model,) = figures["real_steps"].values()
    for way in ("ours", "packed", "padded"):
        assert model[way]["loss"] == pytest.approx(model["ours"]["loss"], rel=1e-3)
        assert model[way]["tokens_a_second"] > 0
    assert model["tokens_computed"] < model["tokens_of_examples"]
    assert len(model["ours"]["kernels"]) == 20
    assert figures["whole_run"]["continued_byte_for_byte"]
    assert figures["whole_run"]["largest_difference_of_losses"] < 0.01
    assert len(figures["whole_run"]["losses"]) == 3
    speed, checks = (table.splitlines() for table in gpu_session.tables([session, session]).split("\n\n"))
    assert len(speed) == len(checks) == 4
    assert {line.count("|") for line in speed} == {speed[0].count("|")}
    assert {line.count("|") for line in checks} == {checks[0].count("|")}
    assert speed[2].startswith("| Pretended GPU, 8 GiB (pretended, in small) | qwen3-4b-8gb | 600 | ")
    assert "| failed | bf16 " in checks[3]  # 4 bits failed, the trees were compared
    assert "| byte for byte |" in checks[3]


@pytest.mark.usefixtures("_a_process_of_its_own")
def test_4_bits_of_the_pretended_gpu_are_those_of_the_cpu(gpu_session):
    with gpu_session.pretended(True) as run:
        figures = run("four_bits")
    assert [one["codes_that_differ"] for one in figures.values()] == [0, 0, 0]
    assert [one["codes"] for one in figures.values()] == [64 * 64 // 2] * 3


def test_a_step_that_ends_its_process_is_recorded_and_the_next_one_runs(gpu_session, tmp_path, monkeypatch):
    def command(name, file):
        if name == "equivalences":  # as bitsandbytes ends a process after an error of CUDA
            text = "import os, sys; print('a line\\nError 700 at line 91', file=sys.stderr, flush=True); os._exit(1)"
        else:
            text = f'import pathlib; pathlib.Path({str(file)!r}).write_text(\'{{"skipped": "a test"}}\')'
        return [sys.executable, "-c", text]

    monkeypatch.setattr(gpu_session, "command_of", command)
    session = gpu_session.measure_all(tmp_path / "figures.json", gpu_session.in_a_process, False)
    faults = {name: entry for name, entry in session["steps"].items() if "fault" in entry}
    assert {name: (entry["fault"], entry["details"]) for name, entry in faults.items()} == {
        "equivalences": ("exit code 1: Error 700 at line 91", ["a line", "Error 700 at line 91"])
    }
    assert len(session["steps"]) == 7


def test_without_a_gpu_one_line_says_what_to_do(gpu_session, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_session.py"])
    with pytest.raises(
        EnvironmentFault, match=r"^torch can use no CUDA GPU here.*python finetune.py --doctor$"
    ) as fault:
        gpu_session.main()
    assert fault.value.exit_code == 4
    assert list(tmp_path.iterdir()) == []


def test_tables_are_made_again_from_files(gpu_session, monkeypatch, capsys, tmp_path):
    session = {"format": 1, "date": "2026-11-25", "pretended": False, "steps": {}}
    machine = {"gpu": "RTX 4060", "memory_gib": 8.0, "system": "Windows", "driver": "581.1", "torch": "2.13.0+cu130"}
    session["steps"]["machine"] = {"seconds": 1, "figures": machine}
    session["steps"]["real_steps"] = {"seconds": 1, "figures": {"qwen3-8b-16gb": {"skipped": "8.9 GiB needed"}}}
    session["steps"]["gpu_tests"] = {"seconds": 1, "figures": {"passed": 8, "failed": 1, "failures": ["FAILED x"]}}
    (tmp_path / "one.json").write_text(json.dumps(session), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["gpu_session.py", "--table", *[str(tmp_path / "one.json")] * 2])
    assert gpu_session.main() == 0
    printed = capsys.readouterr().out
    assert printed.count("| RTX 4060, 8 GiB | qwen3-8b-16gb |  | 8.9 GiB needed |") == 2
    assert printed.count("| Windows, driver 581.1, torch 2.13.0+cu130 | not run |") == 2
    assert printed.count("| 8 passed, 1 failed |") == 2
    (tmp_path / "other.json").write_text("[]", encoding="utf-8")
    with pytest.raises(DataError, match="not a file of this script"):
        gpu_session.read_session(tmp_path / "other.json")


def test_plain_training_takes_half_of_the_examples_when_memory_runs_out(gpu_session):
    import gpu_speed

    class Bench:
        model = device = None

        def measured(self, loss_of, batches):
            if max(map(len, batches)) > self.fits:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return {"batches": batches}

    bench, examples = Bench(), list(range(5))
    bench.fits = 2
    figures = gpu_speed._plain(bench, examples, lambda some, device: some)
    assert figures == {"batches": [[0, 1], [2, 3], [4]], "together": 2}
    bench.fits = 0
    assert "does not hold one example" in gpu_speed._plain(bench, examples, lambda some, device: some)["fault"]


def test_the_outcome_of_pytest_is_read_from_its_last_line(gpu_session):
    import gpu_steps

    failures = ["FAILED tests/test_gpu.py::test_it - assert 1 == 2"]
    output = f"..F\n{failures[0]}\n1 failed, 7 passed, 3790 deselected in 60.1s (0:01:00)\n"
    assert gpu_steps.summary(output) == {"passed": 7, "failed": 1, "failures": failures}
    assert gpu_steps.summary("") == {"failures": []}


@pytest.fixture(scope="module")
def on_paper():
    return load("on_paper")


def rows_on_paper():
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    lines = page.partition("<!-- on paper -->\n")[2].partition("<!-- /on paper -->")[0].splitlines()[2:]
    return {line.split("`")[1]: line for line in lines}


def test_attention_norms_and_launches_of_models_with_fused_layers_stay_below_their_limits():
    rows, presets = rows_on_paper(), (ROOT / "config" / "presets").glob("*.json")
    names = {path.stem: load_config(path, []).model.name_or_path for path in presets}
    assert sorted(rows) == sorted(names)
    texts = {preset: model_config(name).get_text_config() for preset, name in names.items()}
    fused = {preset for preset, text in texts.items() if text.model_type in KNOWN}
    assert len(fused) >= 13
    for name, row in rows.items():
        cells = [cell.strip(" %").replace(",", "") for cell in row.split("|")[3:-1]]
        assert ("–" in cells) == (name not in fused), name
        if name in fused:
            launches, *times = map(float, cells)
            assert launches <= 15_000, name
            assert max(times[1::3]) <= 8, name  # per cent of a step in attention
            assert max(times[2::3]) <= 4, name  # in norms


@pytest.mark.parametrize("name", ["qwen3-4b-8gb", "qwen2.5-1.5b-8gb", "ministral3-8b-12gb"])
def test_the_table_on_paper_is_the_generated_one(on_paper, name):
    figures = on_paper.figures(ROOT / "config" / "presets" / f"{name}.json")
    assert rows_on_paper()[name] == on_paper.row(figures), "run python benchmarks/on_paper.py"
