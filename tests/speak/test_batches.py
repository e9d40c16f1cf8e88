"""Replies in batches: the same as alone, whatever the batch, its order, its padding and its precision."""

from itertools import pairwise

import pytest
import torch
from making.pretended_gpu import PretendedGpu
from making.tiny import model as tiny
from making.tiny import save_model

from persona.config import Lora, Quantization
from persona.engine import fused
from persona.engine.attention import NAME
from persona.model.loading import add_adapter, load_base
from persona.speak import batches, past
from persona.speak.batches import generate, measure
from persona.speak.choices import Decoding, choose, greedy
from persona.speak.past import Past, own_past, read
from persona.speak.rounding import LEAST, LOOSE, MOST, ONE_BY_ONE, WIDTH, Rounding, with_margin

pytestmark = pytest.mark.usefixtures("one_thread")
STOPS = list(range(0, 500, 25))  # so that some replies of a random model end by themselves
SAMPLED = Decoding(12, 0.9, 0.8, 1.1, 3)
WITH_MARGIN = Rounding(0.001, 0.01, None)


def prompts(count, begin_alike=0, seed=0):
    chance = torch.Generator().manual_seed(seed)
    head = torch.randint(12, 500, (begin_alike,), generator=chance).tolist()
    lengths = torch.randint(1, 40, (count,), generator=chance).tolist()
    return [head + torch.randint(12, 500, (length,), generator=chance).tolist() for length in lengths]


def generated(model, asked, how, batch_size, rounding=WITH_MARGIN):
    said = {}
    generate(model, asked, STOPS, how, batch_size, rounding, lambda *one: said.update({one[0]: one[1:]}))
    assert len(said) == len(asked)
    return [said[number] for number in range(len(asked))]


def by_hand(model, prompt, limit):
    """Greedy, one full pass for each token."""
    ids = list(prompt)
    while len(ids) < len(prompt) + limit:
        with torch.no_grad():
            token = int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        if token in STOPS:
            return tuple(ids[len(prompt) :]), True
        ids.append(token)
    return tuple(ids[len(prompt) :]), False


@pytest.mark.parametrize("begin_alike", [0, 60])
@pytest.mark.parametrize(
    "kind",
    [
        *("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "gemma4_text", "gpt_oss", "deepseek_v3"),
        *(
            "qwen3_5_text",
            "qwen3_next",
            "lfm2",
            "qwen3_moe",
            "gpt2",
            "opt",
            "bloom",
            "mamba",
            "llama tree",
            "gemma2 tree",
            "gpt_oss tree",
        ),
    ],
)
def test_a_batch_says_what_each_prompt_alone_would(kind, begin_alike):
    model = tiny(kind.split()[0], pad_token_id=None).eval()
    if kind.endswith("tree"):
        model.set_attn_implementation(NAME)
    asked = prompts(9, begin_alike)
    alone = [by_hand(model, prompt, 12) for prompt in asked]
    for batch_size in (1, 4, 9):
        assert generated(model, asked, greedy(12), batch_size, LOOSE) == alone
    assert {ended for _, ended in alone} == {True, False} or not kind.startswith("llama")


def test_order_and_company_change_nothing_drawn_at_random():
    model = tiny().eval()
    asked = prompts(9, 60)
    drawn = generated(model, asked, SAMPLED, 1)
    assert generated(model, asked, SAMPLED, 4) == drawn
    assert generated(model, asked[::-1], SAMPLED, 3)[::-1] == drawn
    assert generated(model, asked[2:4], SAMPLED, 2) == drawn[2:4]
    assert generated(model, asked, Decoding(12, 0.9, 0.8, 1.1, 4), 4) != drawn


def test_the_model_and_the_random_state_are_left_as_they_were():
    model = tiny().train()
    before = torch.get_rng_state()
    generated(model, prompts(3), SAMPLED, 2)
    assert model.training
    assert torch.get_rng_state().equal(before)


def test_draws_follow_the_probabilities():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -9.0])
    chance, drawn = torch.Generator().manual_seed(0), torch.zeros(5)
    for _ in range(4000):
        noise = -torch.empty(5).exponential_(generator=chance).log()
        drawn[choose(logits, noise, Decoding(1, 0.7, 0.9, 1.0, 0), 0.0)[0]] += 1
    likely = torch.softmax(logits / 0.7, 0)
    inside = torch.where(likely.cumsum(0) - likely < 0.9, likely, 0)  # they are in order
    assert (inside > 0).tolist() == [True, True, False, False, False]
    assert torch.allclose(drawn / 4000, inside / inside.sum(), atol=0.03)


def test_a_choice_that_rounding_could_turn_is_not_sure():
    near, far = torch.tensor([1.0, 1.005, 0.0]), torch.tensor([1.0, 2.0, 0.0])
    once = greedy(1)
    assert choose(near, None, once, 0.01) == (1, False)
    assert choose(near, None, once, 0.0) == (1, True)
    assert choose(far, None, once, 0.01) == (1, True)
    drawn = Decoding(1, 1.0, 0.5, 1.0, 0)
    noise = torch.tensor([0.0, 3.0, 0.0])
    # the second has just over, or just under, half ahead of it: whether it counts depends on rounding
    edge = torch.tensor([0.501, 0.3, 0.199]).log()
    assert choose(edge, noise, drawn, 0.0) == (0, True)
    assert choose(edge, noise, drawn, 0.01)[1] is False


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_rounding_turns_nothing(kind, monkeypatch):
    """Logits of a batch are disturbed as rounding might, many times over: every reply stays the same."""
    model = tiny(kind).eval()
    asked = prompts(6, 60)
    right = {how: generated(model, asked, how, 1) for how in (greedy(12), SAMPLED)}
    steps, following, chance, turned = batches._steps, batches._next, torch.Generator().manual_seed(1), 0

    def disturbed(logits):
        return logits + (torch.rand(logits.shape, generator=chance) - 0.5) * 0.9

    def disturbed_next(*args):
        logits, cache = following(*args)
        return disturbed(logits), cache

    monkeypatch.setattr(batches, "_steps", lambda *args: [disturbed(logits) for logits in steps(*args)])
    monkeypatch.setattr(batches, "_next", disturbed_next)
    for how, alone in right.items():
        assert generated(model, asked, how, 3, Rounding(0.25, 1.0, None)) == alone
        turned += generated(model, asked, how, 3, LOOSE) != alone
    assert turned


# --- 16 bits, in which a batch rounds otherwise -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2", "gemma3_text", "qwen3_moe"])
def test_no_reply_depends_on_the_batch_in_any_precision(kind, dtype):
    model = tiny(kind).eval().to(dtype)
    asked = prompts(9, 140)
    rounding = measure(model, asked, 12)
    for how in (greedy(12), SAMPLED):
        alone = [generated(model, [prompt], how, 1, rounding)[0] for prompt in asked]
        assert generated(model, asked, how, 8, rounding) == alone
        assert generated(model, asked[::-1], how, 4, rounding)[::-1] == alone
    if dtype == torch.float32:
        assert (rounding.rows, rounding.margin) == (None, LEAST)
    else:
        assert rounding == (ONE_BY_ONE if kind == "qwen3_moe" else Rounding(0.0, 0.0, WIDTH))


def test_in_16_bits_nothing_is_chosen_again_and_in_a_padded_batch_replies_did_depend_on_it(monkeypatch):
    model = tiny().eval().to(torch.bfloat16)
    asked = prompts(24, 60)
    rounding = measure(model, asked, 12)
    assert generate(model, asked, STOPS, SAMPLED, 8, rounding, lambda *_: None) == 0
    monkeypatch.setattr(batches, "why_not", lambda *_: "a test")
    assert generated(model, asked, greedy(12), 8, LOOSE) != generated(model, asked, greedy(12), 1, LOOSE)


@pytest.mark.parametrize("batch_size", [1, 5, 8, 11])
def test_in_16_bits_every_step_has_the_same_number_of_rows(batch_size, monkeypatch):
    """A tiny model's products come out the same for any number; those of a real one do not."""
    rows, behind = [], batches.logits_behind

    def counting(model, ids, pasts):
        rows.append((len(ids), len(pasts)))
        return behind(model, ids, pasts)

    monkeypatch.setattr(batches, "logits_behind", counting)
    generated(tiny().eval().to(torch.bfloat16), prompts(11), greedy(4), batch_size, Rounding(0.0, 0.0, WIDTH))
    assert set(rows) == {(WIDTH, WIDTH)}


@pytest.mark.parametrize("kind", ["qwen3", "gemma3_text"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_is_read_is_the_same_bits_wherever_reading_began(dtype, kind, monkeypatch):
    """Passes over a row alone continue those over its prompt and over a shared beginning; nothing may show it."""
    monkeypatch.setattr(past, "CHUNK", 16)
    model = tiny(kind).eval().to(dtype)
    ids = torch.randint(12, 500, (75,), generator=torch.Generator().manual_seed(0)).tolist()
    with torch.no_grad(), own_past(model):
        whole = {end: read(model, Past(), ids[:end]) for end in range(1, 76)}
        kept = Past()
        for end in (15, 16, 17, 31, 33, 47, 48, 49, 75):
            kept.tokens = past.whole_chunks(min(kept.tokens, end - 1))
            assert read(model, kept, ids[:end]).equal(whole[end]), end
        for start in range(0, 75):
            read(model, before := Past(), [*ids[:start], 3])
            own = batches._beginning(([*ids[:start], 3], before), ids)
            assert own.tokens == (start + (ids[start] == 3)) // 16 * 16
            assert read(model, own, ids).equal(whole[75]), start
        row = batches._Row(0, ids[:20], [], None, 60, Past(), Past())
        read(model, row.past, row.prompt)
        for token in ids[20:]:
            row.reply.append(token)
            batches._steps(model, [(token, row.past)], None)
            if token % 3:  # not every choice is near
                assert batches._read_alone(model, row).equal(whole[20 + len(row.reply)])


def test_a_device_whose_rows_depend_on_their_company_is_noticed(monkeypatch):
    """By a little, and choices are made again; by more, and it is one reply at a time; the replies stay the same."""
    asked, behind = prompts(9, 60), batches.logits_behind
    for noise, dtype in ((0.004, torch.float32), (0.004, torch.bfloat16), (0.5, torch.float32), (0.5, torch.bfloat16)):
        model = tiny().eval().to(dtype)

        def disturbed(model, ids, pasts, noise=noise):
            company = [row for row in pasts if row is not None]
            logits = behind(model, ids, pasts)
            if len(company) == 1:
                return logits
            chance = torch.Generator().manual_seed(sum(row.tokens for row in company))
            return logits + (torch.rand(logits.shape, generator=chance) - 0.5) * noise

        monkeypatch.setattr(batches, "logits_behind", disturbed)
        rounding = measure(model, asked, 12)
        if noise > 0.1:
            assert (rounding.margin, rounding.rows) == (0, 1)
        elif dtype == torch.float32:
            assert rounding.rows is None
            assert 0.004 < rounding.margin < 0.01
        alone = [generated(model, [prompt], SAMPLED, 1, rounding)[0] for prompt in asked]
        assert generated(model, asked, SAMPLED, 8, rounding) == alone


def test_the_margin_is_four_times_the_difference_between_its_bounds():
    assert with_margin(0.0) == Rounding(0.0, LEAST, None)
    assert with_margin(0.01) == Rounding(0.01, 0.04, None)
    assert with_margin(MOST / 4) == Rounding(MOST / 4, MOST, None)
    assert with_margin(MOST / 3.9) == Rounding(MOST / 3.9, 0.0, 1)


@pytest.mark.parametrize("window", [1, 16, 127, 128, 129, 4096])
def test_a_past_is_read_as_far_as_the_window_reaches(window):
    model = tiny("mistral", sliding_window=window).eval()
    ids = prompts(1, 260)[0]
    with torch.no_grad():
        right = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
        with own_past(model):
            torch.testing.assert_close(read(model, row := Past(), ids[:200]), read(model, Past(), ids[:200]))
            logits = read(model, row, ids)
    torch.testing.assert_close(logits, right, rtol=1e-4, atol=1e-4)


def test_positions_that_are_others_in_long_rows_hold_short_rows_and_take_long_ones_alone(monkeypatch):
    rows, reply = [], batches._reply
    monkeypatch.setattr(batches, "_reply", lambda work, some: rows.append(len(some)) or reply(work, some))
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 1.0,
        "short_factor": [1.0] * 8,
        "long_factor": [3.0] * 8,
    }
    model = (
        tiny("phi3", pad_token_id=None, original_max_position_embeddings=64, rope_parameters=rope)
        .eval()
        .to(torch.bfloat16)
    )
    asked = [*prompts(4), *prompts(4, 60)]
    rounding = measure(model, asked, 12)
    assert rounding == Rounding(0.0, 0.0, WIDTH)
    own, padded = batches._ways(model, asked, 12)
    assert own == [0, 1, 2, 3]
    assert padded == [4, 5, 6, 7]
    alone = [generated(model, [prompt], greedy(12), 1, rounding)[0] for prompt in asked]
    assert generated(model, asked, greedy(12), 8, rounding) == alone
    assert rows == [1] * 8
    assert measure(model, asked[4:], 12) == ONE_BY_ONE
    generated(model, asked[4:], greedy(12), 8, ONE_BY_ONE)
    assert rows == [1] * 12


def test_the_place_of_a_finished_reply_is_taken_and_beginnings_are_read_once(monkeypatch):
    model = tiny().eval()
    asked = prompts(9, 260)
    tokens, rows, behind = [], [], batches.logits_behind

    def counting(model, ids, pasts):
        (rows if len(ids[0]) == 1 else tokens).append(len(ids) * len(ids[0]))
        return behind(model, ids, pasts)

    monkeypatch.setattr(batches, "logits_behind", counting)
    monkeypatch.setattr(past, "logits_behind", counting)
    said = generated(model, asked, greedy(12), 4, LOOSE)
    assert sum(tokens) < 256 + sum(len(prompt) - 256 for prompt in asked) + 1
    assert sum(rows) == sum(len(ids) + ended - 1 for ids, ended in said)
    assert all(count == 4 for count, _ in list(pairwise(rows))[: len(rows) // 2])


def test_attention_is_put_back_after_a_fault():
    model = tiny().eval()

    def fault(*_):
        raise KeyboardInterrupt

    before = model.config._attn_implementation
    with pytest.raises(KeyboardInterrupt):
        generate(model, prompts(3), STOPS, greedy(2), 2, LOOSE, fault)
    assert model.config._attn_implementation == before


# --- on a pretended GPU -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "llama", vocab_size=512)


def adapted(folder, precision, device):
    """The model in 4 bits with an adapter that changes something."""
    base = load_base(folder, Quantization(load_in_4bit=True), precision, torch.device(device))
    tuned = add_adapter(base, Lora(r=8, lora_alpha=16, lora_dropout=0.1), 0, "tiny").eval()
    for name, weight in tuned.named_parameters():
        if "lora_B" in name:
            weight.data.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(name))) * 0.05)
    return tuned


@pytest.mark.parametrize("fuse", [False, True])
def test_on_a_gpu_a_batch_in_4_bits_changes_no_reply_and_mixes_no_devices(folder, fuse, monkeypatch):
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # the modes belong to one thread
    with PretendedGpu() as gpu:
        model = adapted(folder, "bf16", "cuda")
        if fuse:
            fused.fuse(model)
        asked = prompts(9, 140)
        rounding = measure(model, asked, 12)
        assert rounding == Rounding(0.0, 0.0, WIDTH)
        alone = [generated(model, [prompt], SAMPLED, 1, rounding)[0] for prompt in asked]
        assert generated(model, asked, SAMPLED, 8, rounding) == alone
    assert gpu.mixes == []


def test_on_a_gpu_few_rows_take_the_kernel_of_bitsandbytes(folder, monkeypatch):
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")
    dequantized, original = [], fused._frozen
    monkeypatch.setattr(fused, "_frozen", lambda *args: dequantized.append(1) or original(*args))
    with PretendedGpu():
        model = adapted(folder, "fp32", "cuda")
        fused.fuse(model)
        few, many = torch.arange(12, 76, device="cuda")[None], torch.arange(12, 77, device="cuda")[None]
        with torch.no_grad():
            by_kernel = model(input_ids=few).logits.cpu()
            assert not dequantized
            model(input_ids=many)
            assert dequantized
        by_matrix = model(input_ids=few).logits.detach().cpu()  # with a gradient
        with torch.no_grad(), model.disable_adapter():
            apart = (model(input_ids=few).logits.cpu() - by_matrix).abs().max()
    assert apart > 0.1
    assert torch.allclose(by_kernel, by_matrix, atol=1e-4)
