"""A run's history as it is written: metrics, samples and TensorBoard, cut back to the checkpoint on resume."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from persona.engine.fused import unpacked
from persona.model.dataset import Dataset
from persona.model.loading import stop_ids
from persona.model.render import ChatFormat
from persona.speak.batches import generate, greedy
from persona.speak.speaker import text_of


class _Lines:
    """A JSONL file that grows, and is first cut back to what is kept of it."""

    def __init__(self, path: Path, kept_bytes: int) -> None:
        self._file = path.open("a+b")
        self._file.truncate(min(kept_bytes, self._file.seek(0, 2)))
        self._file.seek(0, 2)

    def write(self, value: dict[str, Any]) -> None:
        self._file.write(json.dumps(value, ensure_ascii=False).encode("utf-8", errors="replace") + b"\n")
        self._file.flush()

    @property
    def size(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        self._file.close()


class MetricsWriter:
    """Writes each line of metrics to metrics.jsonl and to TensorBoard at once, and samples to samples.jsonl."""

    def __init__(self, run: Path, logs: Path, kept_bytes: int, kept_sample_bytes: int, step: int) -> None:
        """Continue after so many bytes of metrics.jsonl and of samples.jsonl, written up to update `step`."""
        run.mkdir(parents=True, exist_ok=True)
        self._metrics = _Lines(run / "metrics.jsonl", kept_bytes)
        self._samples = _Lines(run / "samples.jsonl", kept_sample_bytes)
        # TensorBoard hides events from purge_step on: updates that a crash lost, or those of an earlier run
        self._board = SummaryWriter(str(logs), purge_step=step + 1 if step else 0)

    def write(self, step: int, epoch: float, values: dict[str, float]) -> None:
        """One line of metrics after update `step`."""
        finite = {tag: value if math.isfinite(value) else None for tag, value in values.items()}
        self._metrics.write({"step": step, "epoch": round(epoch, 4)} | finite)
        for tag, value in values.items():
            self._board.add_scalar(tag, value, step)
        self._board.flush()

    def write_samples(self, step: int, samples: Sequence[dict[str, Any]]) -> None:
        """What the model replied after update `step`: one line for each of `samples`."""
        for number, sample in enumerate(samples, 1):
            self._samples.write({"step": step} | sample)
            said = {"asked": sample["input"], "says": sample["predict"], "author": sample["target"]}
            # TensorBoard reads Markdown; in a block of code it shows text as it is
            lines = [line for name, text in said.items() for line in f"{name}: {text}".splitlines()]
            self._board.add_text(f"samples/{number}", "\n".join(f"    {line}" for line in lines), step)
        self._board.flush()

    @property
    def size(self) -> int:
        """Bytes of metrics.jsonl so far."""
        return self._metrics.size

    @property
    def sample_size(self) -> int:
        """Bytes of samples.jsonl so far."""
        return self._samples.size

    def close(self) -> None:
        """Close all files."""
        self._metrics.close()
        self._samples.close()
        self._board.close()


def perplexity(loss: float) -> float:
    """exp of a mean negative log-likelihood in nats; infinite where a float cannot hold it."""
    return math.exp(loss) if loss < 700 else math.inf


# --- samples ----------------------------------------------------------------------------------------------------------
# Samples during training: the same few held-out prompts, answered again at every evaluation.
#
# They are always answered greedily, in one batch, so that no random number is drawn and the training is not touched.


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
