"""Replies in batches: the same as alone, whatever the batch, its order, its padding and its interruptions."""

import pytest
import torch
from making.tiny import model as tiny

from persona.config import Generation
from persona.engine.attention import NAME
from persona.errors import DataError
from persona.model.render import chat_format
from persona.speak import batches
from persona.speak.batches import Decoding, Reply, ReplyFile, choose, families, generate, greedy, reply_to_all
from persona.speak.speaker import Speaker, text_of

pytestmark = pytest.mark.usefixtures("one_thread")
STOPS = list(range(0, 500, 25))  # so that some replies of a random model end by themselves
SAMPLED = Decoding(12, 0.9, 0.8, 1.1, 3)


def prompts(count, begin_alike=0, seed=0):
    chance = torch.Generator().manual_seed(seed)
    head = torch.randint(12, 500, (begin_alike,), generator=chance).tolist()
    lengths = torch.randint(1, 40, (count,), generator=chance).tolist()
    return [head + torch.randint(12, 500, (length,), generator=chance).tolist() for length in lengths]


def generated(model, asked, how, batch_size, margin=0.01):
    said = {}
    generate(model, asked, STOPS, how, batch_size, margin, lambda *one: said.update({one[0]: one[1:]}))
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
    "kind", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "gpt2", "opt", "bloom", "mamba", "tree"]
)
def test_a_batch_says_what_each_prompt_alone_would(kind, begin_alike):
    model = tiny("llama" if kind == "tree" else kind).eval()
    if kind == "tree":
        model.set_attn_implementation(NAME)
    asked = prompts(9, begin_alike)
    alone = [by_hand(model, prompt, 12) for prompt in asked]
    for batch_size in (1, 4, 9):
        assert generated(model, asked, greedy(12), batch_size, margin=0.0) == alone
    assert {ended for _, ended in alone} == {True, False} or kind not in ("llama", "tree")


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


def test_rounding_turns_nothing(monkeypatch):
    """Logits of a batch are disturbed as rounding might, many times over: every reply stays the same."""
    model = tiny().eval()
    asked = prompts(6, 60)
    right = {how: generated(model, asked, how, 1) for how in (greedy(12), SAMPLED)}
    original, chance, turned = batches._next, torch.Generator().manual_seed(1), 0

    def disturbed(*args):
        logits, cache = original(*args)
        return logits + (torch.rand(logits.shape, generator=chance) - 0.5) * 0.9, cache

    monkeypatch.setattr(batches, "_next", disturbed)
    for how, alone in right.items():
        assert generated(model, asked, how, 3, margin=1.0) == alone
        turned += generated(model, asked, how, 3, margin=0.0) != alone
    assert turned == 2


def test_prompts_that_begin_alike_share_their_beginning():
    first, second = list(range(50)), list(range(100, 150))
    asked = [[*first, 1], [*second, 1, 2], [*first, 2, 3], [7, 8], [*second, 1, 3, 4], first]
    assert list(families(asked, True)) == [(49, [2, 0, 5]), (51, [4, 1]), (0, [3])]
    assert list(families(asked, False)) == [(0, [4, 1, 2, 0, 5, 3])]


# --- messages in, replies out ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def speaker(tmp_path_factory, chatml):
    model = tiny(vocabulary=len(chatml)).eval()
    return Speaker(model, chat_format(chatml), Generation(), 256, None, "model")


def asking(count):
    return [
        [{"role": "system", "content": "You keep the lamp."}, {"role": "user", "content": f"Who is number {n % 7}?"}]
        for n in range(count)
    ]


def silent(*_):
    pass


def test_replies_come_in_order_with_their_counts(speaker):
    seen = []
    said = reply_to_all(speaker, asking(9), greedy(8), 2, True, None, lambda *told: seen.append(told))
    assert len(said) == 9
    assert said[0] == said[7]
    assert said[1] == said[8]
    assert said[0] != said[1]
    assert all(reply.text == text_of(reply.ids, speaker.fmt) and (len(reply.ids) == 8) != reply.ended for reply in said)
    assert seen[0] == (0, 7, None)
    assert [told[0] for told in seen] == list(range(8))
    assert seen[-1][2] == 0
    assert all(told[2] > 0 for told in seen[1:-1])


def test_what_is_finished_is_not_generated_again(speaker, tmp_path, monkeypatch):
    path = tmp_path / "目录" / "replies.jsonl"
    whole = reply_to_all(speaker, asking(7), greedy(8), 3, True, None, silent)
    counted = []
    original = batches.generate

    def counting(model, missing, *rest):
        counted.append(len(missing))
        original(model, missing, *rest)

    monkeypatch.setattr(batches, "generate", counting)
    with ReplyFile(path, "m") as file:
        reply_to_all(speaker, asking(7)[:4], greedy(8), 3, True, file, silent)
    content = path.read_bytes()
    path.write_bytes(content[:-20])  # killed while it wrote
    for _ in range(2):
        with ReplyFile(path, "m") as file:
            assert reply_to_all(speaker, asking(7), greedy(8), 3, True, file, silent) == whole
    assert counted == [4, 4]
    assert len(path.read_bytes().splitlines()) == 7
    for how, model, adapter in ((greedy(9), "m", True), (greedy(8), "other", True), (greedy(8), "m", False)):
        with ReplyFile(path, model) as file:
            reply_to_all(speaker, asking(1), how, 3, adapter, file, silent)
    assert counted == [4, 4, 1, 1, 1]


def test_an_interrupted_run_has_kept_what_was_finished(speaker, tmp_path):
    path = tmp_path / "replies.jsonl"

    def stop_at_three(done, count, left):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), ReplyFile(path, "m") as file:
        reply_to_all(speaker, asking(7), greedy(8), 2, True, file, stop_at_three)
    assert len(path.read_bytes().splitlines()) == 3


@pytest.mark.parametrize(
    "line", [b"not json", b'{"key": "a"}', b'["a"]', b"\xff\xfe", b'{"key": 1, "text": "", "ids": 5}']
)
def test_a_file_of_something_else_is_refused_by_line(tmp_path, line):
    path = tmp_path / "replies.jsonl"
    with ReplyFile(path, "m") as file:
        file.add("k", Reply("Aye.", (1, 2), True))
    path.write_bytes(path.read_bytes() + line + b"\n")
    with pytest.raises(DataError, match=r"replies\.jsonl:2: not a finished reply.*Delete the file"):
        ReplyFile(path, "m")


def test_a_prompt_that_is_too_long_is_named(speaker):
    asked = [*asking(1), [{"role": "user", "content": "why " * 400}]]
    with pytest.raises(DataError, match="Prompt 2 of 2 cannot be asked: .* over the limit of 192"):
        reply_to_all(speaker, asked, greedy(8), 2, True, None, silent)
