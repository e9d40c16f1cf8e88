"""How examples lie in memory changes nothing: rows, padded rows and prefix trees give the same loss and gradients."""

import random
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from making.packs import (
    CPU,
    LOSS,
    TALKS,
    assert_same,
    attended,
    cases,
    measured,
    packed_result,
    plain_loss,
    tokens,
    with_adapter,
)
from making.tiny import family, model, save_model
from transformers import AutoConfig, AutoModelForImageTextToText

from persona.config import Quantization
from persona.engine.attention import NAME
from persona.engine.fused import fuse, unfuse
from persona.engine.loss import negative_log_likelihood, supervised_logits
from persona.engine.packing import inputs, pack, plan_packs
from persona.engine.trial import SHARING, keep_rows, prepare_layout, why_not
from persona.model.loading import load_base
from persona.model.render import Example, chat_format, render
from persona.train.loop import mean_loss

pytestmark = pytest.mark.usefixtures("one_thread")


@cache
def plain(architecture):
    """The libraries' own layers and attention."""
    return with_adapter(model(architecture, pad_token_id=None))


@cache
def adapted(architecture):
    """The same weights, computed as training does."""
    made = with_adapter(model(architecture, pad_token_id=None))
    if architecture in SHARING:
        made.get_base_model().set_attn_implementation(NAME)
    fuse(made)
    return made


@cache
def expected(architecture, case):
    tuned = plain(architecture)
    return measured(tuned, (plain_loss(tuned, example) for example in cases()[case]))


few_tokens = st.integers(0, 2)  # so that beginnings are often shared
any_examples = st.lists(
    st.builds(
        Example,
        st.lists(few_tokens, min_size=1, max_size=7).map(tuple),
        st.lists(few_tokens, min_size=1, max_size=5).map(tuple),
    ),
    min_size=1,
    max_size=9,
)


# --- the same loss, the same gradients -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("share", "size"),
    [*((True, size) for size in ("longest", 64, 128, 100_000)), *((False, size) for size in (128, 100_000))],
)
@pytest.mark.parametrize("case", cases())
@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gpt_oss", "deepseek_v3"])
def test_the_layout_changes_nothing(architecture, case, share, size):
    examples = list(cases()[case])
    limit = max(len(inputs(example)) for example in examples) if size == "longest" else size
    random.Random(size).shuffle(examples)
    tuned = adapted(architecture)
    assert why_not(tuned.config, limit) is None
    assert_same(packed_result(tuned, examples, limit, share), expected(architecture, case))


@pytest.mark.parametrize("architecture", sorted(SHARING))
def test_an_architecture_shares(architecture):
    tuned, examples = adapted(architecture), cases()["history kept"]
    assert why_not(tuned.config, 4096) is None
    for size, share in ((100_000, True), (64, True), (128, False)):
        assert_same(packed_result(tuned, examples, size, share), expected(architecture, "history kept"))


@pytest.mark.parametrize("share", [True, False])
def test_no_attention_weights_are_dropped(share):
    """As Seed-OSS' configuration would have it: what examples share is computed once, and rows do the same."""
    examples = cases()["history kept"]
    tuned = with_adapter(model("llama", pad_token_id=None, attention_dropout=0.5))
    tuned.get_base_model().set_attn_implementation(NAME)
    accelerator = SimpleNamespace(device=CPU, autocast=lambda: torch.autocast("cpu", enabled=False))
    assert prepare_layout(tuned.train(), examples, 300, accelerator) is None
    assert_same(packed_result(tuned, examples, 100_000, share), expected("llama", "history kept"))


# --- windows, soft caps, sinks ---------------------------------------------------------------------------------------

ALTERNATE = {"layer_types": ["sliding_attention", "full_attention"], "use_sliding_window": True}
WINDOWS = {
    "mistral": {}, "mixtral": {}, "phi3": {}, "starcoder2": {}, "ministral3": {}, "qwen2": ALTERNATE,
    "qwen3": ALTERNATE, "qwen3_moe": {"use_sliding_window": True}, "ministral": {}, "gemma2": {}, "gemma3_text": {},
    "gemma4_text": {}, "gemma4_unified_text": {}, "olmo3": {}, "exaone4": {}, "cohere2": {}, "gpt_oss": {},
    "smollm3": ALTERNATE,
}  # fmt: skip


def compared(architecture, sizes=(100_000,), **config):
    """How far the trees' loss and gradients are from those of the model's own attention, alone."""
    examples = cases()["history kept"]
    tuned = with_adapter(model(architecture, pad_token_id=None, **config))
    right = measured(tuned, (plain_loss(tuned, example) for example in examples))
    tuned.get_base_model().set_attn_implementation(NAME)
    fuse(tuned)
    for size in sizes:
        assert_same(packed_result(tuned, examples, size, True), right)
    return right[0]


@pytest.mark.parametrize("architecture", WINDOWS)
def test_a_window_shorter_than_the_examples_is_carried(architecture):
    config = WINDOWS[architecture]
    short = compared(architecture, (100_000, 64), sliding_window=16, **config)
    assert compared(architecture, sliding_window=4096, **config) != pytest.approx(short, rel=1e-4)


@pytest.mark.parametrize("window", [2, 7, 40, 64, 100, 101])
def test_windows_of_any_length(window):
    compared("gemma3_text", (100_000, 64), sliding_window=window)


@pytest.mark.parametrize("window", [16, 4096])
def test_layers_that_take_the_keys_of_others_share(window):
    kinds = ["sliding_attention", "full_attention"] * 2
    compared("gemma4_text", sliding_window=window, num_hidden_layers=4, num_kv_shared_layers=2, layer_types=kinds)


TEXT = {
    **{"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2, "pad_token_id": 0},
}
SLIDES = ALTERNATE | {"sliding_window": 16}
TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 8}
WRAPPERS = {
    "gemma3": (SLIDES, {"image_size": 32}),
    "gemma4": (
        SLIDES | {"global_head_dim": 32, "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 512},
        {"num_key_value_heads": 2, "head_dim": 16, "position_embedding_size": 64},
    ),
    "gemma4_unified": (
        SLIDES | {"global_head_dim": 32, "attention_k_eq_v": True, "num_global_key_value_heads": 1},
        {"pooling_kernel_size": 1, "mm_embed_dim": 32, "mm_posemb_size": 8, "output_proj_dims": 32},
    ),
    "mistral3": ({"model_type": "ministral3", "sliding_window": None}, {"model_type": "pixtral", "image_size": 32}),
}


@pytest.mark.parametrize("kind", WRAPPERS)
def test_a_model_that_reads_pictures_shares_by_its_language_part(kind):
    text, tower = WRAPPERS[kind]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = AutoConfig.for_model(kind, text_config=TEXT | text, vision_config=TOWER | tower)
        base = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    tuned, examples = with_adapter(base.requires_grad_(False)), cases()["history kept"]
    assert why_not(tuned.config, 4096) is None
    right = measured(tuned, (plain_loss(tuned, example) for example in examples))
    tuned.get_base_model().set_attn_implementation(NAME)
    fuse(tuned)
    assert_same(packed_result(tuned, examples, 100_000, True), right)
    keep_rows(tuned)
    assert tuned.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("cap", [0.5, 30.0, None])
def test_a_soft_cap_of_any_size(cap):
    compared("gemma2", (100_000, 64), attn_logit_softcapping=cap)


@pytest.mark.parametrize("window", [1, 3, 8])
@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_a_window_counts_along_the_branch(window, data):
    examples = data.draw(any_examples)
    (group,) = plan_packs(examples, 10**6, True)
    with patch("persona.engine.packing.BLOCK", data.draw(st.integers(1, 12))):
        packed = pack([*group, *group[:1]] if len(group) == 1 else group, CPU, True)
        depths = packed.position_ids[0]
        near = depths[:, None] - depths[None, :] < window
        assert attended(packed, window).equal(attended(packed) & near)


def test_activations_computed_again_change_nothing():
    tuned = with_adapter(model("llama"))
    tuned.get_base_model().set_attn_implementation(NAME)
    fuse(tuned)
    tuned.get_base_model().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert_same(packed_result(tuned, cases()["history kept"], 300, True), expected("llama", "history kept"))


@pytest.mark.parametrize("block", [1, 7, 16, 50])
@pytest.mark.parametrize("case", cases())
def test_the_size_of_blocks_changes_nothing(case, block, monkeypatch):
    monkeypatch.setattr("persona.engine.packing.BLOCK", block)
    assert_same(packed_result(adapted("qwen3"), cases()[case], 300, True), expected("qwen3", case))


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("architecture", ["opt", "bloom", "gpt2", "stablelm"])
def test_other_architectures_are_trained_in_rows(architecture):
    tuned = adapted(architecture)
    assert why_not(tuned.config, 128)
    assert_same(packed_result(tuned, cases()["history kept"], 300, False), expected(architecture, "history kept"))


@pytest.mark.parametrize("architecture", [*sorted(SHARING), "opt", "bloom", "gpt2"])
def test_logits_behind_the_hook_are_those_of_the_whole_output(architecture):
    tuned = adapted(architecture)
    for share in {False, architecture in SHARING}:
        packed = pack(plan_packs(cases()["history kept"], 100_000, share)[0], CPU, share)
        everywhere = torch.arange(packed.input_ids.numel())
        with torch.no_grad():
            some = supervised_logits(tuned, packed)
            whole = supervised_logits(tuned, replace(packed, positions=everywhere)).unflatten(0, packed.input_ids.shape)
        assert some.shape == (len(packed.targets), whole.shape[-1])
        torch.testing.assert_close(some, whole.flatten(0, 1)[packed.positions], rtol=1e-5, atol=1e-5)


def test_the_hook_goes_after_an_error():
    tuned = plain("gemma3_text")
    packed = pack(cases()["all the same"], CPU, False)
    with pytest.raises(IndexError):
        supervised_logits(tuned, replace(packed, positions=torch.tensor([10**6])))
    with torch.no_grad():
        assert tuned(input_ids=packed.input_ids).logits.shape[:2] == packed.input_ids.shape


def test_a_tree_is_not_given_to_an_attention_that_ignores_it():
    packed = pack(cases()["all the same"], CPU, True)
    with pytest.raises(ValueError, match="prefix_tree"):
        negative_log_likelihood(plain("llama"), packed)


@pytest.mark.parametrize(("size", "packs"), [(100_000, 1), (150, 2), (60, 4)])
def test_one_update_of_eight_however_it_is_split(size, packs):
    tuned = adapted("llama")
    examples = (cases()["history kept"] + cases()["history rewritten"])[:8]
    supervised = sum(len(example.reply_ids) for example in examples)
    alone = measured(plain("llama"), (plain_loss(plain("llama"), example) / supervised for example in examples))
    groups = plan_packs(examples, size, True)
    assert len(groups) >= packs
    split = measured(tuned, (negative_log_likelihood(tuned, pack(g, CPU, True)) / supervised for g in groups))
    assert_same(split, alone)


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("size", [16, 128, 100_000])
def test_the_held_out_loss_is_the_mean_over_tokens(share, size):
    tuned = adapted("qwen2")
    conversations = [tuple(cases()["history kept"][:3]), tuple(cases()["history kept"][3:5])]
    examples = [example for conversation in conversations for example in conversation]
    with torch.no_grad():
        total = sum(plain_loss(plain("qwen2"), example).item() for example in examples)
    accelerator = SimpleNamespace(autocast=nullcontext, device=CPU)
    found = mean_loss(tuned, conversations, tokens(size), accelerator, share)
    assert found == pytest.approx(total / sum(len(example.reply_ids) for example in examples), rel=LOSS)
    assert tuned.training


# --- 4 bits ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def in_4bit(tmp_path_factory):
    folder = save_model(tmp_path_factory.mktemp("packing") / "llama", "llama", family("qwen3"))
    base = load_base(folder, Quantization(), "fp32", CPU)
    base.set_attn_implementation(NAME)
    return with_adapter(base)


@pytest.mark.parametrize("size", [64, 100_000])
def test_rows_and_trees_agree_in_4_bits(in_4bit, size):
    # the 4-bit weights are taken back to float32 for every product, so only the order of sums differs
    assert any("Linear4bit" in type(module).__name__ for module in in_4bit.modules())
    examples = cases()["history rewritten"]
    unfuse(in_4bit)
    alone = measured(in_4bit, (plain_loss(in_4bit, example) for example in examples))
    fuse(in_4bit)
    for share in (False, True):
        assert_same(packed_result(in_4bit, examples, size, share), alone)


def test_gradients_survive_an_evaluation_in_4_bits(in_4bit):
    examples = cases()["history kept"]
    before = packed_result(in_4bit, examples, 200, True)
    with torch.no_grad():
        negative_log_likelihood(in_4bit.eval(), pack(examples[:2], CPU, True))
    in_4bit.train()
    assert_same(packed_result(in_4bit, examples, 200, True), before)


# --- the plan and the tree, for any examples -------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(any_examples, st.integers(1, 40), st.booleans())
def test_a_plan_has_the_fewest_packs_of_even_size_and_loses_nothing(examples, limit, share):
    groups = plan_packs(examples, limit, share)
    assert Counter(example for group in groups for example in group) == Counter(examples)
    for group in groups:
        assert pack(group, CPU, share).input_ids.numel() <= limit or len(group) == 1
    filled = plan_by_hand(examples, limit, share)
    assert len(groups) == len(filled)
    together = [pack(group, CPU, share).input_ids.numel() for group in groups if len(group) > 1]
    if share and together:  # as even as they can be: for less in a pack there would have to be more packs
        assert len(plan_by_hand(examples, max(together) - 1, share)) > len(groups)


def plan_by_hand(examples, limit, share):
    """Packs that end where one more example is too much, which is the fewest."""
    order = inputs if share else lambda example: -len(inputs(example))
    groups = []
    for example in sorted(examples, key=order):
        if groups and pack([*groups[-1], example], CPU, share).input_ids.numel() <= limit:
            groups[-1].append(example)
        else:
            groups.append([example])
    return groups


def what_a_token_sees(packed, position):
    """The ids that the token at flat `position` attends to, itself included, in the order of their positions."""
    if packed.tree is None:
        row, column = divmod(position, packed.input_ids.shape[1])
        return tuple(packed.input_ids[row, : column + 1].tolist())
    seen = attended(packed)[position].nonzero().flatten()
    places = packed.position_ids[0, seen]
    assert sorted(places.tolist()) == list(range(len(seen)))  # positions count from the root without a gap
    assert packed.position_ids[0, position] == len(seen) - 1
    return tuple(packed.input_ids[0, seen[places.argsort()]].tolist())


@settings(max_examples=300, deadline=None)
@given(any_examples, st.booleans(), st.integers(1, 12))
def test_every_target_is_predicted_from_its_own_context(examples, share, block):
    with patch("persona.engine.packing.BLOCK", block):
        check_contexts(examples, share)


def check_contexts(examples, share):
    (group,) = plan_packs(examples, 10**6, share)
    packed = pack(group, CPU, share)
    found = Counter(
        (what_a_token_sees(packed, position), target)
        for position, target in zip(packed.positions.tolist(), packed.targets.tolist(), strict=True)
    )
    wanted = Counter(
        ((*example.prompt_ids, *example.reply_ids[:i]), token)
        for example in examples
        for i, token in enumerate(example.reply_ids)
    )
    assert found == wanted


@settings(max_examples=100, deadline=None)
@given(any_examples)
def test_a_tree_computes_no_beginning_twice(examples):
    (group,) = plan_packs(examples, 10**6, True)
    beginnings = {inputs(example)[: i + 1] for example in examples for i in range(len(inputs(example)))}
    assert pack(group, CPU, True).input_ids.numel() == len(beginnings)


def test_the_system_prompt_is_computed_once():
    examples = cases()["history kept"]
    packed = pack(plan_packs(examples, 100_000, True)[0], CPU, True)
    assert packed.input_ids.numel() < 0.6 * sum(len(inputs(example)) for example in examples)
    length = len(render(TALKS[0], chat_format(family("chatml_default")), 1000)[0].prompt_ids) - 20
    first = list(examples[0].prompt_ids[:length])
    ids = packed.input_ids[0].tolist()
    assert sum(ids[i : i + length] == first for i in range(len(ids))) == 1
