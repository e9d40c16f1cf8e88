"""Perplexity and bits per character: how well base and tuned model expect the held-out replies, each in its context.

Sums over whole conversations are what counts, so nothing depends on how the examples are laid out in memory.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel

from persona.engine.attention import NAME
from persona.engine.loss import token_losses
from persona.engine.packing import pack, plan_packs
from persona.engine.trial import TOLERANCE, trial_examples, why_not
from persona.errors import Diverged
from persona.evaluate.intervals import mapped, ratio
from persona.evaluate.results import FileScore, Score, Sides
from persona.files import file_sha256
from persona.model.dataset import Dataset
from persona.model.loading import DTYPES
from persona.model.render import Example
from persona.train.metrics import perplexity

Progress = Callable[[int, int, float | None], None]
"""Told how many are done, of how many, and the seconds that are left once that can be said."""


@dataclass(frozen=True)
class Losses:
    """Negative log-likelihoods of one side on one file, in nats, a number a conversation."""

    tuned: list[float]
    base: list[float] | None


def conversation_losses(
    model: Any, dataset: Dataset, max_tokens: int, precision: str, share: bool, progress: Progress
) -> Losses:
    """What every conversation costs with the adapter and, where there is one, without it; one model, no second copy."""
    sides = 2 if isinstance(model, PeftModel) else 1
    examples = dataset.examples
    total, started = sides * len(examples), time.perf_counter()

    def told(done: int) -> None:
        seconds = time.perf_counter() - started
        progress(done, total, seconds / done * (total - done) if done else None)

    told(0)
    tuned = example_losses(model, examples, max_tokens, precision, share, told)
    base = None
    if sides == 2:
        with model.disable_adapter():
            base = example_losses(
                model, examples, max_tokens, precision, share, lambda done: told(len(examples) + done)
            )
    return Losses(_by_conversation(tuned, dataset), base and _by_conversation(base, dataset))


def _by_conversation(losses: Sequence[float], dataset: Dataset) -> list[float]:
    remaining = iter(losses)
    return [math.fsum(next(remaining) for _ in conversation) for conversation in dataset.conversations]


def example_losses(
    model: Any,
    examples: Sequence[Example],
    max_tokens: int,
    precision: str,
    share: bool,
    told: Callable[[int], None] = lambda _: None,
) -> list[float]:
    """The negative log-likelihood of each example's reply in nats, in the order of `examples`.

    `share` lays them out as prefix trees; see `shared_beginnings`. Raises `Diverged` for a loss that is not finite.
    """
    # equal examples cost the same, and only once
    places: dict[Example, list[int]] = {}
    for place, example in enumerate(examples):
        places.setdefault(example, []).append(place)
    losses = [0.0] * len(examples)
    done = 0
    with _evaluating(model), _autocast(model, precision):
        for group in plan_packs(list(places), max_tokens, share):
            costs = token_losses(model, pack(group, model.device, share)).double().cpu()
            for example, part in zip(group, costs.split([len(example.reply_ids) for example in group]), strict=True):
                for place in places[example]:
                    losses[place] = part.sum().item()
                    done += 1
            told(done)
    if not all(map(math.isfinite, losses)):
        raise Diverged(
            "The model's loss on this file is not finite: its weights are damaged, or its precision is too small. Try "
            "--set training.precision=fp32."
        )
    return losses


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _autocast(model: Any, precision: str) -> Any:
    """The arithmetic of the run's own evaluations, so that the figures are those it printed."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(model.device.type, DTYPES[precision])


@contextmanager
def shared_beginnings(model: Any, examples: Sequence[Example], max_tokens: int, precision: str) -> Iterator[bool]:
    """Whether what examples have in common is computed once inside, after a trial with the beginning of one of them.

    The model's own attention is put back afterwards.
    """
    whole: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    if why_not(model.config, max_tokens) is not None or len(examples) < 2:
        yield False
        return
    before = model.config._attn_implementation
    trial = trial_examples(examples)
    alone = sum(example_losses(model, trial, 1, precision, share=False))
    whole.set_attn_implementation(NAME)
    try:
        together = sum(example_losses(model, trial, sum(map(_length, trial)), precision, share=True))
        tolerance, _ = TOLERANCE[DTYPES[precision]]
        yield abs(together - alone) <= tolerance * abs(alone)
    finally:
        whole.set_attn_implementation(before)


def _length(example: Example) -> int:
    return len(example.prompt_ids) + len(example.reply_ids)


def score_of(
    path: Path, role: Literal["held_out", "control"], dataset: Dataset, losses: Losses, seed: int, precision: str
) -> FileScore:
    """The figures of one file, with intervals over its conversations."""
    tokens = [sum(len(example.reply_ids) for example in examples) for examples in dataset.conversations]
    characters = [
        sum(len(turn["content"]) for turn in record.turns if turn["role"] == "assistant") for record in dataset.records
    ]

    def score(nats: Sequence[float]) -> Score:
        bits = mapped(ratio(nats, characters, seed), lambda nats: nats / math.log(2))
        return Score(mapped(ratio(nats, tokens, seed), perplexity), bits)

    gained = None
    if losses.base is not None:
        apart = [tuned - base for tuned, base in zip(losses.tuned, losses.base, strict=True)]
        gained = mapped(ratio(apart, tokens, seed), perplexity)
    return FileScore(
        file=f"{path.resolve().parent.name}/{path.name}",
        sha256=file_sha256(path),
        role=role,
        conversations=len(dataset.conversations),
        replies=len(dataset.examples),
        tokens=sum(tokens),
        characters=sum(characters),
        score=Sides(score(losses.tuned), score(losses.base) if losses.base is not None else None),
        ratio=gained,
        left_out=tuple(dataset.left_out),
        precision=precision,
    )
