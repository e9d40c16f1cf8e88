"""Merged weights say what base and adapter say, and nothing is merged that does not belong together."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from making.merging import merge
from making.runs import config
from making.tiny import family, save_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from persona.config import Quantization
from persona.errors import DataError, EnvironmentFault, UsageError, VerificationFailed
from persona.merge import merge as merging
from persona.model.adapters import TOKENIZER_FILES, kind_of, read_persona
from persona.model.folders import NOTICE
from persona.model.loading import load_adapter, load_base
from persona.train.run import finetune


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A base of several shards in float32 and the adapter of a run on it."""
    folder = tmp_path_factory.mktemp("merge")
    base = save_model(folder / "base", "llama", family("llama3"))
    (base / NOTICE).write_text("Subject to terms.\n", encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        made = config(folder, base, lora={"lora_dropout": 0}, training={"num_train_epochs": 6})
        adapter = finetune(made, True, lambda _: None)
    return base, adapter


def logits(model):
    with torch.no_grad():
        return model(torch.arange(3, 40)[None]).logits


def tuned(base, adapter):
    return load_adapter(load_base(base, Quantization(load_in_4bit=False), "fp32", torch.device("cpu")), adapter).eval()


@pytest.mark.parametrize("shard_bytes", [10**9, 100_000])
def test_merged_is_base_plus_adapter(trained, tmp_path, shard_bytes):
    base, adapter = trained
    report = merge(base, adapter, tmp_path / "merged", torch.float32, shard_bytes)
    assert report.weights.changed == 14
    assert (report.weights.shards > 1) == (shard_bytes < 10**9)
    expected = logits(tuned(base, adapter))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert (logits(merged) - expected).abs().max() <= 1e-5 * expected.abs().max()
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    assert (logits(plain) - expected).abs().max() > 0.01


def test_merged_is_what_peft_merges(trained, tmp_path):
    base, adapter = trained
    merge(base, adapter, tmp_path / "merged", torch.float32, 10**9)
    theirs = tuned(base, adapter).merge_and_unload().state_dict()
    ours = load_file(tmp_path / "merged" / "model.safetensors")
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-6, atol=1e-6)


def test_float16_is_rounded_once(trained, tmp_path):
    base, adapter = trained
    merge(base, adapter, tmp_path / "wide", torch.float32, 10**9)
    merge(base, adapter, tmp_path / "half", torch.float16, 10**9)
    wide, half = (load_file(tmp_path / name / "model.safetensors") for name in ("wide", "half"))
    assert all(torch.equal(half[name], tensor.to(torch.float16)) for name, tensor in wide.items())
    assert json.loads((tmp_path / "half" / "config.json").read_text(encoding="utf-8"))["dtype"] == "float16"


def test_the_folder_has_all_a_runtime_needs(trained, tmp_path):
    base, adapter = trained
    merge(base, adapter, tmp_path / "merged", torch.float16, 10**9)
    merged = tmp_path / "merged"
    copied = [name for name in TOKENIZER_FILES if (base / name).is_file()]
    assert "tokenizer.json" in copied
    assert all((merged / name).read_bytes() == (base / name).read_bytes() for name in copied)
    template = (adapter / "chat_template.jinja").read_text(encoding="utf-8")
    assert (merged / "chat_template.jinja").read_text(encoding="utf-8") == template
    tokenizer = family("llama3")
    ends = json.loads((merged / "generation_config.json").read_text(encoding="utf-8"))["eos_token_id"]
    assert tokenizer.convert_tokens_to_ids("<|eot_id|>") in ends
    assert tokenizer.eos_token_id in ends
    assert read_persona(merged) == read_persona(adapter)
    assert kind_of(merged) == "model"
    assert not list(merged.parent.glob(".staging*"))


def test_every_template_in_the_folders_is_the_trained_one(tmp_path, monkeypatch):
    """With the base's own in three files, of which programs take one or another."""
    base = save_model(tmp_path / "base", "llama", family("qwen3"))
    own = family("qwen3")
    settings = json.loads((base / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings["chat_template"] = [{"name": "default", "template": own.chat_template}]
    for name, values in (("tokenizer_config.json", settings), ("chat_template.json", {"chat_template": "old"})):
        (base / name).write_text(json.dumps(values), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    adapter = finetune(config(tmp_path, base, lora={"lora_dropout": 0}), True, lambda _: None)
    merge(base, adapter, tmp_path / "merged", torch.float16, 10**9)
    talk = [{"role": "user", "content": "Who goes there?"}]
    trained = own.apply_chat_template(talk, tokenize=False, add_generation_prompt=True, enable_thinking=False)
    for folder in (adapter, tmp_path / "merged"):
        texts = {(folder / "chat_template.jinja").read_text(encoding="utf-8")}
        assert not (folder / "chat_template.json").exists()
        texts.add(json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))["chat_template"])
        assert len(texts) == 1
        loaded = AutoTokenizer.from_pretrained(folder)
        for sent in ({}, {"enable_thinking": True}, {"enable_thinking": False}):
            text = loaded.apply_chat_template(talk, tokenize=False, add_generation_prompt=True, **sent)
            assert text == trained


def test_a_folder_whose_prompt_is_not_the_trained_one_is_not_published(trained, tmp_path, monkeypatch):
    base, adapter = trained
    written = merging.write_rest

    def with_the_bases_template(folder, *others):
        written(folder, *others)
        (folder / "chat_template.jinja").write_text("{{ 'another' }}", encoding="utf-8")

    monkeypatch.setattr(merging, "write_rest", with_the_bases_template)
    with pytest.raises(VerificationFailed, match="asked otherwise than it was trained"):
        merge(base, adapter, tmp_path / "merged", torch.float16, 10**9)
    assert not (tmp_path / "merged").exists()


def test_a_notice_goes_with_the_adapter_and_the_merged_model(trained, tmp_path):
    base, adapter = trained
    merge(base, adapter, tmp_path / "merged", torch.float16, 10**9)
    for folder in (adapter, tmp_path / "merged"):
        assert (folder / NOTICE).read_bytes() == b"Subject to terms.\n"
        assert "licence applies" in (folder / "README.md").read_text(encoding="utf-8")
        assert "\n\nSubject to terms.\n\n" in (folder / "README.md").read_text(encoding="utf-8")


def test_another_base_is_refused(trained, tmp_path):
    _, adapter = trained
    torch.manual_seed(99)
    other = save_model(tmp_path / "other", "llama", family("llama3"), initializer_range=0.5)
    with pytest.raises(UsageError, match="other weights"):
        merge(other, adapter, tmp_path / "merged", torch.float16, 10**9)
    assert not (tmp_path / "merged").exists()


def test_an_adapter_for_another_shape_is_refused_by_name(trained, tmp_path):
    _, adapter = trained
    (adapter / "persona.json").rename(adapter / "away")
    try:
        other = save_model(tmp_path / "other", "llama", family("llama3"), intermediate_size=192)
        with pytest.raises(UsageError, match=r"layers\.0\.mlp\.\w+_proj\.lora_\w\.weight of shape"):
            merge(other, adapter, tmp_path / "merged", torch.float16, 10**9)
    finally:
        (adapter / "away").rename(adapter / "persona.json")


def changed_adapter(adapter, folder, change):
    folder.mkdir()
    for path in adapter.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    change(folder)
    return folder


def rescale(folder, factor):
    path = folder / "adapter_model.safetensors"
    save_file({name: tensor * factor for name, tensor in load_file(path).items()}, path)


def round_weights(folder):
    path = folder / "model.safetensors"
    save_file({name: tensor.half().float() for name, tensor in load_file(path).items()}, path)


def test_an_adapter_that_changes_nothing_is_refused(trained, tmp_path):
    base, adapter = trained
    zero = changed_adapter(adapter, tmp_path / "zero", lambda folder: rescale(folder, 0))
    with pytest.raises(DataError, match="changes nothing"):
        merge(base, zero, tmp_path / "merged", torch.float16, 10**9)
    assert not (tmp_path / "merged").exists()


def test_weights_beyond_float16_are_refused_with_the_way_out(trained, tmp_path):
    base, adapter = trained
    huge = changed_adapter(adapter, tmp_path / "huge", lambda folder: rescale(folder, 3000))
    with pytest.raises(DataError, match="bfloat16"):
        merge(base, huge, tmp_path / "merged", torch.float16, 10**9)
    merge(base, huge, tmp_path / "merged", torch.bfloat16, 10**9)


def test_a_4_bit_base_is_refused(trained, tmp_path):
    base, adapter = trained
    quantized = changed_adapter(base, tmp_path / "quantized", lambda folder: None)
    values = json.loads((quantized / "config.json").read_text(encoding="utf-8"))
    values["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (quantized / "config.json").write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(UsageError, match="already quantized"):
        merge(quantized, adapter, tmp_path / "merged", torch.float16, 10**9)


def test_inputs_and_folders_of_others_are_not_overwritten(trained, tmp_path):
    base, adapter = trained
    with pytest.raises(UsageError, match="is inside the input"):
        merge(base, adapter, base / "merged", torch.float16, 10**9)
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("years", encoding="utf-8")
    with pytest.raises(UsageError, match="thesis.txt"):
        merge(base, adapter, tmp_path / "precious", torch.float16, 10**9)
    assert (tmp_path / "precious" / "thesis.txt").read_text(encoding="utf-8") == "years"


def test_another_model_is_not_overwritten_and_our_own_is(trained, tmp_path):
    base, adapter = trained
    changed_adapter(base, tmp_path / "model", lambda folder: None)
    with pytest.raises(UsageError, match="not a merged model of ours"):
        merge(base, adapter, tmp_path / "model", torch.float16, 10**9)
    for shard_bytes in (100_000, 10**9):
        merge(base, adapter, tmp_path / "merged", torch.float16, shard_bytes)
    assert len(list((tmp_path / "merged").glob("model*"))) == 1
    (tmp_path / "merged" / "quantized").mkdir()
    with pytest.raises(UsageError, match="quantized"):
        merge(base, adapter, tmp_path / "merged", torch.float16, 10**9)


@pytest.mark.parametrize(
    ("output", "says"),
    [("file", "is a file"), ("file/below", "is a file"), (".", "current folder"), ("..", "current folder")],
)
def test_outputs_that_are_no_new_folder(trained, tmp_path, monkeypatch, output, says):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "here" / "file").write_text("years", encoding="utf-8")
    with pytest.raises(UsageError, match=says):
        merge(*trained, Path(output), torch.float16, 10**9)
    assert (tmp_path / "here" / "file").read_text(encoding="utf-8") == "years"


def test_changes_are_counted_after_rounding(trained, tmp_path):
    base, adapter = trained
    rounded = changed_adapter(base, tmp_path / "rounded", round_weights)
    slight = changed_adapter(adapter, tmp_path / "slight", lambda folder: rescale(folder, 3e-4))
    (slight / "persona.json").unlink()
    assert merge(rounded, slight, tmp_path / "wide", torch.float32, 10**9).weights.changed == 14
    with pytest.raises(DataError, match="changes nothing"):
        merge(rounded, slight, tmp_path / "half", torch.float16, 10**9)
    report = merge(base, adapter, tmp_path / "merged", torch.float16, 10**9)
    plain, ours = load_file(base / "model.safetensors"), load_file(tmp_path / "merged" / "model.safetensors")
    changes = [(ours[name].float() - plain[name]).abs().max().item() for name in ours]
    assert report.weights.largest_change == pytest.approx(max(changes), rel=1e-3)


def test_an_adapter_of_another_tool_is_not_said_to_be_checked(trained, tmp_path):
    base, adapter = trained
    foreign = changed_adapter(adapter, tmp_path / "foreign", lambda folder: (folder / "persona.json").unlink())
    assert not merge(base, foreign, tmp_path / "theirs", torch.float16, 10**9).base_checked
    assert merge(base, adapter, tmp_path / "ours", torch.float16, 10**9).base_checked


def test_a_name_longer_than_any_file_is_a_message(trained, tmp_path):
    with pytest.raises(UsageError, match="File name too long"):
        merge(*trained, tmp_path / ("x" * 300), torch.float16, 10**9)


@pytest.mark.parametrize(
    "writer", ["persona.merge.weights.write", "persona.files.publish", "persona.merge.folder.write_json"]
)
def test_a_full_disk_leaves_nothing_behind(trained, tmp_path, monkeypatch, writer):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, full)
    with pytest.raises(EnvironmentFault, match="No space left") as fault:
        merge(*trained, tmp_path / "merged", torch.float16, 10**9)
    assert f"{tmp_path / 'merged'}" in str(fault.value)
    assert "--output" in str(fault.value)
    assert not list(tmp_path.iterdir())


def without_b(folder):
    path = folder / "adapter_model.safetensors"
    weights = load_file(path)
    del weights[next(name for name in weights if "lora_B" in name)]
    save_file(weights, path)


def cut(folder):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])


def pointer(folder):
    (folder / "adapter_model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")


def write(name, text):
    return lambda folder: (folder / name).write_text(text, encoding="utf-8")


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (without_b, r"lora_B"),
        (cut, r"adapter_model\.safetensors"),
        (pointer, "git lfs pull"),
        (write("adapter_config.json", "{"), r"adapter_config\.json:1:2: not valid JSON"),
        (write("adapter_config.json", '{"peft_type": "LORA"}'), "lora_alpha"),
        (write("adapter_config.json", "[]"), "object"),
        (write("persona.json", '{"base_name": "x", "mood": "odd"}'), "base_fingerprint, date, mood, system_prompt"),
    ],
)
def test_a_broken_adapter_is_named(trained, tmp_path, harm, says):
    base, adapter = trained
    broken = changed_adapter(adapter, tmp_path / "broken", harm)
    with pytest.raises(UsageError, match=says):
        merge(base, broken, tmp_path / "merged", torch.float16, 10**9)
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("name", "value", "passes"),
    [
        ("tower.input_max", [float("inf")], True),
        ("tower.input_min", [float("-inf")], True),
        ("tower.input_max", [float("nan")], False),
        ("tower.input_max", [float("inf"), 1.0], False),
        ("tower.scale", [float("inf")], False),
    ],
)
def test_only_an_open_bound_of_a_tower_may_be_infinite(trained, tmp_path, name, value, passes):
    base, adapter = trained
    other = shutil.copytree(base, tmp_path / "base")
    tensors = load_file(other / "model.safetensors")
    save_file(tensors | {name: torch.tensor(value)}, other / "model.safetensors", metadata={"format": "pt"})
    # without the fingerprint of the base, as another tool leaves it
    adapter = changed_adapter(adapter, tmp_path / "adapter", lambda folder: (folder / "persona.json").unlink())
    if passes:
        merge(other, adapter, tmp_path / "merged", torch.float16, 10**9)
        assert torch.equal(load_file(tmp_path / "merged" / "model.safetensors")[name], torch.tensor(value))
    else:
        with pytest.raises(DataError, match=f"{name} is not finite in the base itself"):
            merge(other, adapter, tmp_path / "merged", torch.float16, 10**9)


def test_a_generation_configuration_that_transformers_would_not_save_is_kept(trained, tmp_path):
    base, adapter = trained
    values = {"temperature": 0.6, "bos_token_id": 3, "eos_token_id": 7}  # without do_sample, as that of Llama 2
    other = changed_adapter(base, tmp_path / "other", write("generation_config.json", json.dumps(values)))
    merge(other, adapter, tmp_path / "merged", torch.float16, 10**9)
    merged = json.loads((tmp_path / "merged" / "generation_config.json").read_text(encoding="utf-8"))
    assert merged["bos_token_id"] == 3
    assert 7 in merged["eos_token_id"]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").generation_config.eos_token_id[0] == 7


def test_a_second_copy_of_the_weights_is_not_merged(trained, tmp_path):
    base, adapter = trained
    doubled = changed_adapter(base, tmp_path / "doubled", lambda folder: None)
    save_file({"layers.0.attention.wq.weight": torch.zeros(4, 4)}, doubled / "consolidated.safetensors")
    report = merge(doubled, adapter, tmp_path / "merged", torch.float16, 10**9)
    assert "layers.0.attention.wq.weight" not in load_file(tmp_path / "merged" / "model.safetensors")
    assert report.weights.tensors == len(load_file(base / "model.safetensors"))
