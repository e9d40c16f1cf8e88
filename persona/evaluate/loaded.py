"""A subject's model in memory, its adapter switched on and off, and the replies of both sides.

Finished replies are kept on disk, so that a long evaluation can be interrupted.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch

from persona.config import Generation, Quantization
from persona.engine.memory import LEAST_TOKENS, Full, Limit, attempt
from persona.errors import UsageError
from persona.evaluate.predictions import Prediction, asked
from persona.evaluate.results import Sides
from persona.evaluate.subject import Subject
from persona.files import ADAPTER_WEIGHTS, file_sha256, read_json, write_json
from persona.model.dataset import with_system
from persona.model.device import choose_device, choose_precision
from persona.model.folders import fingerprint
from persona.model.render import Message
from persona.records import Record, rank
from persona.speak.choices import Decoding, greedy
from persona.speak.replies import Progress, Reply, ReplyFile, reply_to_all, rounding_of
from persona.speak.rounding import ONE_BY_ONE, WIDTH, Rounding
from persona.speak.speaker import Speaker, load_speaker

CACHE, ROUNDING = "replies.jsonl", "rounding.json"
Watch = Callable[[str], Progress]
"""Makes the progress of a step from its name."""


@dataclass(frozen=True)
class Loaded:
    """A subject's model in memory."""

    subject: Subject
    speaker: Speaker
    precision: str
    at_once: Limit
    """Replies at a time."""
    packs: Limit
    identity: str
    """The identity of the weights, by which finished replies are kept."""
    watch: Watch

    def replies(self, prompts: Sequence[Sequence[Message]], decoding: Decoding, step: str) -> Sides[list[Reply]]:
        """The replies of both sides to `prompts`, by the same seeds, in their order."""
        rounding = self.rounding(prompts, decoding.max_new_tokens)
        with ReplyFile(self.subject.output / CACHE, self.identity) as finished:

            def replies(adapter: bool, progress: Progress) -> list[Reply]:
                size = self.at_once.size
                return reply_to_all(self.speaker, prompts, decoding, size, rounding, adapter, finished, progress)

            def ask(adapter: bool, side: str) -> list[Reply]:
                progress = self.watch(f"{step}, {side}")
                while isinstance(full := attempt(partial(replies, adapter, progress), self.speaker.model.device), Full):
                    self.at_once.halve(full, self.at_once.size, "a single reply" if self.at_once.size == 1 else None)
                return full

            if self.speaker.kind != "adapter":
                return Sides(ask(True, "the model"))
            return Sides(ask(True, "tuned"), ask(False, "base"))

    def rounding(self, prompts: Sequence[Sequence[Message]], new_tokens: int) -> Rounding:
        """The measured rounding of the model on this device; measured with some of `prompts` if it is not kept.

        That takes several rows at a time; if the memory does not hold them, replies go one by one.
        """
        if (kept := self.kept_rounding()) is not None:
            return kept
        measured = attempt(partial(rounding_of, self.speaker, prompts, new_tokens), self.speaker.model.device)
        rounding = ONE_BY_ONE if isinstance(measured, Full) else measured
        if isinstance(measured, Full):
            self.at_once.report(
                f"  The memory is full ({measured.reason}) with {WIDTH} rows: replies are written one at a time. "
                f"To try several again, delete {(self.subject.output / ROUNDING).as_posix()}."
            )
        self.subject.output.mkdir(parents=True, exist_ok=True)
        write_json(self.subject.output / ROUNDING, {"measured_on": self._measured_on()} | asdict(rounding))
        return rounding

    def kept_rounding(self) -> Rounding | None:
        """The rounding that is kept in the output folder, if it was measured with this model on this device."""
        try:
            kept = read_json(self.subject.output / ROUNDING)
            return Rounding(**kept) if kept.pop("measured_on", "") == self._measured_on() else None
        except (UsageError, TypeError, ValueError):
            return None  # it takes seconds to measure it again

    def _measured_on(self) -> str:
        device = self.speaker.model.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        return f"{self.identity}, {self.precision}, {name}, torch {torch.__version__}"


def identity_of(base: Path, adapter: Path | None, quantization: Quantization) -> str:
    """A text that differs for every model: base, adapter, and how the base is held."""
    held = quantization.model_dump_json() if quantization.load_in_4bit else "16 bits"
    own = file_sha256(adapter / ADAPTER_WEIGHTS) if adapter is not None else "no adapter"
    return f"{fingerprint(base)} {own} {held}"


def load(
    subject: Subject, in_4bit: bool, batch_size: int, watch: Watch, writes: bool, report: Callable[[str], None]
) -> Loaded:
    """Load the model of `subject` as it was trained; a merged one in 16 bits, or in 4 with `in_4bit`.

    On a CPU a model that `writes` replies computes in float32, so that figures compare with those of earlier versions.

    Raises `UsageError` for texts, which have no model.
    """
    if subject.base is None:
        raise UsageError(f"{subject.name} is a file of texts: it has no perplexity and cannot answer. Name a model.")
    config, quantization = subject.config, subject.config.quantization
    if subject.kind != "adapter":
        quantization = quantization.model_copy(update={"load_in_4bit": in_4bit})
    if writes and choose_device(config.model.device).type == "cpu":
        config = config.model_copy(update={"training": config.training.model_copy(update={"precision": "fp32"})})
    speaker = load_speaker(config, subject.base, subject.adapter, quantization.load_in_4bit)
    precision = choose_precision(config.training.precision, speaker.model.device)
    identity = identity_of(subject.base, subject.adapter, quantization)
    advice = (
        "Lower data.max_length or generation.max_new_tokens with --set, or take a smaller model; --load-in-4bit holds "
        "a merged one in 4 bits."
    )
    size = config.evaluation.max_tokens_per_pack
    packs = Limit("evaluation.max_tokens_per_pack", size, size, LEAST_TOKENS, "packs of {} tokens", advice, report)
    at_once = Limit("--batch-size", batch_size, batch_size, 1, "{} replies at a time", advice, report)
    return Loaded(subject, speaker, precision, at_once, packs, identity, watch)


def predict(loaded: Loaded) -> tuple[Sides[list[Prediction]], Sides[list[bool]]]:
    """Greedy replies of both sides to each held-out conversation's last turn, and whether each ended by itself."""
    held_out = loaded.subject.held_out
    prompts = [with_system(record, held_out.system)[:-1] for record in held_out.records]
    replies = loaded.replies(prompts, greedy(loaded.subject.config.generation.max_new_tokens), "predictions")
    wanted = asked(held_out.records)
    return (
        replies.each(lambda side: [replace(one, predict=reply.text) for one, reply in zip(wanted, side, strict=True)]),
        replies.each(lambda side: [reply.ended for reply in side]),
    )


def samples(loaded: Loaded, limit: int | None) -> Sides[list[str]]:
    """Replies of both sides in every held-out context, sampled as in chat by the same seeds."""
    held_out, config = loaded.subject.held_out, loaded.subject.config
    prompts = []
    for record in chosen(held_out.records, limit, config.seed):
        messages = with_system(record, held_out.system)
        prompts += [messages[:at] for at, message in enumerate(messages) if message["role"] == "assistant"]
    return loaded.replies(prompts, sampled(config.generation, config.seed), "samples for style").each(
        lambda side: [reply.text for reply in side]
    )


def sampled(settings: Generation, seed: int) -> Decoding:
    """The decoding of a chat."""
    return Decoding(settings.max_new_tokens, settings.temperature, settings.top_p, settings.repetition_penalty, seed)


def chosen(records: Sequence[Record], limit: int | None, seed: int) -> list[Record]:
    """All of `records`, or `limit` of them drawn by the seed, in their order."""
    if limit is None or limit >= len(records):
        return list(records)
    ranked = sorted(range(len(records)), key=lambda number: rank(seed, records[number].encoded().decode("utf-8")))
    return [records[number] for number in sorted(ranked[:limit])]
