"""GGUF files: converted by llama.cpp, compared with the model, and put in place only when they are the model."""

import json
import os
import shutil
from datetime import date
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType
from making import toy_converter
from making.tiny import FAMILIES, TEMPLATES, save_model, tokenizer
from making.tiny import model as tiny_random_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from persona.errors import DataError, EnvironmentFault, UsageError
from persona.export import gguf, gguf_check, runtime
from persona.export.gguf import check_output, convert_adapter, convert_model
from persona.export.gguf_check import fields_of, open_gguf
from persona.export.llama_cpp import ADAPTER_SCRIPT, MODEL_SCRIPT, check_checkout, check_model, run_converter
from persona.files import read_json
from persona.model.embedded import SMOLLM2
from persona.model.loading import load_tokenizer
from persona.model.render import chat_format
from persona.model.sources import cache_folder

pytestmark = pytest.mark.usefixtures("one_thread")

# What a converter says that knows our tokenizer; the probe is short, the fingerprint is put in
SOURCE = """
class Model:
    names = ["LlamaForCausalLM"]
    def get_vocab_base_pre(self, tokenizer) -> str:
        chktxt = 'Hello\\n world, 3 33 \\'re'
        if chkhsh == "{fingerprint}":
            res = "smollm"
"""


def fingerprint(tok):
    from hashlib import sha256

    return sha256(str(tok.encode("Hello\n world, 3 33 're")).encode()).hexdigest()


@pytest.fixture(scope="module")
def chatml_tokenizer():
    return tokenizer(template=TEMPLATES["chatml_default"], **FAMILIES["chatml_default"])


@pytest.fixture(scope="module")
def fmt(chatml_tokenizer):
    return chat_format(chatml_tokenizer)


@pytest.fixture(scope="module")
def model(tmp_path_factory, chatml_tokenizer):
    """A tiny Llama in float16 as a merge leaves it."""
    folder = save_model(tmp_path_factory.mktemp("模型") / "a model", "llama", chatml_tokenizer, "float16")
    assert (folder / "chat_template.jinja").is_file()
    return folder


@pytest.fixture(scope="module")
def checkout(tmp_path_factory, chatml_tokenizer):
    """What of llama.cpp's source is looked at before it is run."""
    folder = tmp_path_factory.mktemp("llama cpp")
    (folder / "conversion").mkdir()
    text = SOURCE.format(fingerprint=fingerprint(chatml_tokenizer))
    (folder / "conversion" / "base.py").write_text(text, encoding="utf-8")
    for name in (MODEL_SCRIPT, ADAPTER_SCRIPT):
        (folder / name).write_text("raise SystemExit(1)", encoding="utf-8")
    return folder


@pytest.fixture
def toy(monkeypatch):
    """Put the toy converter in the place of llama.cpp's, with the fault that is asked for."""

    def chosen(fault=""):
        def run(script, arguments):
            source, options = Path(arguments[0]), dict(zip(arguments[1::2], arguments[2::2], strict=True))
            if script.name == MODEL_SCRIPT:
                name, kind = options["--model-name"], options["--outtype"]
                toy_converter.convert_model(source, options["--outfile"], kind, name, fault)
            else:
                toy_converter.convert_adapter(source, options["--base"], options["--outfile"], fault)

        monkeypatch.setattr(gguf, "run_converter", run)
        monkeypatch.setattr(runtime, "is_there", lambda: False)  # seconds a file; test_runtime.py asks llama.cpp

    return chosen


@pytest.fixture
def convert(toy, checkout, model, fmt, tmp_path):
    """Convert with the toy converter and a fault in it; returns what `convert_model` does."""

    def converted(fault="", outtype="f16", folder=model, spoken=fmt):
        toy(fault)
        return convert_model(folder, tmp_path / "出 out.gguf", checkout, outtype, spoken)

    return converted


def metadata(folder):
    return fields_of(open_gguf(folder / "出 out.gguf"))


@pytest.mark.parametrize("outtype", ["f16", "q8_0"])
def test_a_file_that_is_the_model_is_put_in_place(convert, model, outtype, tmp_path):
    report, corrections = convert(outtype=outtype)
    assert report.tensors == len(load_file(model / "model.safetensors"))
    assert report.unknown == 0
    assert not report.adds_bos
    assert (report.largest_error == 0) == (outtype == "f16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["出 out.gguf"]
    assert metadata(tmp_path)["general.name"] == "出 out"


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("order", r"[qk]_proj\.weight has other values"),
        ("values", "has other values"),
        ("missing", "is missing"),
        ("extra", "blk.0.attn_rot.weight is not part"),
        ("context", "llama.context_length is 2048, but config.json says max_position_embeddings 4096"),
        ("tokens", "2 tokens have another text"),
        ("short", "the tokenizer's reach"),
        ("plain", "would be read as plain text"),
        ("end", "its eos token is 0"),
        ("no template", "it has no chat template"),
        ("cut", "is not a whole GGUF file"),
    ],
)
def test_a_file_that_is_another_model_is_refused_and_the_earlier_one_kept(convert, fault, says, tmp_path):
    output = tmp_path / "出 out.gguf"
    output.write_bytes(b"the one before")
    with pytest.raises(DataError, match=says) as caught:
        convert(fault)
    assert "git pull" in str(caught.value)
    assert output.read_bytes() == b"the one before"
    assert [path.name for path in tmp_path.iterdir()] == [output.name]


def test_q8_0_with_other_values_is_refused(convert):
    with pytest.raises(DataError, match="other values"):
        convert("values", "q8_0")


def test_begin_and_end_tokens_that_training_never_saw_are_put_right(convert, tmp_path):
    report, corrections = convert("bos")
    assert not metadata(tmp_path)["tokenizer.ggml.add_bos_token"]
    assert not report.adds_bos
    assert "begin token" in corrections[0]
    report, corrections = convert("eos")
    assert not metadata(tmp_path)["tokenizer.ggml.add_eos_token"]
    assert "end token" in corrections[0]


def test_an_end_token_that_no_runtime_knows_becomes_the_end_token(convert, checkout, tmp_path):
    template = TEMPLATES["chatml_default"].replace("<|im_end|>", "<|fin|>")
    own = tokenizer(["<|endoftext|>", "<|im_start|>", "<|fin|>"], template, "<|endoftext|>")
    folder = save_model(tmp_path / "own", "llama", own, "float16")
    report, corrections = convert(folder=folder, spoken=chat_format(own))
    assert metadata(tmp_path)["tokenizer.ggml.eos_token_id"] == own.convert_tokens_to_ids("<|fin|>")
    assert "<|fin|>" in corrections[0]


def test_a_file_with_another_chat_template_is_not_put_in_place(convert, model, tmp_path):
    """llama.cpp's converter prefers the one in tokenizer_config.json, which a merge therefore writes too."""
    folder = tmp_path / "with a template"
    shutil.copytree(model, folder)
    settings = read_json(folder / "tokenizer_config.json") | {"chat_template": "{{ 'another' }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    with pytest.raises(DataError, match="its chat template is not the trained one"):
        convert(folder=folder)
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


def test_of_an_architecture_that_is_not_known_what_differs_is_counted(convert, model, tmp_path):
    other = copied(model, tmp_path / "other", model_type="newest")
    report, corrections = convert(folder=other)
    assert report.unknown == 4  # q and k of two layers


# --- the adapter alone ------------------------------------------------------------------------------------------------


def trained(model, folder, layers=None, **settings):
    """An adapter on the tiny model, with matrices that are other than zero."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    layers = layers or ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    adapted = get_peft_model(base, LoraConfig(r=4, lora_alpha=12, target_modules=layers, **settings))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.1)
    adapted.peft_config["default"].base_model_name_or_path = str(model)
    adapted.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, model):
    """An adapter on the tiny model whose matrices are both other than zero."""
    return trained(model, tmp_path_factory.mktemp("adapter"))


def test_an_adapter_is_converted_alone(toy, adapter, model, checkout, tmp_path):
    toy()
    count = convert_adapter(adapter, model, tmp_path / "a.gguf", checkout)
    assert count == len(load_file(adapter / "adapter_model.safetensors")) == 28
    reader = open_gguf(tmp_path / "a.gguf")
    assert fields_of(reader)["adapter.lora.alpha"] == 12
    assert {tensor.tensor_type.name for tensor in reader.tensors} == {"F32"}
    assert [path.name for path in tmp_path.iterdir()] == ["a.gguf"]


def test_the_scaling_of_rslora_is_kept(toy, adapter, model, checkout, tmp_path):
    """llama.cpp divides alpha by the rank, rsLoRA by its root (arXiv 2312.03732)."""
    toy()
    convert_adapter(changed(adapter, tmp_path / "rs", use_rslora=True), model, tmp_path / "a.gguf", checkout)
    assert fields_of(open_gguf(tmp_path / "a.gguf"))["adapter.lora.alpha"] / 4 == 12 / 4**0.5


@pytest.mark.parametrize(("fault", "says"), [("order", "lora_B"), ("alpha", "alpha is 1.0"), ("missing", "is missing")])
def test_an_adapter_file_that_is_another_one_is_refused(toy, adapter, model, checkout, tmp_path, fault, says):
    toy(fault)
    with pytest.raises(DataError, match=says):
        convert_adapter(adapter, model, tmp_path / "a.gguf", checkout)
    assert not list(tmp_path.iterdir())


def test_ranks_and_alphas_of_single_layers_are_kept(toy, model, checkout, tmp_path):
    own = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 30.0, "layers.1.mlp.up_proj": 7}}
    patterned = trained(model, tmp_path / "patterned", **own)
    toy()
    convert_adapter(patterned, model, tmp_path / "a.gguf", checkout)
    reader = open_gguf(tmp_path / "a.gguf")
    alpha = fields_of(reader)["adapter.lora.alpha"]
    found = {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}
    weights = load_file(patterned / "adapter_model.safetensors")
    for layer, name, scaling in (
        ("model.layers.0.self_attn.v_proj", "blk.0.attn_v", 30 / 4),
        ("model.layers.1.mlp.up_proj", "blk.1.ffn_up", 7 / 4),
        ("model.layers.1.mlp.down_proj", "blk.1.ffn_down", 12 / 4),
    ):
        a, b = (found[f"{name}.weight.lora_{half}"] for half in "ab")
        own_a, own_b = (weights[f"base_model.model.{layer}.lora_{half}.weight"] for half in "AB")
        torch.testing.assert_close(alpha / len(a) * b @ a, scaling * own_b @ own_a)
    assert found["blk.0.attn_q.weight.lora_a"].shape[0] == 2


@pytest.mark.parametrize("kind", [{"use_dora": True}, {"modules_to_save": ["lm_head"]}])
def test_an_adapter_that_is_more_than_lora_is_refused(model, checkout, tmp_path, kind):
    other = trained(model, tmp_path / "other", **kind)
    with pytest.raises(UsageError, match="Merge it"):
        convert_adapter(other, model, tmp_path / "a.gguf", checkout)


def changed(folder, target, **settings):
    """A copy of an adapter with other settings."""
    shutil.copytree(folder, target)
    values = read_json(target / "adapter_config.json") | settings
    (target / "adapter_config.json").write_text(json.dumps(values), encoding="utf-8")
    return target


# --- before the work --------------------------------------------------------------------------------------------------


def copied(model, target, tensors=None, **config):
    """A copy of a model with other settings, and tensors changed by a function of all of them."""
    shutil.copytree(model, target)
    values = read_json(target / "config.json") | config
    (target / "config.json").write_text(json.dumps(values), encoding="utf-8")
    if tensors is not None:
        weights = load_file(target / "model.safetensors")
        tensors(weights)
        save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


def with_another_head(weights):
    weights["lm_head.weight"] = torch.zeros_like(weights["model.embed_tokens.weight"])


def without_a_head(weights):
    weights.pop("lm_head.weight", None)


def with_fewer_rows(weights):
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in weights:
            weights[name] = weights[name][:-3].clone()


def test_a_whole_model_and_its_llama_cpp_are_accepted(model, checkout, chatml_tokenizer):
    assert check_checkout(checkout, MODEL_SCRIPT) == checkout / MODEL_SCRIPT
    check_model(model, chatml_tokenizer, checkout)


@pytest.mark.parametrize(
    ("tensors", "config", "says"),
    [
        (None, {"architectures": ["NewestForCausalLM"]}, "does not know NewestForCausalLM.*git pull"),
        (None, {"vocab_size": 9999}, "vocab_size 9999, but model.embed_tokens.weight has"),
        (with_another_head, {"tie_word_embeddings": True}, "tie_word_embeddings.*lm_head.weight differs"),
        (without_a_head, {"tie_word_embeddings": False}, "the output layer is missing"),
    ],
)
def test_what_would_make_a_broken_file_is_refused_beforehand(
    model, checkout, chatml_tokenizer, tmp_path, tensors, config, says
):
    broken = copied(model, tmp_path / "broken", tensors, **config)
    with pytest.raises(UsageError, match=says):
        check_model(broken, chatml_tokenizer, checkout)


def test_tokens_without_weights_are_refused(model, checkout, chatml_tokenizer, tmp_path):
    rows = read_json(model / "config.json")["vocab_size"] - 3
    broken = copied(model, tmp_path / "broken", with_fewer_rows, vocab_size=rows)
    with pytest.raises(UsageError, match=rf"has only {rows} rows, so .*<\|im_end\|>.* stand for nothing"):
        check_model(broken, chatml_tokenizer, checkout)


def test_a_tokenizer_that_llama_cpp_does_not_know_is_refused(model, checkout, tmp_path):
    other = tokenizer(["<|endoftext|>", "Hello", "<|im_start|>", "<|im_end|>"], TEMPLATES["qwen3"], "<|im_end|>")
    folder = save_model(tmp_path / "other", "llama", other, "float16")
    with pytest.raises(UsageError, match="pre-tokenizer.*git pull.*copy it again from the base"):
        check_model(folder, other, checkout)


@pytest.mark.parametrize(
    ("output", "says"), [("x.bin", "NAME.gguf"), ("a folder.gguf", "is a folder"), ("in/x.gguf", "is inside")]
)
def test_an_output_that_can_be_no_file_is_refused(tmp_path, output, says):
    (tmp_path / "a folder.gguf").mkdir()
    (tmp_path / "in").mkdir()
    with pytest.raises(UsageError, match=says):
        check_output(tmp_path / output, "--gguf", [tmp_path / "in"])


def test_a_folder_that_is_no_source_of_llama_cpp_is_refused(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UsageError, match="git clone"):
            check_checkout(folder, MODEL_SCRIPT)


def test_a_full_disk_is_known_before(convert, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(EnvironmentFault, match="only 0.0 GB are free"):
        convert()


@pytest.mark.parametrize(
    ("said", "says"),
    [
        ("import gone_package", "pip install gone-package"),
        ("import gguf.gone", "not complete"),
        ("raise NotImplementedError('BPE pre-tokenizer was not recognized')", "git pull"),
        ("print('ERROR:hf-to-gguf:Model X is not supported'); raise SystemExit(1)", "git pull"),
        ("raise FileNotFoundError('File not found: tokenizer.model')", "Copy that file from the base"),
        ("raise ValueError('Error: Missing x/tokenizer.model')", "Copy that file from the base"),
        ("raise OSError(28, 'No space left on device')", "disk is full"),
        ("raise MemoryError", "memory was full"),
        ("raise ValueError('Can not map tensor x')", "do not fit together"),
        ("raise SystemExit(3)", "exit code 3"),
    ],
)
def test_what_a_converter_says_is_told_with_what_to_do(tmp_path, said, says):
    script = tmp_path / MODEL_SCRIPT
    script.write_text(said, encoding="utf-8")
    with pytest.raises(EnvironmentFault, match=says):
        run_converter(script, [])


# --- the real one -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source():
    """The user's llama.cpp."""
    folder = os.environ.get("LLAMA_CPP")
    if not folder:
        pytest.skip("needs llama.cpp's source: set LLAMA_CPP to its folder")
    return Path(folder)


@pytest.fixture(scope="module")
def embedded():
    """The embedded model, whose tokenizer every llama.cpp knows."""
    folder = cache_folder() / "models" / SMOLLM2.name
    if not folder.is_dir():
        pytest.skip("the embedded model is not in the cache; test_embedded.py fetches it")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "outtype"), [("llama", "q8_0"), ("qwen3", "bf16"), ("gpt2", "f16")])
def test_the_real_converter_writes_the_model_and_the_adapter(source, embedded, tmp_path, architecture, outtype):
    spoken = load_tokenizer(embedded, None, date(2024, 5, 1))
    fmt = chat_format(spoken)
    own = {"bos_token_id": 1, "eos_token_id": 2} | ({"n_ctx": 1024} if architecture == "gpt2" else {})
    made = tiny_random_model(architecture, 49152, **own)
    folder = tmp_path / "a model"
    made.half().save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(embedded / name, folder / name)
    check_model(folder, spoken, source)
    report, _ = convert_model(folder, tmp_path / "m.gguf", source, outtype, fmt)
    assert report.unknown == 0
    layers = None if architecture != "gpt2" else ["c_attn", "c_proj", "c_fc"]
    adapter = trained(folder, tmp_path / "adapter", layers, fan_in_fan_out=architecture == "gpt2")
    assert convert_adapter(adapter, folder, tmp_path / "a.gguf", source) > 0


@pytest.mark.parametrize(
    ("dtype", "off", "right"), [(torch.float16, 0, True), (torch.bfloat16, 0, True), (torch.float16, 1e-3, False)]
)
def test_the_norms_of_gemma_plus_one_are_compared_as_the_converter_adds(tmp_path, dtype, off, right):
    """It adds in float16, and in float32 to what was bfloat16."""
    weight = torch.linspace(-0.9, 9, 64).to(dtype)
    save_file({"model.norm.weight": weight}, tmp_path / "m.safetensors")
    stored = ((weight if dtype == torch.float16 else weight.float()) + 1).float() + off
    with safe_open(tmp_path / "m.safetensors", "pt") as file:
        parts = gguf_check._rows(
            file, "model.norm.weight", [64], stored.numpy(), GGMLQuantizationType.F32, "plus one", {}
        )
        errors = [gguf_check._error(expected, found, GGMLQuantizationType.F32) for expected, found in parts]
    assert errors == ([0.0] if right else [None])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mistral3", "gemma3", "qwen3_vl"])
def test_the_real_converter_takes_the_text_of_a_model_that_reads_pictures(source, embedded, tmp_path, kind):
    spoken = load_tokenizer(embedded, None, date(2024, 5, 1))
    fmt = chat_format(spoken)
    rope = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 256}
    rope |= {"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1}
    own = {"bos_token_id": 1, "eos_token_id": 2}
    own |= {"rope_parameters": rope} if kind == "mistral3" else {}
    folder = tmp_path / "a model"
    made = tiny_random_model(kind, 49152, **own)
    for name, weight in made.named_parameters():
        if name.endswith("norm.weight"):  # Gemma's plus one is rounded to float16
            torch.nn.init.uniform_(weight, -0.9, 9)
    made.half().save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(embedded / name, folder / name)
    check_model(folder, spoken, source)
    report, _ = convert_model(folder, tmp_path / "m.gguf", source, "f16", fmt)
    assert report.outside > 10
    assert report.tensors >= 20
    assert report.unknown == 0


@pytest.mark.parametrize(
    ("kind", "tensor", "script", "told"),
    [
        ("qwen3_next", "model.norm.weight", '"--no-nextn", "--no-mtp"', ["--no-mtp"]),
        ("qwen3_5_text", "model.norm.weight", '"--no-nextn", "--no-mtp"', ["--no-mtp"]),
        ("qwen3_5_text", "mtp.norm.weight", '"--no-nextn", "--no-mtp"', []),
        ("qwen3_next", "model.norm.weight", "an older script", []),
        ("qwen3", "model.norm.weight", '"--no-nextn", "--no-mtp"', []),
    ],
)
def test_the_converter_hears_of_missing_layers_for_drafts(tmp_path, kind, tensor, script, told):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}), encoding="utf-8")
    save_file({tensor: torch.ones(2)}, tmp_path / "model.safetensors")
    (tmp_path / "convert.py").write_text(script, encoding="utf-8")
    assert gguf._drafts(tmp_path, tmp_path / "convert.py") == told


@pytest.mark.slow
def test_the_real_converter_takes_a_model_without_layers_for_drafts(source, embedded, tmp_path):
    folder = tmp_path / "a model"
    tiny_random_model("qwen3_next", 49152, bos_token_id=1, eos_token_id=2).half().save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(embedded / name, folder / name)
    fmt = chat_format(load_tokenizer(embedded, None, date(2024, 5, 1)))
    report, _ = convert_model(folder, tmp_path / "m.gguf", source, "f16", fmt)
    assert report.architecture == "qwen3next"
    assert report.tensors > 40
