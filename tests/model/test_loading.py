"""Which layers of a model get an adapter, and how much of it 4 bits hold; on tiny random models of many kinds."""

import pytest
import torch
from making.runs import config
from making.tiny import model, save_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from persona.config import Lora, Quantization
from persona.errors import UsageError
from persona.model.loading import add_adapter, held_in_4_bits, linear_names, load_base
from persona.train.run import finetune

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 1}
TOWER = {
    **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2},
    **{"image_size": 28, "patch_size": 14},
}


def made(kind):
    """A random model with routers that return two tensors, or with a tower for pictures."""
    if kind == "gemma3":
        chosen = AutoConfig.for_model(kind, text_config=SIZES, vision_config=TOWER, mm_tokens_per_image=4)
    else:
        chosen = AutoConfig.for_model(kind, **SIZES, **EXPERTS)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(chosen)


def adapted(tuned):
    """The names of the layers with an adapter."""
    names = {name.partition(".lora_A")[0] for name, _ in tuned.named_parameters() if ".lora_A" in name}
    return {name.removeprefix("base_model.model.") for name in names}


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gpt2", "bloom", "opt", "gemma2"])
def test_all_linear_is_what_it_is_to_peft_in_a_model_of_text_alone(architecture):
    from peft import LoraConfig, get_peft_model

    theirs = get_peft_model(model(architecture), LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    ours = adapted(add_adapter(model(architecture), Lora(), 0, "tiny"))
    assert ours == adapted(theirs)
    assert len(ours) >= 8


@pytest.mark.parametrize("kind", ["llama4_text", "phimoe", "gemma3"])
def test_routers_and_towers_get_no_adapter_and_every_adapter_learns(kind):
    base = made(kind)
    tuned = add_adapter(base, Lora(r=2, lora_dropout=0), 0, "tiny")
    names = adapted(tuned)
    assert {"q_proj", "k_proj", "v_proj", "o_proj"} <= {name.rpartition(".")[2] for name in names}
    assert not [name for name in names if "router" in name or "vision" in name or "lm_head" in name]
    for name, weight in tuned.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.1)
    tuned(input_ids=torch.arange(1, 9)[None]).logits.logsumexp(-1).sum().backward()
    silent = [name for name, weight in tuned.named_parameters() if weight.requires_grad and not weight.grad.any()]
    assert not silent


def test_a_named_layer_of_a_tower_is_left_out_too():
    tuned = add_adapter(made("gemma3"), Lora(target_modules=["q_proj"]), 0, "tiny")
    assert adapted(tuned) == {f"model.language_model.layers.{layer}.self_attn.q_proj" for layer in range(2)}
    assert "fc1" not in linear_names(made("gemma3"))  # of the tower
    with pytest.raises(UsageError, match=r"no linear layer 'fc1'"):
        add_adapter(made("gemma3"), Lora(target_modules=["fc1"]), 0, "tiny")


def test_a_layer_that_peft_refuses_is_named_with_the_others():
    with pytest.raises(UsageError, match=r"target_modules: .*out_proj.* of: in_proj, x_proj, dt_proj, out_proj\."):
        add_adapter(model("mamba"), Lora(), 0, "tiny")
    named = Lora(target_modules=["in_proj", "x_proj"])
    assert len(adapted(add_adapter(model("mamba"), named, 0, "tiny"))) == 4


# --- 4 bits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_share_in_4_bits_is_counted(tmp_path, architecture):
    folder = save_model(tmp_path / "base", architecture)
    held = load_base(folder, Quantization(), "bf16", CPU)
    plain = load_base(folder, Quantization(load_in_4bit=False), "bf16", CPU)
    layers = sum(layer.weight.numel() for layer in plain.get_decoder().modules()
                 if type(layer).__name__ in ("Linear", "Conv1D"))  # fmt: skip
    whole = sum(weight.numel() for weight in plain.parameters())
    assert held_in_4_bits(held) == (pytest.approx(layers / whole), 2 * (whole - layers))
    assert 0.2 < layers / whole < 0.9
    assert held_in_4_bits(plain) == (0, 2 * whole)


def test_the_plan_says_how_much_is_in_4_bits(tmp_path, tiny_model, monkeypatch):
    monkeypatch.chdir(tmp_path)
    messages = []
    finetune(config(tmp_path, tiny_model, quantization={"load_in_4bit": True}), True, messages.append)
    share, others = held_in_4_bits(load_base(tiny_model, Quantization(), "fp32", CPU))
    expected = f"in 4 bits (nf4): {share:.0%} of its weights; {others / 2**30:.2f} GiB stay in 32 bits"
    assert expected in "\n".join(messages)


@pytest.mark.parametrize(("architecture", "share", "experts"), [("qwen3_moe", 18, 36), ("mixtral", 9, 69)])
def test_a_model_whose_experts_stay_in_16_bits_is_refused_in_4(tmp_path, architecture, share, experts):
    folder = save_model(tmp_path / "base", architecture)
    with pytest.raises(UsageError) as refused:
        load_base(folder, Quantization(), "bf16", CPU)
    message = str(refused.value)
    assert f"only {share}% of this {architecture} model can be held in 4 bits" in message
    assert f"Its experts, {experts}% of its weights, would stay in 16 bits" in message
    assert "--set quantization.load_in_4bit=false" in message
    load_base(folder, Quantization(load_in_4bit=False), "bf16", CPU)


def test_few_experts_are_held_with_the_share_that_is_true(tmp_path):
    folder = save_model(tmp_path / "base", "qwen3_moe", num_experts=2, moe_intermediate_size=8)
    share, _ = held_in_4_bits(load_base(folder, Quantization(), "bf16", CPU))
    assert 0.2 < share < 0.6
