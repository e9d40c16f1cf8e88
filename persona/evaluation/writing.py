"""What base and tuned model write to the same prompts, kept on disk so that a long evaluation can be interrupted."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from persona.config import Generation, Quantization
from persona.dataset import with_system
from persona.decoding import Decoding
from persona.evaluation.figures import Sides
from persona.folders import file_sha256, fingerprint
from persona.generation import Speaker
from persona.records import Record
from persona.render import Message
from persona.replies import Progress, Reply, ReplyFile, reply_to_all
from persona.storage import ADAPTER_WEIGHTS

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
