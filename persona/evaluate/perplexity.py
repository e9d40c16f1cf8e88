"""Perplexity and bits per character: how well base and tuned model predict the held-out replies, each in its context.

Losses are summed over whole conversations, so no figure depends on how the examples are laid out in memory.
"""

import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel

from persona.engine.attention import NAME, NotCarried, attend_by
from persona.engine.loss import token_losses
from persona.engine.memory import Full, Limit, attempt
from persona.engine.packing import pack, plan_packs
from persona.engine.trial import TOLERANCE, short_windows, trial_examples, why_not
from persona.errors import Diverged
from persona.evaluate.intervals import mapped, ratio
from persona.evaluate.loaded import Loaded, Watch, load
from persona.evaluate.results import FileScore, Matrix, Score, Sides
from persona.evaluate.subject import Measured, Subject
from persona.files import file_sha256
from persona.model.dataset import Dataset, render_records
from persona.model.device import DTYPES
from persona.model.render import Example
from persona.speak.replies import Progress
from persona.train.metrics import perplexity


@dataclass(frozen=True)
class Losses:
    """Negative log-likelihoods of both sides on one file, in nats, one number per conversation."""

    tuned: list[float]
    base: list[float] | None


def conversation_losses(
    model: Any, dataset: Dataset, limit: Limit, precision: str, share: bool, progress: Progress
) -> Losses:
    """The losses of every conversation with the adapter and, if there is one, without it, from one model in memory."""
    sides = 2 if isinstance(model, PeftModel) else 1
    examples = dataset.examples
    total, started = sides * len(examples), time.perf_counter()

    def show(done: int) -> None:
        seconds = time.perf_counter() - started
        progress(done, total, seconds / done * (total - done) if done else None)

    show(0)
    tuned = example_losses(model, examples, limit, precision, share, show)
    base = None
    if sides == 2:
        with model.disable_adapter():
            base = example_losses(model, examples, limit, precision, share, lambda done: show(len(examples) + done))
    return Losses(_by_conversation(tuned, dataset), base and _by_conversation(base, dataset))


def _by_conversation(losses: Sequence[float], dataset: Dataset) -> list[float]:
    remaining = iter(losses)
    return [math.fsum(next(remaining) for _ in conversation) for conversation in dataset.conversations]


def example_losses(
    model: Any,
    examples: Sequence[Example],
    limit: Limit,
    precision: str,
    share: bool,
    show: Callable[[int], None] = lambda _: None,
) -> list[float]:
    """The negative log-likelihood of each example's reply in nats, in the order of `examples`.

    `share` lays them out as prefix trees; see `shared_beginnings`. When the memory is full, the others go through in
    smaller packs. Raises `Diverged` for a loss that is not finite.
    """
    # equal examples have equal losses, which are computed once
    places: dict[Example, list[int]] = {}
    for place, example in enumerate(examples):
        places.setdefault(example, []).append(place)
    losses = [0.0] * len(examples)
    left = dict.fromkeys(places)
    with _evaluating(model), _autocast(model, precision):
        while left:
            for group in plan_packs(list(left), limit.size, share):
                costs = attempt(partial(_costs, model, group, share), model.device)
                if isinstance(costs, Full):
                    limit.halve_pack(costs, group, share)
                    break
                for example, part in zip(group, costs.split([len(one.reply_ids) for one in group]), strict=True):
                    del left[example]
                    for place in places[example]:
                        losses[place] = part.sum().item()
                show(len(examples) - sum(len(places[example]) for example in left))
    if not all(map(math.isfinite, losses)):
        raise Diverged(
            "The model's loss on this file is not finite: its weights are damaged, or its precision is too small. Try "
            "--set training.precision=fp32."
        )
    return losses


def _costs(model: Any, group: Sequence[Example], share: bool) -> torch.Tensor:
    return token_losses(model, pack(group, model.device, share)).double().cpu()


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _autocast(model: Any, precision: str) -> Any:
    """The arithmetic of the run's own evaluations, so that the figures are those that the run printed."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(model.device.type, DTYPES[precision])


@contextmanager
def shared_beginnings(model: Any, examples: Sequence[Example], limit: Limit, precision: str) -> Iterator[bool]:
    """Whether shared beginnings of examples can be computed once inside the block; a trial with some of them decides.

    The model's own attention is put back afterwards.
    """
    whole: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    longest = max(map(_length, examples), default=0)
    if why_not(model.config, longest) is not None or len(examples) < 2:
        yield False
        return
    before = model.config._attn_implementation
    trial = trial_examples(examples)
    try:
        with short_windows(model, trial):
            alone = sum(example_losses(model, trial, replace(limit, size=1), precision, share=False))
            attend_by(whole, NAME)
            together = _together(model, trial, limit, precision)
        tolerance, _ = TOLERANCE[DTYPES[precision]]
        yield abs(together - alone) <= tolerance * abs(alone)
    finally:
        attend_by(whole, before)


def _together(model: Any, examples: Sequence[Example], limit: Limit, precision: str) -> float:
    """The loss of `examples` in one tree; infinite if the model's attention is more than a tree carries."""
    one_pack = replace(limit, size=sum(map(_length, examples)))
    try:
        return sum(example_losses(model, examples, one_pack, precision, share=True))
    except NotCarried:
        return math.inf


def _length(example: Example) -> int:
    return len(example.prompt_ids) + len(example.reply_ids)


def score_of(
    path: Path, role: Literal["held_out", "control"], dataset: Dataset, losses: Losses, seed: int, precision: str
) -> FileScore:
    """The figures of one file, with intervals over its conversations."""
    tokens = [sum(len(example.reply_ids) for example in examples) for examples in dataset.conversations]
    characters = [sum(map(len, record.replies)) for record in dataset.records]

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


def score(loaded: Loaded, files: Sequence[Measured], watch: Watch) -> tuple[FileScore, ...]:
    """The scores of base and tuned on `files`."""
    config, speaker = loaded.subject.config, loaded.speaker
    limit = loaded.packs
    scores = []
    for file in files:
        dataset = render_records(file.records, speaker.fmt, file.system, config.data.max_length)
        role = "held_out" if file.own else "control"
        with shared_beginnings(speaker.model, dataset.examples, limit, loaded.precision) as share:
            progress = watch(f"perplexity on {file.path.name}")
            losses = conversation_losses(speaker.model, dataset, limit, loaded.precision, share, progress)
        scores.append(score_of(file.path, role, dataset, losses, config.seed, loaded.precision))
    return tuple(scores)


def matrix(
    subjects: Sequence[Subject],
    controls: Sequence[Measured],
    in_4bit: bool,
    watch: Watch,
    report: Callable[[str], None],
) -> Matrix:
    """Score every subject on the held-out files of all, one model in memory at a time (as in arXiv 2510.21958).

    A file keeps its own system prompt, so that every model reads the same text.
    """
    held_out: dict[Path, Measured] = {}
    for subject in subjects:
        held_out.setdefault(subject.held_out.path.resolve(), subject.held_out)
    files = [*held_out.values(), *controls]
    columns: list[list[float]] = []
    bases: list[list[float]] = []
    for subject in subjects:
        loaded = load(subject, in_4bit, 1, watch, False, report)
        scores = score(loaded, files, lambda step, of=subject.name: watch(f"{of}: {step}"))
        columns.append([one.score.tuned.perplexity.value or 0.0 for one in scores])
        bases.append([one.score.base.perplexity.value or 0.0 for one in scores if one.score.base is not None])
        del loaded
        gc.collect()
        torch.cuda.empty_cache()
    names = [subject.name for subject in subjects]
    if bases[0]:
        columns.append(bases[0])
        names.append(f"base of {subjects[0].name}" if len(set(map(tuple, bases))) > 1 else "base")
    owners = {subject.held_out.path.resolve(): subject.name for subject in reversed(subjects)}
    return Matrix(
        models=tuple(names),
        files=tuple(_label(file.path) for file in files),
        perplexity=tuple(zip(*columns, strict=True)),
        own=tuple(owners.get(file.path.resolve()) if file.own else None for file in files),
    )


def _label(path: Path) -> str:
    return "/".join(path.parts[-2:])  # many are called val.jsonl
