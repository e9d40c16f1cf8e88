"""Examples with much, little and nothing in common, and the loss and gradients that a layout of them must give."""

import random
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from making.tiny import family

from persona.config import Lora
from persona.engine.loss import negative_log_likelihood
from persona.engine.memory import Limit
from persona.engine.packing import pack, plan_packs
from persona.model.loading import add_adapter
from persona.model.render import Example, chat_format, render

CPU = torch.device("cpu")

LOSS, GRADIENT = 1e-6, 1e-5  # relative, in float32


def talk(*texts):
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return [{"role": "system", "content": "You are Tamsin, keeper of the lighthouse."}, *turns]


TALKS = [
    talk("Who?", "Only me.", "Say it twice.", "Me, and me.", "And the fog?", "I ring the bell."),
    talk("Who?", "Nobody, at this hour.", "Say it twice.", "Nobody. Nobody."),
    talk("What do you do all day?", "Oil the lamp."),
    talk("你是谁？", "我是灯塔的看守人。"),
    talk("What do you do all night?", "Count the ships that answer, and the ones that do not."),
]


def tokens(size, said=None):
    """A limit of packs of `size` tokens, which appends its lines to the list `said`."""
    report = print if said is None else said.append
    return Limit(
        "evaluation.max_tokens_per_pack", size, size, 16, "packs of {} tokens", "Take a smaller model.", report
    )


def rendered(name):
    fmt = chat_format(family(name))
    return [example for messages in TALKS for example in render(messages, fmt, 1000)]


def random_examples():
    """Examples that have nothing in common, not even the first token."""
    chance = random.Random(0)
    examples = []
    for first in range(7):
        prompt = [first, *(chance.randrange(10, 500) for _ in range(chance.randrange(5, 40)))]
        examples.append(Example(tuple(prompt), tuple(chance.randrange(10, 500) for _ in range(chance.randrange(1, 9)))))
    return examples


@cache
def cases():
    keeps = rendered("chatml_default")
    start = keeps[0]
    return {
        "history kept": keeps,
        "history rewritten": rendered("qwen3"),
        "nothing in common": random_examples(),
        "all the same": [start] * 4,
        # one position with several targets, and prompts that end within a reply
        "reply begins another reply": [
            Example(start.prompt_ids, (7, 8, 2)),
            Example(start.prompt_ids, (7, 8, 9, 2)),
            Example(start.prompt_ids, (7, 8, 9, 10, 2)),
            Example((*start.prompt_ids, 7, 8), (9, 2)),
            Example(start.prompt_ids, (2,)),
        ],
    }


def with_adapter(base):
    """`base` with an adapter whose two halves are both random, so that every gradient differs from zero."""
    tuned = add_adapter(base, Lora(r=4, lora_dropout=0.0), seed=0, base_name="tiny")
    torch.manual_seed(1)
    for name, weight in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    return tuned.train()


def measured(tuned, losses):
    """Sum of `losses` and the gradients they leave; each loss is computed only when its turn comes."""
    tuned.zero_grad()
    total = 0.0
    for loss in losses:
        loss.backward()
        total += loss.item()
    return total, {name: w.grad.clone() for name, w in tuned.named_parameters() if w.requires_grad}


def plain_loss(tuned, example):
    """The oracle: the whole example through the model alone, all logits, the replies' picked out of them."""
    ids = torch.tensor([[*example.prompt_ids, *example.reply_ids]])
    logits = tuned(input_ids=ids[:, :-1], use_cache=False).logits[0]
    length = len(example.reply_ids)
    return F.cross_entropy(logits[-length:], ids[0, -length:], reduction="sum")


def packed_result(tuned, examples, max_tokens, share):
    groups = plan_packs(examples, max_tokens, share)
    return measured(tuned, (negative_log_likelihood(tuned, pack(group, CPU, share)) for group in groups))


def assert_same(found, wanted, loss=LOSS, gradient=GRADIENT):
    assert found[0] == pytest.approx(wanted[0], rel=loss)
    assert found[1].keys() == wanted[1].keys()
    for name, right in wanted[1].items():
        assert right.norm() > 0, name
        assert (found[1][name] - right).norm() <= gradient * right.norm(), name


def attended(packed, window=None):
    """(tokens, tokens) True where a token attends, put together from the blocks."""
    mask = torch.zeros(packed.input_ids.numel(), packed.input_ids.numel(), dtype=torch.bool)
    for block in packed.tree.blocks_within(window):
        sources = [position for begin, end in block.sources for position in range(begin, end)]
        assert len(set(sources)) == len(sources)
        seen = torch.ones(block.end - block.begin, len(sources), dtype=torch.bool)
        seen[:, len(sources) - block.bias.shape[1] :] &= block.bias == 0
        mask[block.begin : block.end, sources] = seen
    return mask
