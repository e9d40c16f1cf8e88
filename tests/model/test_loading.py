"""Which layers of a model get an adapter, and how much of it 4 bits hold; on tiny random models of many kinds."""

import json
import re
import sys
from datetime import date
from pathlib import Path

import pytest
import torch
from making.runs import config
from making.tiny import WRAPPERS, family, model, save_model
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from persona.config import Lora, Quantization
from persona.errors import UsageError
from persona.model.adapters import copy_tokenizer
from persona.model.architecture import linear_names, looks_ahead, model_class, text_layers, without_weights
from persona.model.loading import add_adapter, held_in_4_bits, load_adapter, load_base, load_tokenizer
from persona.model.render import BUILTIN_TEMPLATE, Example, chat_format, prompt_ids
from persona.train.estimate.memory import OnPaper, Setup
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


@pytest.mark.parametrize("begins", [False, True])
def test_a_base_model_reads_each_prompt_behind_the_token_that_its_texts_begin_with(tmp_path, begins):
    """It has seen no text without it, and llama.cpp writes it too."""
    own = family("builtin")
    own.chat_template = None
    if begins:
        special = [("<s>", own.bos_token_id)]
        own.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=special)
    own.save_pretrained(tmp_path)
    fmt = chat_format(load_tokenizer(tmp_path, None, date(2024, 5, 1)))
    ids = prompt_ids([{"role": "user", "content": "Hello there!"}], fmt)
    assert ids == own("### User:\nHello there!\n\n### Assistant:\n").input_ids
    assert (ids[0] == own.bos_token_id) == begins
    assert own.bos_token_id not in ids[1:]


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


ROUTED = {  # architecture: more of its configuration, and the layers that get an adapter
    "qwen3_moe": ({"mlp_only_layers": [0]}, {"q_proj", "k_proj", "v_proj", "o_proj"}),  # the rest would be the experts
    "mixtral": ({}, {"q_proj", "k_proj", "v_proj", "o_proj"}),
    "qwen2_moe": (
        {"num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32},
        {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},  # not shared_expert_gate
    ),
    "jetmoe": ({"num_local_experts": 4, "kv_channels": 16, "num_key_value_heads": 4, "num_attention_heads": None},
               {"kv_proj"}),  # its routers are plain linear layers
}  # fmt: skip


@pytest.mark.parametrize("architecture", ROUTED)
def test_experts_and_routers_stay_as_they_are(tmp_path, architecture):
    more, kinds = ROUTED[architecture]
    base = model(architecture, **more)
    tuned = add_adapter(base, Lora(r=2, lora_dropout=0), 0, "tiny")
    assert {name.rpartition(".")[2] for name in adapted(tuned)} == kinds
    assert not [name for name, weight in tuned.named_parameters() if weight.requires_grad and "expert" in name
                and "shared_expert" not in name]  # fmt: skip
    for name, weight in tuned.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.1)
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        own = tuned.eval()(input_ids=ids).logits
        tuned.save_pretrained(tmp_path)
        again = load_adapter(model(architecture, **more), tmp_path).eval()(input_ids=ids).logits
    torch.testing.assert_close(again, own, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", sorted(WRAPPERS))
def test_wrappers_are_tuned_below_their_decoder(kind):
    base = without_weights(model(kind).config)
    names = set(text_layers(base))
    assert len(names) >= 12
    assert not [
        name for name in names if re.search(r"vision|visual|projector|embed_vision|router|\.gate$|lm_head", name)
    ]
    parts = {part for name in names for part in name.split(".")}
    assert "language_model" in parts or type(base).__name__.endswith("ForCausalLM")


@pytest.mark.parametrize("kind", ["paligemma", "mistral3", "qwen3_5", "mamba", "qwen3_moe", "bloom"])
def test_a_model_that_sees_ahead_is_known(kind):
    assert looks_ahead(model(kind).eval()) == (kind == "paligemma")


def test_a_model_without_a_decoder_of_text_is_refused(tmp_path):
    config = AutoConfig.for_model("t5gemma2")
    with pytest.raises(UsageError, match="t5gemma2 cannot be trained to speak"):
        model_class(config)
    (tmp_path / "config.json").write_text('{"model_type": "vit"}', encoding="utf-8")
    with pytest.raises(UsageError, match="vit cannot be trained to speak"):
        load_base(tmp_path, Quantization(load_in_4bit=False), "fp32", CPU)


def test_the_chat_template_of_an_older_model_that_reads_pictures(tmp_path, chatml):
    folder = save_model(tmp_path / "base")
    template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    (folder / "chat_template.jinja").unlink()
    assert load_tokenizer(folder, None, date(2024, 5, 1)).chat_template == BUILTIN_TEMPLATE
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}), encoding="utf-8")
    assert load_tokenizer(folder, None, date(2024, 5, 1)).chat_template == template
    copy_tokenizer(folder, tmp_path, "trained")
    assert not (tmp_path / "chat_template.json").exists()  # processors would prefer it


def test_a_base_model_without_a_template_is_told_of(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder, lines = save_model(tmp_path / "base", tokenizer=family("builtin")), []
    (folder / "chat_template.jinja").unlink()
    finetune(config(tmp_path, folder, train=4, training={"num_train_epochs": 1}), True, lines.append)
    assert "note: this model has no chat template, so it learns the built-in one (### User:" in "\n".join(lines)


def test_a_named_layer_of_a_tower_is_left_out_too():
    tuned = add_adapter(made("gemma3"), Lora(target_modules=["q_proj"]), 0, "tiny")
    assert adapted(tuned) == {f"model.language_model.layers.{layer}.self_attn.q_proj" for layer in range(2)}
    assert "fc1" not in linear_names(made("gemma3"))  # of the tower
    with pytest.raises(UsageError, match=r"no linear layer 'fc1'"):
        add_adapter(made("gemma3"), Lora(target_modules=["fc1"]), 0, "tiny")


@pytest.mark.parametrize(
    ("architecture", "kinds", "barred"),
    [
        ("mamba", {"in_proj", "x_proj", "dt_proj"}, "out_proj"),
        ("glm4_moe", {"q_proj", "k_proj", "v_proj", "o_proj"}, "up_proj"),
        ("deepseek_v3", {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}, "gate_proj"),
    ],
)
def test_layers_that_peft_refuses_or_takes_for_experts_are_left_out(architecture, kinds, barred):
    tuned = add_adapter(model(architecture), Lora(), 0, "tiny")
    assert {name.rpartition(".")[2] for name in adapted(tuned)} >= kinds
    assert {name.rpartition(".")[2] for name in adapted(tuned)}.isdisjoint(
        {"gate_proj", "up_proj", "down_proj", barred}
    )
    assert {type(module).__name__ for module in tuned.modules() if hasattr(module, "lora_A")} == {"Linear"}
    assert not tuned.peft_config["default"].target_parameters
    with pytest.raises(UsageError, match=rf"no linear layer '{barred}' that can have an adapter"):
        add_adapter(model(architecture), Lora(target_modules=[barred]), 0, "tiny")


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
    with pytest.raises(UsageError) as on_paper:  # before anything is loaded
        OnPaper(Setup(AutoConfig.from_pretrained(folder), Lora(), Quantization(), "bf16", "cuda", "adamw_8bit", True))
    assert str(on_paper.value) == message
    assert f"only {share}% of this {architecture} model can be held in 4 bits" in message
    assert f"Its experts, {experts}% of its weights, would stay in 16 bits" in message
    assert "--set quantization.load_in_4bit=false" in message
    load_base(folder, Quantization(load_in_4bit=False), "bf16", CPU)


def test_few_experts_are_held_with_the_share_that_is_true(tmp_path):
    folder = save_model(tmp_path / "base", "qwen3_moe", num_experts=2, moe_intermediate_size=8)
    share, _ = held_in_4_bits(load_base(folder, Quantization(), "bf16", CPU))
    assert 0.2 < share < 0.6


@pytest.mark.parametrize("four", [False, True])
@pytest.mark.parametrize(
    ("architecture", "more"),
    [("llama", {}), ("gpt2", {}), ("gemma4", {}), ("gemma4_unified", {}), ("mistral3", {}),
     ("qwen3_5", {}),
     ("qwen3_moe", {"num_experts": 2, "moe_intermediate_size": 8})],
)  # fmt: skip
def test_the_weights_on_paper_are_those_that_are_loaded(tmp_path, architecture, more, four):
    folder = save_model(tmp_path / "base", architecture, **more)
    quantization = Quantization(load_in_4bit=four)
    base = load_base(folder, quantization, "bf16", CPU)
    held = sum(map(bytes_of, base.parameters())) + sum(map(bytes_of, base.buffers()))
    setup = Setup(AutoConfig.from_pretrained(folder), Lora(r=2), quantization, "bf16", "cpu", "adamw_torch", False)
    parts = OnPaper(setup).step([Example((1, 2, 3), (4, 5))]).parts
    assert parts["weights in 4 bits"] + parts["other weights"] == held
    assert (parts["weights in 4 bits"] > 0) == four


def bytes_of(tensor):
    state = getattr(tensor, "quant_state", None)
    scales = [] if state is None else [state.absmax, state.state2.absmax]
    return sum(one.numel() * one.element_size() for one in (tensor, *scales))


def test_a_model_that_cannot_be_computed_is_refused_before_anything_is_trained(tmp_path):
    folder = save_model(tmp_path / "base", "deepseek_v3", head_dim=16)  # its positions need 8
    with pytest.raises(UsageError, match=r"cannot compute this deepseek_v3 model: The size of tensor"):
        finetune(config(tmp_path, folder, quantization={"load_in_4bit": False}), True, print)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_base_in_4_bits_leaves_its_files(tmp_path):
    """A view of a mapped file keeps the whole file in the memory of the process."""
    folder = save_model(tmp_path / "base", dtype="bfloat16")
    base = load_base(folder, Quantization(), "bf16", CPU)
    assert str(folder) not in Path("/proc/self/maps").read_text(encoding="utf-8")
    assert base.get_input_embeddings().weight.dtype == torch.bfloat16
