"""Who may be given prefix trees, and the trial before the first update: what it finds, and that it leaves no trace."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from making import runs
from making.packs import attended, cases, with_adapter
from making.tiny import family, model, save_model

from persona.config import Lora
from persona.engine import fused, packing, trial
from persona.engine.attention import NAME, Softmax, tree_attention
from persona.engine.trial import difference, plain_loss, prepare_layout, trial_examples, why_not, without_chance
from persona.errors import UsageError
from persona.model.loading import add_adapter
from persona.train.run import finetune

pytestmark = pytest.mark.usefixtures("one_thread")
SLIDES = ["full_attention", "sliding_attention"]
LONGROPE = {"rope_type": "longrope", "original_max_position_embeddings": 64, "short_factor": [1.0]}


def device(precision):
    """As much of accelerate as the trial asks for; a process can have its real one in one precision only."""
    autocast = partial(torch.autocast, "cpu", torch.bfloat16, enabled=precision == "bf16")
    return SimpleNamespace(device=torch.device("cpu"), autocast=autocast)


@pytest.fixture
def accelerator():
    return device("fp32")


@pytest.mark.parametrize(
    ("settings", "longest", "reason"),
    [
        ({"model_type": "llama"}, 10**6, None),
        ({"model_type": "qwen3", "sliding_window": None}, 10**6, None),
        ({"model_type": "mistral", "sliding_window": 64}, 4097, None),
        ({"model_type": "gemma3_text", "sliding_window": 512, "layer_types": SLIDES}, 1536, None),
        ({"model_type": "qwen2_moe", "sliding_window": 64, "layer_types": SLIDES}, 64, None),
        ({"model_type": "qwen2_moe", "sliding_window": 64, "layer_types": SLIDES}, 65, "only 64 tokens"),
        ({"model_type": "qwen2_moe", "sliding_window": 0, "layer_types": ["full_attention"]}, 4096, None),
        ({"model_type": "llama", "layer_types": ["linear_attention", "full_attention"]}, 16, "linear_attention"),
        ({"model_type": "mamba2"}, 16, "state"),
        ({"model_type": "opt"}, 16, "learned"),
        ({"model_type": "bloom"}, 16, "ALiBi"),
        ({"model_type": "unheard_of"}, 16, "not among"),
        ({"model_type": "llama", "attention_dropout": 0.1}, 16, None),
        ({"model_type": "llama", "_attn_implementation": "flash_attention_2"}, 16, "flash_attention_2"),
        ({"model_type": "gemma2", "_attn_implementation": "eager"}, 16, None),
        ({"model_type": "phi3", "rope_parameters": LONGROPE}, 64, None),
        ({"model_type": "phi3", "rope_parameters": LONGROPE}, 65, "over 64 tokens beside it (rope_type longrope)"),
        ({"model_type": "llama", "rope_parameters": {"rope_type": "dynamic"}}, 4096, None),
        ({"model_type": "llama", "rope_parameters": {"rope_type": "dynamic"}}, 4097, "rope_type dynamic"),
        ({"model_type": "gemma3_text", "rope_parameters": {"full_attention": LONGROPE}}, 65, "longrope"),
        ({"model_type": "llama", "rope_parameters": {"rope_type": "default", "factor": None}}, 16, None),
    ],
)  # fmt: skip
def test_who_may_share(settings, longest, reason):
    text = SimpleNamespace(**{"max_position_embeddings": 4096, "_attn_implementation": "sdpa"} | settings)
    text.get_text_config = lambda: text
    wrapper = SimpleNamespace(
        model_type="seen", _attn_implementation=text._attn_implementation, get_text_config=lambda: text
    )
    for config in (text, wrapper):
        refusal = why_not(config, longest)
        assert refusal is None if reason is None else reason in refusal


def trace(tuned):
    """Everything that a trial could leave behind."""
    weights = [weight.detach().clone() for weight in tuned.parameters()]
    grads = [weight.grad for weight in tuned.parameters()]
    return [*weights, torch.get_rng_state()], grads, [module.training for module in tuned.modules()]


def test_the_trial_finds_nothing_in_a_right_layout_and_leaves_no_trace(accelerator):
    tuned = add_adapter(model("qwen2"), Lora(r=4, lora_dropout=0.3), seed=0, base_name="tiny").train()
    before = trace(tuned)
    assert prepare_layout(tuned, cases()["history kept"], 300, accelerator) is None
    after = trace(tuned)
    assert all(torch.equal(a, b) for a, b in zip(before[0], after[0], strict=True))
    assert after[1:] == before[1:]


def checkpointed(base):
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return add_adapter(base, Lora(r=4, lora_dropout=0.3), seed=0, base_name="tiny").train()


@pytest.mark.parametrize("architecture", ["qwen3", "opt"])
def test_layers_are_checkpointed_in_the_trial_without_chance_or_trace(architecture, accelerator):
    settings = {"dropout": 0.5, "attention_dropout": 0.5} if architecture == "opt" else {}
    tuned = checkpointed(model(architecture, **settings))
    tuned.get_base_model().get_decoder().eval()  # modes that differ
    before, decoders = trace(tuned), tuned.get_base_model().get_decoder().layers
    counts, losses = [], []
    real = decoders[0]._gradient_checkpointing_func
    for layer in decoders:
        layer._gradient_checkpointing_func = lambda *args: counts.append(1) or real(*args)
    (example, *_) = trial_examples(cases()["history kept"])
    for _ in range(2):
        with without_chance(tuned):
            losses.append(plain_loss(tuned, example, accelerator.device))
            losses[-1].backward()
    assert losses[0].item() == losses[1].item()
    assert len(counts) == 2 * len(decoders)
    for layer in decoders:
        layer._gradient_checkpointing_func = real
    tuned.zero_grad()
    after = trace(tuned)
    assert not any("forward" in vars(module) for module in tuned.modules())
    assert all(torch.equal(a, b) for a, b in zip(before[0], after[0], strict=True))
    assert after[1:] == before[1:]


def test_a_model_that_computes_nothing_is_refused(accelerator, monkeypatch):
    tuned, examples = with_adapter(model("deepseek_v3", head_dim=16)), cases()["history kept"]  # its positions need 8
    with pytest.raises(UsageError, match="cannot compute this deepseek_v3 model: The size of tensor"):
        prepare_layout(tuned, examples, 300, accelerator)
    full = torch.OutOfMemoryError("CUDA out of memory.")
    monkeypatch.setattr(trial, "plain_loss", Mock(side_effect=full))
    with pytest.raises(torch.OutOfMemoryError):
        prepare_layout(tuned, examples, 300, accelerator)


def test_functional_dropout_is_off_in_the_trial(accelerator):
    tuned = with_adapter(model("opt", dropout=0.5, attention_dropout=0.5))
    state = torch.get_rng_state()
    assert "learned" in prepare_layout(tuned, cases()["history kept"], 300, accelerator)
    assert torch.equal(torch.get_rng_state(), state)
    assert any("forward" in vars(module) for module in tuned.modules())


@pytest.mark.parametrize("case", cases())
def test_the_trial_always_has_branches(case):
    examples = trial_examples(cases()[case][:1])
    packed = packing.pack(packing.plan_packs(examples, 10**6, True)[0], torch.device("cpu"), True, 64)
    tokens = sum(len(packing.inputs(example)) for example in examples)
    assert len({packing.inputs(example) for example in examples}) == 3
    assert packed.input_ids.numel() < tokens
    assert (len(packed.tree.blocks) > 1) is (packed.input_ids.numel() > 64)  # and then several blocks


def sees_its_sisters(group, device, reach, right=packing._block):
    block = right(group, device, reach)
    rows, columns = block.bias.shape
    return replace(block, bias=torch.full((rows, columns), float("-inf")).triu(columns - rows + 1))


def sees_too_little(group, device, reach, right=packing._block):
    block = right(group, device, reach)
    return block if block.begin == 0 else replace(block, sources=[(1, 9), *block.sources[1:]])


@pytest.mark.parametrize("wrong", [sees_its_sisters, sees_too_little])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_trial_finds_a_wrong_tree(wrong, precision, monkeypatch):
    accelerator = device(precision)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    tuned = with_adapter(model("llama").to(dtype))
    examples = cases()["history kept"]
    assert prepare_layout(tuned, examples, 300, accelerator) is None
    monkeypatch.setattr(packing, "_block", wrong)
    assert "in a trial before the first update the" in prepare_layout(tuned, examples, 300, accelerator)
    assert tuned.config._attn_implementation == "sdpa"
    assert not any("forward" in vars(module) for module in tuned.modules())


@pytest.mark.parametrize("architecture", ["gemma3_text", "mistral", "gpt_oss"])
def test_the_trial_reaches_a_window_that_its_examples_do_not(architecture, accelerator, monkeypatch):
    tuned, examples = with_adapter(model(architecture, sliding_window=3000)), cases()["history kept"]
    windows = [vars(one).get("sliding_window") for one in (tuned.config, *tuned.modules())]
    assert 3000 in windows
    assert prepare_layout(tuned, examples, 4000, accelerator) is None
    monkeypatch.setattr(packing.Tree, "blocks_within", lambda tree, _: tree.blocks)
    assert "in a trial before the first update the" in prepare_layout(tuned, examples, 4000, accelerator)
    assert windows == [vars(one).get("sliding_window") for one in (tuned.config, *tuned.modules())]


def test_the_trial_finds_a_window_that_attention_is_not_told(accelerator, monkeypatch):
    kinds = {"layer_types": SLIDES, "use_sliding_window": True, "sliding_window": 3000}
    tuned, examples = with_adapter(model("qwen2_moe", **kinds)), cases()["history kept"]
    assert "only 3000 tokens" in prepare_layout(tuned, examples, 3001, accelerator)
    monkeypatch.setattr(trial, "UNTOLD", frozenset())
    assert "in a trial before the first update the" in prepare_layout(tuned, examples, 3001, accelerator)


def test_the_trial_finds_a_wrong_gradient(accelerator, monkeypatch):
    tuned = with_adapter(model("llama"))
    right = fused._Norm.backward

    def wrong(ctx, *grads):
        grad, *rest = right(ctx, *grads)
        return (grad * 1.1, *rest)

    monkeypatch.setattr(fused._Norm, "backward", staticmethod(wrong))
    tuned.get_base_model().set_attn_implementation(NAME)
    for share in (False, True):
        assert "gradient" in difference(tuned, trial_examples(cases()["all the same"]), accelerator, share)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("architecture", ["opt", "bloom", "gpt2"])
def test_the_others_train_in_rows_and_say_why(architecture, tmp_path):
    folder = save_model(tmp_path / architecture, architecture, family("chatml_default"))
    said = []
    config = runs.config(tmp_path, folder, training={"num_train_epochs": 1}, lora={"lora_dropout": 0.0})
    finetune(config, True, said.append)
    assert "one example a row: its " in "\n".join(said)
    losses = [line["train/loss"] for line in runs.metrics(tmp_path / "outputs" / "tiny") if "train/loss" in line]
    assert losses[-1] < losses[0]


def test_a_run_says_that_it_drops_no_attention_weights(tmp_path):
    folder = save_model(tmp_path / "llama", "llama", family("chatml_default"), attention_dropout=0.1)
    said = []
    finetune(runs.config(tmp_path, folder, training={"num_train_epochs": 1}), True, said.append)
    assert "no attention weights are dropped, though the model's attention_dropout is 0.1" in "\n".join(said)


def test_a_run_that_fails_the_trial_goes_on_in_rows(tmp_path, tiny_model, monkeypatch):
    monkeypatch.setattr(packing, "_block", sees_its_sisters)
    said = []
    finetune(runs.config(tmp_path, tiny_model, training={"num_train_epochs": 1}), True, said.append)
    assert "one example a row: in a trial before the first update the" in "\n".join(said)


def test_large_scores_are_as_exact_as_in_scaled_dot_product_attention():
    # like the biases of Qwen2: what all queries and all keys have in common makes scores of a hundred and more
    chance = torch.Generator().manual_seed(0)
    examples = cases()["history kept"]
    packed = packing.pack(packing.plan_packs(examples, 10**6, True)[0], torch.device("cpu"), True, 64)
    tokens = packed.input_ids.numel()
    given = [torch.randn(tokens, heads, 16, generator=chance) + offset for heads, offset in ((4, 5), (2, 5), (2, 1))]
    weights = torch.randn(tokens, 4, 16, generator=chance)
    mask = attended(packed)

    def error(attend, wanted=None):
        inputs = [x.to(torch.bfloat16 if wanted else torch.float64).requires_grad_() for x in given]
        if wanted is None:
            inputs = [x.detach().bfloat16().double().requires_grad_() for x in inputs]
        out = attend(*inputs)
        out.backward(weights.to(out.dtype))
        found = [out, *(x.grad for x in inputs)]
        if wanted is None:
            return found
        return [float((a - b).norm() / b.norm()) for a, b in zip(found, wanted, strict=True)]

    def masked(query, key, value):
        key, value = (x.repeat_interleave(2, 1) for x in (key, value))
        query, key, value = (x.transpose(0, 1)[None] for x in (query, key, value))
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)[0].transpose(0, 1)

    right = error(masked)
    of_mask = error(masked, right)
    of_tree = error(lambda query, key, value: tree_attention(query, key, value, packed.tree, Softmax(0.25)), right)
    assert all(ours < 2 * theirs + 0.003 for ours, theirs in zip(of_tree, of_mask, strict=True)), (of_tree, of_mask)


def large_keys(dtype):
    """A tree, and queries, keys and values for it; Qwen2.5's keys have biases of 150 and more."""
    chance = torch.Generator().manual_seed(0)
    packed = packing.pack(packing.plan_packs(cases()["history kept"], 10**6, True)[0], torch.device("cpu"), True, 64)
    query, key, value = (torch.randn(packed.input_ids.numel(), n, 64, generator=chance) for n in (4, 2, 2))
    key[..., ::8] += 150 * torch.randn(8, generator=chance).sign()
    return packed.tree, [x.to(dtype).requires_grad_() for x in (query, key, value)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_large_scores_are_exact_under_autocast(dtype):
    tree, inputs = large_keys(dtype)
    right = tree_attention(*(x.float() for x in inputs), tree, Softmax(0.125))
    with torch.autocast("cpu", dtype):
        out = tree_attention(*inputs, tree, Softmax(0.125))
    assert out.dtype == dtype
    assert (out - right).norm() <= 0.005 * right.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_leaves_the_scores_in_float32(dtype, monkeypatch):
    tree, inputs = large_keys(dtype)
    results = []
    softmax = torch.softmax
    monkeypatch.setattr(torch, "softmax", lambda *args: results.extend((args[0], softmax(*args))) or results[-1])
    with torch.autocast("cpu", dtype):
        out = tree_attention(*inputs, tree, Softmax(0.125))
        assert [x.dtype for x in results] == [torch.float32] * 2 * len(tree.blocks)
        out.sum().backward()
    assert [x.dtype for x in results] == [torch.float32] * 4 * len(tree.blocks)


def test_a_model_that_shares_still_generates(accelerator):
    tuned = with_adapter(model("llama"))
    ids = torch.arange(3, 30)[None]
    tuned.eval()
    right = tuned.generate(input_ids=ids, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert prepare_layout(tuned, cases()["history kept"], 300, accelerator) is None
    assert tuned.config._attn_implementation == NAME
    tuned.eval()
    found = tuned.generate(input_ids=ids, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert found.tolist() == right.tolist()
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), ids], 1)
    mask = torch.cat([torch.zeros(1, 4, dtype=torch.long), torch.ones_like(ids)], 1)
    left = tuned.generate(
        input_ids=padded, attention_mask=mask, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert left[:, 4:].tolist() == right.tolist()
