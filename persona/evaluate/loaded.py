"""The loaded model of a subject, and its scores on files: one model, its adapter switched on and off."""

import gc
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from persona.config import Generation, Quantization
from persona.errors import UsageError
from persona.evaluate.perplexity import conversation_losses, score_of, shared_beginnings
from persona.evaluate.results import FileScore, Sides
from persona.evaluate.subject import Measured, Subject
from persona.files import ADAPTER_WEIGHTS, file_sha256
from persona.model.dataset import render_records, with_system
from persona.model.folders import fingerprint
from persona.model.loading import choose_device, choose_precision
from persona.model.render import Message
from persona.records import Record
from persona.speak.batches import Decoding, Progress, Reply, ReplyFile, reply_to_all
from persona.speak.speaker import Speaker, load_speaker

# --- writing ----------------------------------------------------------------------------------------------------------
# What base and tuned model write to the same prompts, kept on disk so that a long evaluation can be interrupted.


CACHE = "replies.jsonl"
Watch = Callable[[str], Progress]
"""Makes the progress of a step from its name."""


@dataclass(frozen=True)
class Writer:
    """A loaded model that answers prompts with its adapter and without it."""

    speaker: Speaker
    batch_size: int
    identity: str
    """Which weights these are."""
    cache: Path | None
    """Where finished replies are kept."""
    watch: Watch

    def sides(self, prompts: Sequence[Sequence[Message]], decoding: Decoding, step: str) -> Sides[list[Reply]]:
        """The replies of both sides to `prompts`, by the same seeds, in their order."""
        with ReplyFile(self.cache, self.identity) if self.cache is not None else nullcontext() as finished:

            def ask(adapter: bool, side: str) -> list[Reply]:
                progress = self.watch(f"{step}, {side}")
                return reply_to_all(self.speaker, prompts, decoding, self.batch_size, adapter, finished, progress)

            if self.speaker.kind != "adapter":
                return Sides(ask(True, "the model"))
            return Sides(ask(True, "tuned"), ask(False, "base"))


def identity_of(base: Path, adapter: Path | None, quantization: Quantization) -> str:
    """What tells one model's replies from another's: base, adapter, and how the base is held."""
    held = quantization.model_dump_json() if quantization.load_in_4bit else "16 bits"
    own = file_sha256(adapter / ADAPTER_WEIGHTS) if adapter is not None else "no adapter"
    return f"{fingerprint(base)} {own} {held}"


def sampled(settings: Generation, seed: int) -> Decoding:
    """As it speaks in chat."""
    return Decoding(settings.max_new_tokens, settings.temperature, settings.top_p, settings.repetition_penalty, seed)


def last_prompts(records: Iterable[Record], system: str | None) -> list[list[Message]]:
    """For each record what stands before its last reply."""
    return [with_system(record, system)[:-1] for record in records]


def all_prompts(records: Iterable[Record], system: str | None) -> tuple[list[list[Message]], list[str]]:
    """What stands before every reply of every record, and these replies."""
    prompts, replies = [], []
    for record in records:
        messages = with_system(record, system)
        for place, message in enumerate(messages):
            if message["role"] == "assistant":
                prompts.append(messages[:place])
                replies.append(message["content"])
    return prompts, replies


@dataclass(frozen=True)
class Loaded:
    """A subject's model in memory."""

    subject: Subject
    speaker: Speaker
    precision: str
    writer: Writer


def load(subject: Subject, in_4bit: bool, batch_size: int, watch: Watch, writes: bool = True) -> Loaded:
    """Load the model of `subject` as it was trained; a merged one in 16 bits, or in 4 where `in_4bit` asks for it.

    On a CPU a model that `writes` computes in float32: in bfloat16 so many choices are near ties, each of which takes a
    pass of its own (`persona.speak.batches.MARGIN`), that replies took several times as long.

    Raises `UsageError` for texts, which have no model.
    """
    if subject.base is None:
        raise UsageError(f"{subject.name} is a file of texts: it has no perplexity and cannot answer. Name a model.")
    quantization = subject.config.quantization
    if subject.kind != "adapter":
        quantization = quantization.model_copy(update={"load_in_4bit": in_4bit})
    config = subject.config
    if writes and choose_device(config.model.device).type == "cpu":
        config = config.model_copy(update={"training": config.training.model_copy(update={"precision": "fp32"})})
    speaker = load_speaker(config, subject.base, subject.adapter, quantization.load_in_4bit)
    precision = choose_precision(config.training.precision, speaker.model.device)
    identity = identity_of(subject.base, subject.adapter, quantization)
    return Loaded(subject, speaker, precision, Writer(speaker, batch_size, identity, subject.output / CACHE, watch))


def score(loaded: Loaded, files: Sequence[Measured], watch: Watch) -> tuple[FileScore, ...]:
    """The scores of base and tuned on `files`."""
    config, speaker = loaded.subject.config, loaded.speaker
    limit = config.evaluation.max_tokens_per_pack
    found = []
    for file in files:
        dataset = render_records(file.records, speaker.fmt, file.system, config.data.max_length)
        role = "held_out" if file.own else "control"
        with shared_beginnings(speaker.model, dataset.examples, limit, loaded.precision) as share:
            progress = watch(f"perplexity on {file.path.name}")
            losses = conversation_losses(speaker.model, dataset, limit, loaded.precision, share, progress)
        found.append(score_of(file.path, role, dataset, losses, config.seed, loaded.precision))
    return tuple(found)


@dataclass(frozen=True)
class Matrix:
    """Perplexities of several models on several files: each should expect its own author's file best."""

    models: tuple[str, ...]
    files: tuple[str, ...]
    perplexity: tuple[tuple[float, ...], ...]
    """A row a file, a column a model; the last column is the base of the first model, where that has one."""
    own: tuple[str | None, ...]
    """For each file the model whose held-out file it is."""


def matrix(subjects: Sequence[Subject], controls: Sequence[Measured], in_4bit: bool, watch: Watch) -> Matrix:
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
        found = score(
            load(subject, in_4bit, 1, watch, writes=False), files, lambda step, of=subject.name: watch(f"{of}: {step}")
        )
        columns.append([one.score.tuned.perplexity.value for one in found])
        bases.append([one.score.base.perplexity.value for one in found if one.score.base is not None])
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
