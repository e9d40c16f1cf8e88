"""Every kind of LoRA adapter, on every architecture, is merged into what PEFT merges it into."""

import json
import shutil
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from making.merging import merge
from making.tiny import family, save_model
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from persona.errors import UsageError
from persona.merge import weights as tensors

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::peft.utils.warning.PeftWarning"),
]
DENSE = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "phi3", "gpt2", "bloom", "opt")
EXPERTS = ("mixtral", "qwen3_moe")  # PEFT adapts their stacked weights, and only by plain LoRA without dropout


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A base of each architecture by name, made when it is asked for."""
    made = {}

    def base(architecture, **config):
        key = (architecture, *sorted(config.items()))
        if key not in made:
            folder = tmp_path_factory.mktemp("base") / architecture
            made[key] = save_model(folder, architecture, family("chatml_default"), **config)
        return made[key]

    return base


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """A few rows at a time, also of matrices as small as these."""
    monkeypatch.setattr(tensors, "BLOCK", 700)


def adapted(base, **settings):
    """The model in `base` with a random adapter of these `settings`, in which nothing is zero."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(
        **({"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM", "target_modules": "all-linear"} | settings)
    )
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
            if "magnitude" in name:
                parameter.abs_().add_(0.1)
    return tuned.eval()


def logits(model):
    with torch.no_grad():
        return model(torch.arange(3, 40)[None]).logits


def check(base, tmp_path, peft_merges=True, **settings):
    """The merge of a random adapter is what PEFT computes with it, and tensor by tensor what PEFT merges."""
    tuned = adapted(base, **settings)
    expected = logits(tuned)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned.save_pretrained(tmp_path / "adapter")
    report = merge(base, tmp_path / "adapter", tmp_path / "merged", torch.float32, 200_000)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert (logits(merged) - expected).abs().max() <= 2e-5 * expected.abs().max()
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    assert (logits(plain) - expected).abs().max() > 1e-3 * expected.abs().max()
    if peft_merges:
        theirs = tuned.merge_and_unload().state_dict()
        ours = merged.state_dict()
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            torch.testing.assert_close(
                tensor, theirs[name], rtol=1e-6, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}"
            )
    return report


@pytest.mark.parametrize("architecture", [*DENSE, *EXPERTS])
def test_lora_on_every_linear_layer(bases, tmp_path, architecture):
    check(bases(architecture), tmp_path)


@pytest.mark.parametrize("architecture", DENSE)
def test_dora(bases, tmp_path, architecture):
    check(bases(architecture), tmp_path, use_dora=True)


KINDS = {
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 7}, "alpha_pattern": {"down_proj": 3}},
    "bias all": {"bias": "all"},
    "bias of the adapted layers": {"bias": "lora_only", "target_modules": ["q_proj"]},
    "saved norms": {"modules_to_save": ["norm"]},
    "saved head": {"modules_to_save": ["lm_head"]},
    "saved embedding": {"modules_to_save": ["embed_tokens"]},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "embedding and head": {"target_modules": ["embed_tokens", "lm_head"]},
    "embedding in dora": {"target_modules": ["embed_tokens"], "use_dora": True},
    "some tokens": {"trainable_token_indices": [5, 3, 400]},
    "one layer": {"layers_to_transform": [1], "target_modules": ["q_proj", "v_proj"]},
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_adapters(bases, tmp_path, kind):
    check(bases("llama"), tmp_path, **KINDS[kind])


def test_a_merge_leaves_the_number_of_threads_alone(bases, tmp_path):
    def threads():
        with ThreadPoolExecutor(1) as pool:
            return torch.get_num_threads(), pool.submit(torch.get_num_threads).result()

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        check(bases("llama"), tmp_path)
        assert threads() == (2, 2)
    finally:
        torch.set_num_threads(before)


def test_biases_of_the_adapter_itself(bases, tmp_path):
    check(bases("qwen2"), tmp_path, lora_bias=True, target_modules=["q_proj", "v_proj"])


@pytest.mark.parametrize("dora", [False, True])
def test_layers_that_store_their_transpose(bases, tmp_path, dora):
    check(bases("gpt2"), tmp_path, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, use_dora=dora)


TIED = ("embedding", "embedding and head", "saved embedding", "saved head")


@pytest.mark.parametrize("kind", TIED)
@pytest.mark.parametrize("architecture", ["llama", "opt"])
def test_tied_embeddings_that_become_two(bases, tmp_path, architecture, kind):
    base = bases(architecture, tie_word_embeddings=True)
    assert check(base, tmp_path, peft_merges=False, **KINDS[kind]).untied


STAYING = {
    "embedding": {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
    "saved embedding": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "some tokens": {"trainable_token_indices": [5, 3]},
    "others": {},
}


@pytest.mark.parametrize("kind", STAYING)
def test_tied_embeddings_that_stay_one(bases, tmp_path, kind):
    # PEFT 0.21.2 adds the change to the one tensor twice, once for each end; its own unmerged model disagrees
    peft_merges = kind != "embedding"
    assert not check(bases("llama", tie_word_embeddings=True), tmp_path, peft_merges, **STAYING[kind]).untied


@pytest.mark.parametrize("architecture", EXPERTS)
@pytest.mark.parametrize("parameters", [["mlp.experts.gate_up_proj", "mlp.experts.down_proj"], ["experts.down_proj"]])
def test_experts(bases, tmp_path, architecture, parameters):
    check(bases(architecture), tmp_path, target_modules=["q_proj"], target_parameters=parameters)


def test_an_adapter_that_moved_its_base_is_refused(bases, tmp_path):
    tuned = adapted(bases("llama"), target_modules=["q_proj"], init_lora_weights="olora")
    tuned.save_pretrained(tmp_path / "adapter")
    with pytest.raises(UsageError, match="init_lora_weights: olora"):
        merge(bases("llama"), tmp_path / "adapter", tmp_path / "merged", torch.float32, 10**9)
    assert not (tmp_path / "merged").exists()


def test_a_resized_vocabulary_is_refused(bases, tmp_path):
    base = bases("llama")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    rows = model.get_input_embeddings().weight.shape[0]
    model.resize_token_embeddings(rows + 2)
    tuned = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens"]))
    tuned.save_pretrained(tmp_path / "adapter")
    with pytest.raises(UsageError, match=f"resized vocabulary: .* has {rows + 2} rows, that of .* {rows}"):
        merge(base, tmp_path / "adapter", tmp_path / "merged", torch.float32, 10**9)


def test_tokens_that_the_base_lacks_are_named(bases, tmp_path):
    tuned = adapted(bases("llama"), target_modules=["q_proj"])
    tuned.save_pretrained(tmp_path / "adapter")
    other = family("chatml_default")
    other.add_tokens(["<|mood|>"])
    other.save_pretrained(tmp_path / "adapter")
    with pytest.raises(UsageError, match=r'another tokenizer .*"<\|mood\|>"'):
        merge(bases("llama"), tmp_path / "adapter", tmp_path / "merged", torch.float32, 10**9)


def test_a_base_in_shards_and_in_bfloat16(bases, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(bases("llama"), dtype=torch.bfloat16)
    whole, sharded = (shutil.copytree(bases("llama"), tmp_path / name) for name in ("whole", "sharded"))
    (sharded / "model.safetensors").unlink()
    model.save_pretrained(whole)
    model.save_pretrained(sharded, max_shard_size="100KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    adapted(whole).save_pretrained(tmp_path / "adapter")
    for base in (whole, sharded):
        merge(base, tmp_path / "adapter", tmp_path / f"merged {base.name}", torch.float16, 150_000)
    one, other = (tmp_path / f"merged {name}" for name in ("whole", "sharded"))
    assert len(list(one.glob("*.safetensors"))) > 1
    for path in (one, other):
        index = json.loads((path / "model.safetensors.index.json").read_text(encoding="utf-8"))
        sizes = sum(
            t.numel() * t.element_size() for file in path.glob("*.safetensors") for t in load_file(file).values()
        )
        assert index["metadata"]["total_size"] == sizes
    ours, theirs = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (one, other))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def planned(name, tensor):
    stored = tensors.Stored(name, Path(), 0, tensor.dtype, tuple(tensor.shape))
    return tensors.Output(name, stored, tensor.dtype, [])


def test_the_files_are_what_safetensors_itself_writes(tmp_path):
    weights = {
        "a": torch.randn(3, 5).half(),
        "b": torch.arange(4),
        "c": torch.tensor(2.0),
        "d": torch.randn(2).bfloat16(),
    }
    with (tmp_path / "ours").open("wb") as file:
        file.write(tensors.header([planned(name, tensor) for name, tensor in weights.items()]))
        for tensor in weights.values():
            tensors.write(file, tensor)
    read = load_file(tmp_path / "ours")
    assert read.keys() == weights.keys()
    assert all(read[name].dtype == tensor.dtype and torch.equal(read[name], tensor) for name, tensor in weights.items())
