"""Samples during training: the same few held-out prompts, answered again at every evaluation.

They are always answered greedily, in one batch, so that no random number is drawn and the training is not touched.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from persona.dataset import Dataset
from persona.decoding import generate, greedy
from persona.fused import unpacked
from persona.generation import text_of
from persona.modeling import stop_ids
from persona.render import ChatFormat

SAMPLE_TOKENS = 48  # enough to hear a voice; each token costs the run as much as the next


@dataclass(frozen=True)
class Sampler:
    """A few held-out prompts, with what the author replied."""

    fmt: ChatFormat
    prompts: Sequence[Sequence[int]]
    asked: Sequence[str]
    """The last message of each prompt."""
    targets: Sequence[str]
    """What the author replied to each."""
    max_new_tokens: int

    def answer(self, model: Any) -> list[dict[str, Any]]:
        """What `model` replies now: `input`, `predict`, `target`, and `ended`, whether it ended by itself."""
        replies: dict[int, tuple[str, bool]] = {}

        def done(number: int, ids: tuple[int, ...], ended: bool) -> None:
            replies[number] = text_of(ids, self.fmt), ended

        stops = stop_ids(model, self.fmt.end_id, self.fmt.tokenizer)
        with unpacked(model):
            generate(model, self.prompts, stops, greedy(self.max_new_tokens), len(self.prompts), 0.0, done)
        return [
            {"input": asked, "predict": replies[number][0], "target": target, "ended": replies[number][1]}
            for number, (asked, target) in enumerate(zip(self.asked, self.targets, strict=True))
        ]


def choose_samples(held_out: Dataset, fmt: ChatFormat, count: int, max_new_tokens: int) -> Sampler | None:
    """`count` replies, evenly spread over the held-out ones; None where there is nothing to ask."""
    found = [
        (example.prompt_ids, turns[place - 1]["content"], turns[place]["content"])
        for record, conversation in zip(held_out.records, held_out.conversations, strict=True)
        for turns in [record.turns]
        for example, place in zip(conversation, _replies(turns), strict=True)
    ]
    number = min(count, len(found))
    if not number:
        return None
    chosen = [found[place * len(found) // number] for place in range(number)]
    prompts, asked, targets = zip(*chosen, strict=True)
    return Sampler(fmt, prompts, asked, targets, min(max_new_tokens, SAMPLE_TOKENS))


def _replies(turns: Sequence[dict[str, str]]) -> list[int]:
    return [place for place, message in enumerate(turns) if message["role"] == "assistant"]
