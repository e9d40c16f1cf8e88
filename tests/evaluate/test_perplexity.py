"""Perplexity does not depend on the layout, base and tuned are one model, and the intervals hold what they promise."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from making.packs import tokens
from making.runs import conversations, write_jsonl
from making.tiny import family, model
from scipy import stats

import persona.evaluate.perplexity
from persona.config import Lora
from persona.engine.attention import NAME
from persona.engine.loss import negative_log_likelihood, token_losses
from persona.engine.packing import inputs, pack
from persona.evaluate.intervals import LEAST, mapped, ratio, share
from persona.evaluate.perplexity import Losses, conversation_losses, example_losses, score_of, shared_beginnings
from persona.model.dataset import render_records
from persona.model.loading import add_adapter
from persona.model.render import chat_format
from persona.records import read_records
from persona.train.loop import mean_loss

pytestmark = pytest.mark.usefixtures("one_thread")
SYSTEM = "You keep the lamp. You speak in short sentences, and you never explain the joke."
ARCHITECTURES = ("llama", "qwen3", "gemma2", "gpt2")


def silent(*_):
    pass


@pytest.fixture(scope="module")
def fmt():
    return chat_format(family("chatml_default"))


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("score") / "val.jsonl", conversations(9, turns=2))


@pytest.fixture(scope="module")
def dataset(file, fmt):
    return render_records(read_records(file), fmt, SYSTEM, 512)


def adapted(fmt, architecture="llama", fresh=False):
    """A model with an adapter whose second half is zero when it is `fresh`, as before the first update."""
    made = add_adapter(model(architecture, len(fmt.tokenizer)), Lora(r=4, lora_dropout=0.1), 0, "tiny")
    if not fresh:
        chance = torch.Generator().manual_seed(1)
        for name, weight in made.named_parameters():
            if "lora_B" in name:
                weight.data.copy_(torch.randn(weight.shape, generator=chance) * 0.3)
    return made


def by_hand(model, dataset):
    """The definition: one example after the other, the whole text in, the log-probabilities of the reply out."""
    model.eval()
    found = []
    for conversation in dataset.conversations:
        nats = 0.0
        for example in conversation:
            ids = torch.tensor([[*example.prompt_ids, *example.reply_ids]])
            with torch.no_grad():
                logs = model(input_ids=ids).logits[0].float().log_softmax(-1)
            begin = len(example.prompt_ids)
            nats -= sum(logs[begin + i - 1, token].item() for i, token in enumerate(example.reply_ids))
        found.append(nats)
    return found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_it_is_the_plain_loop_whatever_the_layout(architecture, fmt, dataset):
    made = adapted(fmt, architecture)
    right = by_hand(made, dataset)
    with made.disable_adapter():
        right_base = by_hand(made, dataset)
    assert sum(right) != pytest.approx(sum(right_base), rel=1e-3)
    shared = []
    for size in (1, 300, 4096):
        for rows in (True, False):
            with shared_beginnings(made, dataset.examples, tokens(size), "fp32") as share:
                shared.append(share)
                losses = conversation_losses(made, dataset, tokens(size), "fp32", share and not rows, silent)
            assert losses.tuned == pytest.approx(right, rel=1e-5)
            assert losses.base == pytest.approx(right_base, rel=1e-5)
    assert shared == [architecture in ("llama", "qwen3", "gemma2")] * 6
    assert made.config._attn_implementation != NAME


def test_it_is_the_loss_that_training_measures(fmt, dataset):
    made = adapted(fmt)
    losses = conversation_losses(made, dataset, tokens(512), "fp32", False, silent)
    supervised = sum(len(example.reply_ids) for example in dataset.examples)
    trained = mean_loss(made, dataset.conversations, tokens(300), Accelerator(cpu=True), False)
    assert sum(losses.tuned) / supervised == pytest.approx(trained, rel=1e-5)


def test_in_bfloat16_it_is_the_loss_that_training_measures_too(fmt, dataset):
    made = adapted(fmt)
    made.get_base_model().to(torch.bfloat16)
    accelerator = Accelerator(cpu=True)
    ours = sum(example_losses(made, dataset.examples, tokens(300), "bf16", False))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        trained = mean_loss(made, dataset.conversations, tokens(300), accelerator, False)
    assert ours / sum(len(example.reply_ids) for example in dataset.examples) == pytest.approx(trained, rel=1e-5)


@pytest.mark.parametrize("share", [True, False])
def test_a_fresh_adapter_changes_nothing(fmt, dataset, file, share):
    made = adapted(fmt, fresh=True)
    with shared_beginnings(made, dataset.examples, tokens(2048), "fp32") as can:
        losses = conversation_losses(made, dataset, tokens(2048), "fp32", share and can, silent)
    found = score_of(file, "held_out", dataset, losses, 0, "fp32")
    assert found.score.base is not None
    assert found.score.tuned.perplexity.value == pytest.approx(found.score.base.perplexity.value, rel=1e-6)
    assert found.ratio is not None
    assert (found.ratio.value, found.ratio.low, found.ratio.high) == pytest.approx((1, 1, 1), rel=1e-6)


def test_the_figures_are_what_they_say(fmt, dataset, file):
    losses = conversation_losses(adapted(fmt), dataset, tokens(2048), "fp32", False, silent)
    found = score_of(file, "control", dataset, losses, 0, "fp32")
    supervised = sum(len(example.reply_ids) for example in dataset.examples)
    characters = sum(len(m["content"]) for r in dataset.records for m in r.turns if m["role"] == "assistant")
    assert (found.tokens, found.characters, found.conversations) == (supervised, characters, 9)
    assert found.score.tuned.perplexity.value == pytest.approx(math.exp(sum(losses.tuned) / supervised))
    bits = sum(losses.tuned) / math.log(2) / characters
    assert found.score.tuned.bits_per_character.value == pytest.approx(bits)
    assert found.ratio is not None
    assert found.score.base is not None
    apart = found.score.tuned.perplexity.value / found.score.base.perplexity.value
    assert found.ratio.value == pytest.approx(apart)
    assert found.ratio.low < found.ratio.value < found.ratio.high


def test_what_both_sides_find_hard_does_not_widen_the_ratio(dataset, file):
    tokens = [sum(len(example.reply_ids) for example in examples) for examples in dataset.conversations]
    base = [(3 + number % 3) * count for number, count in enumerate(tokens)]
    tuned = [nats - 0.5 * count for nats, count in zip(base, tokens, strict=True)]
    found = score_of(file, "held_out", dataset, Losses(tuned, base), 0, "fp32")
    assert found.score.tuned.perplexity.high > 1.5 * found.score.tuned.perplexity.low
    assert (found.ratio.low, found.ratio.high) == pytest.approx((math.exp(-0.5),) * 2, rel=1e-6)


def test_without_an_adapter_there_is_one_side(fmt, dataset, file):
    losses = conversation_losses(model("llama", len(fmt.tokenizer)), dataset, tokens(2048), "fp32", False, silent)
    found = score_of(file, "held_out", dataset, losses, 0, "fp32")
    assert (losses.base, found.score.base, found.ratio) == (None, None, None)


@pytest.mark.parametrize("share", [True, False])
def test_when_the_memory_is_full_the_rest_is_measured_in_halves(fmt, dataset, share, monkeypatch):
    made, said, sizes = adapted(fmt), [], []
    measured = persona.evaluate.perplexity.token_losses

    def small(model, packed):
        sizes.append(packed.input_ids.numel())
        if len(sizes) > 1 and sizes[-1] > 250:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return measured(model, packed)

    with shared_beginnings(made, dataset.examples, tokens(500), "fp32") as can:
        assert can
        right = conversation_losses(made, dataset, tokens(500), "fp32", share, silent)
        monkeypatch.setattr(persona.evaluate.perplexity, "token_losses", small)
        told, limit = [], tokens(500, said)
        losses = conversation_losses(made, dataset, limit, "fp32", share, lambda *values: told.append(values[0]))
    assert max(sizes) > 250
    assert len(said) == 1
    assert limit.size == 250
    assert losses.tuned == pytest.approx(right.tuned, rel=1e-5)
    assert losses.base == pytest.approx(right.base, rel=1e-5)
    assert told == sorted(told)
    assert told[-1] == 2 * len(dataset.examples)


def test_progress_reaches_the_end(fmt, dataset):
    said = []
    conversation_losses(adapted(fmt), dataset, tokens(300), "fp32", False, lambda *values: said.append(values))
    total = 2 * len(dataset.examples)
    assert said[0] == (0, total, None)
    assert said[-1] == (total, total, 0)
    assert [done for done, _, _ in said] == sorted(done for done, _, _ in said)


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_the_losses_of_the_tokens_add_up(architecture, fmt, dataset):
    made = adapted(fmt, architecture).eval()
    packed = pack(dataset.examples[:3], torch.device("cpu"), False)
    each = token_losses(made, packed)
    assert each.shape == packed.targets.shape
    assert each.sum().item() == pytest.approx(negative_log_likelihood(made, packed).item(), rel=1e-6)
    assert not each.requires_grad
    example = dataset.examples[0]
    ids = torch.tensor([inputs(example)])
    with torch.no_grad():
        logs = made(input_ids=ids).logits[0].float().log_softmax(-1)[-len(example.reply_ids) :]
    expected = -logs.gather(1, torch.tensor(example.reply_ids)[:, None])[:, 0]
    alone = token_losses(made, pack([example], torch.device("cpu"), False))
    assert torch.allclose(alone, expected, rtol=1e-5)


# --- intervals -------------------------------------------------------------------------------------------------------


def drawn(chance, count, shape):
    """Sums of losses and numbers of tokens of `count` conversations; the mean loss per token is 3.0."""
    tokens = chance.integers(1, 5, count) * chance.integers(20, 90, count).astype(float)
    level = 3 + chance.normal(0, 0.5, count) if shape == "normal" else 2 + chance.gamma(4, 0.25, count)
    return level * tokens, tokens


@pytest.mark.parametrize("shape", ["normal", "skewed"])
def test_the_interval_covers_the_truth(shape):
    chance = np.random.default_rng(2)
    inside = 0
    for trial in range(100):
        found = mapped(ratio(*drawn(chance, 30, shape), trial), math.exp)
        inside += found.low <= math.exp(3) <= found.high
    assert 93 <= inside <= 99


def test_the_interval_is_the_same_for_a_seed_and_for_the_order_of_magnitude():
    nats, tokens = drawn(np.random.default_rng(0), 30, "normal")
    assert ratio(nats, tokens, 1) == ratio(nats, tokens, 1)
    assert ratio(nats, tokens, 1) != ratio(nats, tokens, 2)
    small, large = ratio(nats, tokens, 1), ratio(nats * 1e6, tokens, 1)
    assert large.low == pytest.approx(small.low * 1e6)


def test_too_few_conversations_have_no_interval():
    few = ratio([3.0] * (LEAST - 1), [1.0] * (LEAST - 1), 0)
    assert (few.value, few.low, few.high) == (3.0, None, None)
    assert ratio([3.0], [1.0], 0).value == 3.0
    assert mapped(few, math.exp).high is None
    assert ratio([1.0, 2.0, 3.0, 2.0, 2.5], [1.0] * 5, 0).high is not None


def test_figures_that_are_all_alike_have_an_interval_of_no_width():
    alike = ratio([2.0] * 12, [2.0] * 12, 0)  # as base and tuned under a fresh adapter
    assert (alike.low, alike.value, alike.high) == (1.0, 1.0, 1.0)


def test_a_share_stays_a_share():
    shares = share([1.0] * 9 + [0.0], [1.0] * 10, 0)
    assert shares.value == 0.9
    assert 0 <= shares.low < 0.9 < shares.high <= 1


def test_a_file_keeps_its_name_and_hash(fmt, dataset, file):
    losses = conversation_losses(adapted(fmt), dataset, tokens(2048), "fp32", False, silent)
    other = Path(file.parent / "灯 塔.jsonl")
    other.write_bytes(file.read_bytes())
    one, two = (score_of(path, "held_out", dataset, losses, 0, "fp32") for path in (file, other))
    assert (two.file, two.precision) == (f"{file.parent.name}/灯 塔.jsonl", "fp32")
    assert two.sha256 == one.sha256
    assert replace(two, file=one.file) == one


@pytest.mark.parametrize("count", [LEAST, 17, 200])
def test_all_or_nothing_in_a_few_is_not_certain(count):
    none, all_of_them = share([0] * count, [12] * count, 0), share([12] * count, [12] * count, 0)
    assert (none.value, none.low) == (0.0, 0.0)
    assert none.high == pytest.approx(stats.binomtest(0, count).proportion_ci(method="wilson").high)
    assert (all_of_them.value, all_of_them.high) == (1.0, 1.0)
    assert all_of_them.low == pytest.approx(1 - none.high)
    assert share([0.0] * count, [1.0] * count, 0) == none
