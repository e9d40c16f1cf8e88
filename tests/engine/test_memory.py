"""A full memory: what the failed pass held is free again, sizes go down by halves, and the heaviest pack is known."""

import random
import weakref

import pytest
import torch
from making.kept import Kept
from making.packs import CPU, tokens
from making.tiny import model as tiny

from persona.config import Lora
from persona.engine.attention import NAME
from persona.engine.flash import BLOCKS, FLASH, Choice
from persona.engine.fused import fuse
from persona.engine.loss import negative_log_likelihood
from persona.engine.memory import Full, answer_all, attempt, heaviest_pack
from persona.engine.packing import count_tokens, inputs, pack, plan_packs
from persona.errors import OutOfMemory
from persona.model.loading import add_adapter
from persona.model.render import Example

pytestmark = pytest.mark.usefixtures("one_thread")
FULL = Full("CUDA out of memory.")


def adapted(architecture, words, checkpointing=False, share=True):
    base = tiny(architecture, words, num_hidden_layers=4)
    if checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model = add_adapter(base, Lora(r=4, lora_dropout=0.0), 0, "base")
    if share:
        model.get_base_model().set_attn_implementation(NAME)
    fuse(model)
    return model.train()


def drawn(count, words, seed):
    """Updates of a few examples behind one system prompt: some ask at length, others answer at length."""
    chance = random.Random(seed)
    draw = lambda size: tuple(chance.randrange(words) for _ in range(size))  # noqa: E731
    card, updates = draw(100), []
    for number in range(count):
        asked, answered = ((5, 160), (3, 20)) if number % 3 else ((5, 30), (3, 120))
        examples = chance.randrange(2, 12)
        updates.append(
            [
                Example((*card, *draw(chance.randrange(*asked))), draw(chance.randrange(*answered)))
                for _ in range(examples)
            ]
        )
    return updates


class Canary:
    """An object that lives as long as the graph that holds it."""


class Tap(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, canary):
        ctx.canary = canary
        return x * 1

    @staticmethod
    def backward(ctx, *grads):
        return grads[0], None


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("fails_in", ["forward", "backward"])
def test_the_tensors_and_the_graph_of_a_failed_pass_are_gone(fails_in, checkpointing):
    model = adapted("llama", 512, checkpointing)
    (group,) = plan_packs(drawn(1, 512, 0)[0], 10**6, True)
    graphs = []
    layers = model.get_base_model().model.layers

    def tap(module, args, output):
        graphs.append(weakref.ref(canary := Canary()))
        return Tap.apply(output, canary)

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    layers[0].mlp.register_forward_hook(tap)
    if fails_in == "forward":
        layers[2].register_forward_pre_hook(full)

    def learn():
        loss = negative_log_likelihood(model, pack(group, CPU, True))
        if fails_in == "backward":
            layers[0].register_full_backward_pre_hook(full)
            loss = negative_log_likelihood(model, pack(group, CPU, True))
        loss.backward()

    with Kept() as kept:
        result = attempt(learn, CPU)
        for weight in model.parameters():
            weight.grad = None
        assert isinstance(result, Full)
        assert result.reason == "CUDA out of memory. Tried to allocate 2.00 GiB."
        assert graphs
        assert [graph() for graph in graphs] == [None] * len(graphs)
        assert kept.bytes == 0


def test_a_refusal_of_the_real_allocator_is_a_full_memory():
    full = attempt(lambda: torch.empty(2**50, dtype=torch.uint8), CPU)
    assert isinstance(full, Full)
    assert "memory" in full.reason


def test_other_errors_are_not_called_a_full_memory():
    with pytest.raises(RuntimeError, match="illegal memory access"):
        attempt(lambda: (_ for _ in ()).throw(RuntimeError("CUDA error: an illegal memory access")), CPU)


def test_sizes_go_down_by_halves_until_the_work_is_less():
    said = []
    limit = tokens(4096, said)
    limit.halve(FULL, 4000, None)
    assert limit.size == 2048
    limit.halve(FULL, 700, None)  # 1,024 would give the same pack again
    assert limit.size == 512
    assert limit.halved
    assert said[0].startswith("  The memory is full (CUDA out of memory.): going on with packs of 2048 tokens")
    assert len(said) == 2
    with pytest.raises(OutOfMemory, match=r"with a single example of 300 tokens\. Take a smaller model\.") as refused:
        limit.halve_pack(FULL, [Example(tuple(range(299)), (1, 2))], True)
    assert refused.value.exit_code == 5
    for size in (256, 128, 64, 32, 16):
        limit.halve(FULL, 600, None)
        assert limit.size == size
    with pytest.raises(OutOfMemory):
        limit.halve(FULL, 600, None)


def test_what_is_left_is_asked_in_halves():
    asked, finished = [], set()
    limit = tokens(8)
    limit.least = 1

    def ask(numbers, at_once):
        asked.append((list(numbers), at_once))
        finished.add(numbers[0])
        if at_once > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        finished.update(numbers)

    answer_all(ask, lambda: [number for number in range(5) if number not in finished], limit, CPU)
    assert asked == [([0, 1, 2, 3, 4], 8), ([1, 2, 3, 4], 4), ([2, 3, 4], 2)]
    asked.clear()
    finished.clear()
    with pytest.raises(OutOfMemory, match="a single reply"):
        answer_all(full_memory, lambda: [1, 2], limit, CPU)


def full_memory(*_):
    raise MemoryError


def peak_of(model, group, share):
    """The most bytes that exist at a time while `model` learns from a pack."""

    class Peak(Kept):
        most = 0

        def _count(self, storage):
            super()._count(storage)
            self.most = max(self.most, self.bytes)

    with Peak() as peak:
        negative_log_likelihood(model, pack(group, CPU, share, 512)).backward()
    for weight in model.parameters():
        weight.grad = None
    return peak.most


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("architecture", "share", "words"),
    [("llama", True, 512), ("qwen3", True, 20_000), ("llama", False, 8_000), ("gpt2", False, 20_000)],
)
def test_the_heaviest_pack_on_paper_is_the_heaviest_in_memory(architecture, share, words, checkpointing):
    """Within 5 %; the pack with most tokens takes half of the memory of the heaviest if many others are learned."""
    model = adapted(architecture, words, checkpointing, share)
    updates = drawn(12, words, 1)
    group = heaviest_pack(model, updates, 10**6, share)
    groups = [one for examples in updates for one in plan_packs(examples, 10**6, share)]
    assert len(groups) == 12
    assert group in groups
    peaks = [peak_of(model, one, share) for one in groups]
    assert peaks[groups.index(group)] > 0.95 * max(peaks)
    if words == 20_000:
        longest = max(groups, key=lambda one: count_tokens(one, share))
        assert peaks[groups.index(longest)] < 0.7 * max(peaks)


@pytest.mark.parametrize("form", [BLOCKS, FLASH])
def test_scores_are_counted_for_blocks_alone(form, monkeypatch):
    """One example of 600 tokens keeps more scores than twenty of 120, and all else of it is less."""
    monkeypatch.setattr("persona.engine.memory.form_of_model", lambda _: Choice(form, "planted"))
    model = adapted("llama", 512, checkpointing=True)
    short = [Example((*range(100), 200 + number), (1,) * 20) for number in range(20)]
    long = [Example(tuple(range(600)), (5,))]
    assert heaviest_pack(model, [short, long], 10**6, True) == (long if form == BLOCKS else short)


@pytest.mark.parametrize("share", [True, False])
def test_the_tokens_of_a_pack_are_counted(share):
    for examples in drawn(5, 512, 2):
        for group in plan_packs(examples, 600, share):
            if not share:
                group.sort(key=lambda example: -len(inputs(example)))
            assert count_tokens(group, share) == pack(group, CPU, share).input_ids.numel()
