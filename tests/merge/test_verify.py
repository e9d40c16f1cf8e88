"""A merged model appears only when it says what base and adapter say, and whole, whatever happens on the way."""

import dataclasses
import json
import os
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from making.merging import merge
from making.runs import config
from making.tiny import family, save_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import merge_lora_to_fp16
from persona.config import Quantization
from persona.errors import EnvironmentFault, UsageError, VerificationFailed
from persona.files import publish, recover
from persona.merge import folder as merged_folder
from persona.merge import merge as merging
from persona.merge import verify
from persona.merge.changes import FourBits, LowRank, dequantized_weights
from persona.model.loading import load_adapter, load_base
from persona.model.render import chat_format
from persona.train.run import finetune

pytestmark = pytest.mark.usefixtures("one_thread")
SHARD = 100_000


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A base, the adapter of a run on it in 4 bits, and the settings of the run."""
    folder = tmp_path_factory.mktemp("proof")
    base = save_model(folder / "base", "llama", family("llama3"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        made = config(
            folder,
            base,
            quantization={"load_in_4bit": True},
            lora={"lora_dropout": 0},
            training={"num_train_epochs": 4},
        )
        return base, finetune(made, True, lambda _: None), made


def proof_of(trained):
    base, adapter, made = trained
    proof = verify.plan_proof(base, adapter, made.data)
    assert proof is not None
    return proof


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# --- verification ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_good_merge_passes_with_its_numbers(trained, tmp_path, dtype):
    proof = proof_of(trained)
    (verdict,) = merge(trained[0], trained[1], tmp_path / "merged", dtype, SHARD, proof).verdicts
    assert verdict.passed
    assert verdict.merged == pytest.approx(verdict.expected, rel=verify.TOLERANCES[dtype].loss)
    assert verdict.tokens == tokens(proof.examples) > 50
    assert "val.jsonl" in proof.source
    assert (tmp_path / "merged" / "config.json").is_file()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_wrong_merge_is_not_published_and_the_one_that_is_there_stays(trained, tmp_path, monkeypatch, dtype):
    base, adapter, _ = trained
    merge(base, adapter, tmp_path / "merged", dtype, SHARD)
    before = contents(tmp_path / "merged")
    right = LowRank.apply

    def wrong(change, rows, start):
        return right(LowRank(change.left, change.right, 0.7 * change.scaling), rows, start)

    monkeypatch.setattr(LowRank, "apply", wrong)
    with pytest.raises(VerificationFailed, match=r"not base \+ adapter: loss .* Nothing was published"):
        merge(base, adapter, tmp_path / "merged", dtype, SHARD, proof_of(trained))
    assert contents(tmp_path / "merged") == before
    assert os.listdir(tmp_path) == ["merged"]


def test_the_numbers_are_those_of_the_logits():
    expected = torch.tensor([[2.0, 0, 0], [0, 2, 0], [0, 0, 2], [2, 0, 0]])
    merged = expected.clone()
    merged[3] = torch.tensor([0.0, 3, 0])
    examples = [SimpleNamespace(reply_ids=(0, 1)), SimpleNamespace(reply_ids=(2, 0))]
    verdict = verify.compare(expected, merged, examples, verify.Tolerance(1e-3, 0.3))
    log = torch.nn.functional.cross_entropy
    assert verdict.expected == pytest.approx(log(expected, torch.tensor([0, 1, 2, 0])).item())
    assert verdict.merged == pytest.approx(log(merged, torch.tensor([0, 1, 2, 0])).item())
    assert (verdict.agreement, verdict.largest, verdict.passed) == (0.75, 3.0, False)
    assert verify.compare(expected, merged, examples, verify.Tolerance(9, 0.3)).passed
    two = merged.clone()
    two[0] = torch.tensor([0.0, 3, 0])
    assert not verify.compare(expected, two, examples, verify.Tolerance(9, 0.3)).passed


@pytest.mark.parametrize(("ahead", "differing"), [(0.0005, 0), (0.002, 4)])
def test_tokens_that_are_as_probable_do_not_differ(ahead, differing):
    """Their logits have a standard deviation of 1.15, so a thousandth of it is between the two."""
    expected = torch.tensor([[2.0, 2 - ahead, 0]]).expand(4, 3)
    merged = torch.tensor([[2.0, 2 + ahead, 0]]).expand(4, 3)
    verdict = verify.compare(expected, merged, [SimpleNamespace(reply_ids=(0,) * 4)], verify.Tolerance(1e-2, 0.3))
    assert verdict.agreement == 1 - differing / 4
    assert verdict.passed == (differing == 0)


def tokens(examples):
    return sum(len(example.reply_ids) for example in examples)


def test_without_the_held_out_file_built_in_texts_are_compared(trained, monkeypatch):
    made = trained[2]
    fmt = chat_format(family("llama3"))
    elsewhere = made.data.model_copy(update={"validation_file": "gone.jsonl"})
    examples, source = verify.held_out(elsewhere, fmt, "You keep the lamp.")
    assert "gone.jsonl cannot be read" in source
    assert tokens(examples) > 50
    assert verify.held_out(None, fmt, None)[1] == "built-in texts"
    monkeypatch.setattr(verify, "TOKENS", 20)
    assert tokens(verify.held_out(made.data, fmt, None)[0]) == 20


def test_a_model_that_no_memory_holds_is_not_verified(trained, monkeypatch):
    base, adapter, made = trained
    monkeypatch.setattr(verify.psutil, "virtual_memory", lambda: SimpleNamespace(available=2**30))
    assert verify.plan_proof(base, adapter, made.data) is None


# --- the two bases of an adapter trained in 4 bits -------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_four_bits_are_those_that_training_holds(tmp_path, architecture, precision):
    from bitsandbytes.functional import dequantize_4bit

    base = save_model(tmp_path / "base", architecture, family("chatml_default"))
    settings, compute = Quantization(), {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    theirs = load_base(base, settings, precision, torch.device("cpu"))
    ours = load_base(base, Quantization(load_in_4bit=False), "fp32", torch.device("cpu"))
    changes = dequantized_weights(ours, FourBits(settings, compute))
    held = {name: p for name, p in theirs.named_parameters() if type(p).__name__ == "Params4bit"}
    assert changes.keys() == held.keys()
    for name, parameter in held.items():
        seen = dequantize_4bit(parameter.data, parameter.quant_state).float()
        passed = changes[name].apply(ours.get_parameter(name).data, 0)
        assert torch.equal(passed, seen if passed.shape == seen.shape and architecture == "llama" else seen.T), name


def test_the_better_of_two_bases_is_kept(trained, tmp_path, monkeypatch):
    base, adapter, made = trained
    proof, four_bits = proof_of(trained), FourBits(made.quantization, torch.float32)
    report = merge(base, adapter, tmp_path / "merged", torch.float32, SHARD, proof, four_bits)
    original, dequantized = report.verdicts
    assert original.merged != dequantized.merged
    assert report.dequantized == (dequantized.merged < original.merged)
    for better in (False, True):

        def judged(folder, base, adapter, dtype, proof, four_bits, better=better):
            return dataclasses.replace(original, merged=float((four_bits is not None) != better))

        monkeypatch.setattr(merging, "verify", judged)
        chosen = merge(base, adapter, tmp_path / "one", torch.float32, SHARD, proof, four_bits)
        assert chosen.dequantized == better
    assert sorted(os.listdir(tmp_path)) == ["merged", "one"]
    # what was kept last is what training computed with
    model = load_adapter(load_base(base, made.quantization, "fp32", torch.device("cpu")), adapter).eval()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "one").eval()
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        expected = model(ids).logits
        assert (merged(ids).logits - expected).abs().max() < 1e-4 * expected.abs().max()


# --- whole or not at all ---------------------------------------------------------------------------------------------


def test_the_space_is_looked_at_before_anything_is_written(trained, tmp_path, monkeypatch):
    base, adapter, _ = trained
    monkeypatch.setattr(merged_folder.shutil, "disk_usage", lambda _: SimpleNamespace(free=50_000_000))
    with pytest.raises(EnvironmentFault, match=r"needs 0\.1 GB, and .* has 0\.1 GB free"):
        merge(base, adapter, tmp_path / "merged", torch.float16, SHARD)
    assert not list(tmp_path.iterdir())


def test_an_output_that_holds_an_input_is_refused(trained, tmp_path):
    base, adapter, _ = trained
    merge(base, adapter, tmp_path / "merged", torch.float16, SHARD)
    shutil.copytree(adapter, tmp_path / "merged" / "adapter")
    with pytest.raises(UsageError, match="would replace the folder that holds the input"):
        merge(base, tmp_path / "merged" / "adapter", tmp_path / "merged", torch.float16, SHARD)


@pytest.mark.parametrize("moment", ["old aside", "new in place", "old half removed"])
def test_a_killed_publish_is_finished_or_undone(tmp_path, moment):
    folder, old, new = tmp_path / "merged", tmp_path / ".old-merged", tmp_path / "new"
    old.mkdir()
    (old / "which").write_text("old", encoding="utf-8")
    if moment != "old aside":
        folder.mkdir()
        (folder / "which").write_text("new", encoding="utf-8")
    if moment == "old half removed":
        old.rename(tmp_path / ".removed-merged")
    recover(folder)
    assert (folder / "which").read_text(encoding="utf-8") == ("old" if moment == "old aside" else "new")
    assert os.listdir(tmp_path) == ["merged"]
    new.mkdir()
    publish(new, folder)
    assert not list(folder.iterdir())
    assert os.listdir(tmp_path) == ["merged"]


def test_a_folder_that_cannot_get_its_name_leaves_the_old_one(tmp_path, monkeypatch):
    folder, new = tmp_path / "merged", tmp_path / "new"
    for path in (folder, new):
        path.mkdir()
        (path / "which").write_text(path.name, encoding="utf-8")
    right = Path.rename

    def rename(self, target):
        if self == new:
            raise PermissionError(13, "in use")
        return right(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(PermissionError):
        publish(new, folder)
    assert (folder / "which").read_text(encoding="utf-8") == "merged"


OPERATIONS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir")


def operations(work, kill_at=None):
    """Run `work` in a copy of this process that is killed before its n-th file operation: how many it did."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        done = [0]

        def count(event, _):
            if event in OPERATIONS:
                os.write(writer, b".")
                done[0] += 1
                if done[0] == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        try:
            work()
        finally:
            os._exit(0)
    os.close(writer)
    counted = 0
    while chunk := os.read(reader, 4096):
        counted += len(chunk)
    os.close(reader)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1]) == (kill_at is not None)
    return counted


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills copies of its own process, which this system cannot make")
def test_a_killed_merge_leaves_the_old_folder_or_the_new_one(trained, tmp_path):
    base, adapter, _ = trained
    output = tmp_path / "merged"
    merge(base, adapter, output, torch.bfloat16, SHARD)
    old = contents(output)

    def work():
        merge(base, adapter, output, torch.float16, SHARD)

    count = operations(work)
    new = contents(output)
    assert new != old
    seen = set()
    merge(base, adapter, output, torch.bfloat16, SHARD)
    # a few on the way, and each of the last ones, where the folders change places
    for number in (*range(count // 4, count - 12, count // 4), *range(count - 12, count + 1)):
        operations(work, number)
        seen.add("none" if not output.exists() else "old" if contents(output) == old else "new")
        assert not output.exists() or contents(output) in (old, new)
        recover(output)
        assert contents(output) in (old, new)
        if contents(output) == new:
            merge(base, adapter, output, torch.bfloat16, SHARD)
    assert {"old", "new"} <= seen
    work()
    assert contents(output) == new
    assert os.listdir(tmp_path) == ["merged"]
    shutil.rmtree(output)
    operations(work, count // 2)
    assert not output.exists()


# --- the script ------------------------------------------------------------------------------------------------------


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["merge_lora_to_fp16.py", *map(str, arguments)])
    return merge_lora_to_fp16.main()


def test_the_script_says_what_was_verified_and_what_not(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(trained[1].parent.parent.parent)
    run(monkeypatch, trained[1].parent, "--output", tmp_path / "a")
    assert "Verified, pass: loss" in capsys.readouterr().out
    run(monkeypatch, trained[1].parent, "--output", tmp_path / "b", "--no-verify")
    said = capsys.readouterr().out
    assert "Not verified (--no-verify)" in said
    assert "held-out loss, top-1, logits" in said
    run(monkeypatch, trained[1].parent, "--output", tmp_path / "c", "--compare-bases")
    assert "The held-out loss is lower when merged into the" in capsys.readouterr().out
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("a", "b"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    with pytest.raises(SystemExit):
        run(monkeypatch, trained[1].parent, "--no-verify", "--compare-bases")
    settings = json.loads((trained[1].parent / "config.json").read_text(encoding="utf-8"))
    assert settings["quantization"]["load_in_4bit"] is True
    with pytest.raises(UsageError, match="was not trained in 4 bits"):
        run(monkeypatch, trained[1].parent, "--compare-bases", "--set", "quantization.load_in_4bit=false")
