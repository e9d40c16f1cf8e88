"""A run's history as it is written: metrics.jsonl, samples.jsonl, and the same for TensorBoard.

The files only grow, and a checkpoint notes their lengths. After a crash they may hold lines of updates that the last
checkpoint does not know. On resume they are cut back to the noted lengths and those updates are made again, so that
every update has one line. The samples are the replies to a few held-out prompts, the same at each evaluation, so that a
person hears the voice change. They are greedy and in one batch: no random number is drawn, and training goes on as if
nobody had asked.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from torch.utils.tensorboard import SummaryWriter

from persona.engine.fused import unpacked
from persona.engine.memory import Limit, answer_all
from persona.model.dataset import Dataset
from persona.model.loading import stop_ids
from persona.model.render import ChatFormat
from persona.speak.batches import generate
from persona.speak.choices import greedy
from persona.speak.rounding import LOOSE
from persona.speak.speaker import text_of

SAMPLE_TOKENS = 48  # enough to hear a voice; each token costs the run as much as the next


@dataclass(frozen=True)
class Sample:
    """The answer to one held-out prompt."""

    input: str
    """The last message of the prompt."""
    predict: str
    target: str
    """The author's reply."""
    ended: bool
    """Whether the model ended the reply by itself."""


class MetricsWriter:
    """Writes each line of metrics to metrics.jsonl and to TensorBoard at once, and samples to samples.jsonl."""

    def __init__(self, run: Path, logs: Path, kept_bytes: int, kept_sample_bytes: int, step: int) -> None:
        """Continue after so many bytes of metrics.jsonl and of samples.jsonl, written up to update `step`."""
        self._metrics = _cut_back(run / "metrics.jsonl", kept_bytes)
        self._samples = _cut_back(run / "samples.jsonl", kept_sample_bytes)
        # TensorBoard hides events from purge_step on: updates that a crash lost, or those of an earlier run
        self._board = SummaryWriter(str(logs), purge_step=step + 1 if step else 0)

    def write(self, step: int, epoch: float, values: dict[str, float]) -> None:
        """One line of metrics after update `step`."""
        finite = {tag: value if math.isfinite(value) else None for tag, value in values.items()}
        _write_line(self._metrics, {"step": step, "epoch": round(epoch, 4)} | finite)
        for tag, value in values.items():
            self._board.add_scalar(tag, value, step)
        self._board.flush()

    def write_samples(self, step: int, samples: Sequence[Sample]) -> None:
        """One line for each of `samples`, taken after update `step`."""
        for number, sample in enumerate(samples, 1):
            _write_line(self._samples, {"step": step} | asdict(sample))
            texts = {"asked": sample.input, "says": sample.predict, "author": sample.target}
            # TensorBoard reads Markdown; in a block of code it shows text as it is
            lines = [line for name, text in texts.items() for line in f"{name}: {text}".splitlines()]
            self._board.add_text(f"samples/{number}", "\n".join(f"    {line}" for line in lines), step)
        self._board.flush()

    @property
    def sizes(self) -> tuple[int, int]:
        """Bytes of metrics.jsonl and of samples.jsonl so far."""
        return self._metrics.tell(), self._samples.tell()

    def close(self) -> None:
        """Close all files."""
        self._metrics.close()
        self._samples.close()
        self._board.close()


def _cut_back(path: Path, kept_bytes: int) -> BinaryIO:
    """The file, open at its end, after everything behind its first `kept_bytes` is cut off."""
    file = path.open("a+b")
    file.truncate(min(kept_bytes, file.seek(0, 2)))
    file.seek(0, 2)
    return file


def _write_line(file: BinaryIO, value: Mapping[str, object]) -> None:
    file.write(json.dumps(value, ensure_ascii=False).encode("utf-8", errors="replace") + b"\n")
    file.flush()


def perplexity(loss: float) -> float:
    """exp of a mean negative log-likelihood in nats; infinite if a float cannot hold it."""
    return math.exp(loss) if loss < 700 else math.inf


@dataclass(frozen=True)
class Sampler:
    """A few held-out prompts, the same at each evaluation."""

    fmt: ChatFormat
    exchanges: Sequence[tuple[tuple[int, ...], str, str]]
    """The ids of each prompt, its last message, and the author's reply."""
    max_new_tokens: int

    def answer(self, model: Any, limit: Limit) -> list[Sample]:
        """The replies of `model` now, `limit` at a time; raises `OutOfMemory` if even a single one does not fit."""
        replies: dict[int, tuple[str, bool]] = {}

        def done(number: int, ids: tuple[int, ...], ended: bool) -> None:
            replies[number] = text_of(ids, self.fmt), ended

        def left() -> list[int]:
            return [number for number in range(len(self.exchanges)) if number not in replies]

        def ask(numbers: list[int], at_once: int) -> None:
            prompts = [self.exchanges[number][0] for number in numbers]
            how = greedy(self.max_new_tokens)
            generate(model, prompts, stops, how, at_once, LOOSE, lambda n, ids, ended: done(numbers[n], ids, ended))

        stops = stop_ids(model, self.fmt.end_id, self.fmt.tokenizer)
        with unpacked(model):
            answer_all(ask, left, limit, model.device)
        exchanges = enumerate(self.exchanges)
        return [
            Sample(asked, replies[number][0], target, replies[number][1]) for number, (_, asked, target) in exchanges
        ]


def choose_samples(held_out: Dataset, fmt: ChatFormat, count: int, max_new_tokens: int) -> Sampler | None:
    """`count` prompts, evenly spread over the held-out replies; None if there is nothing to ask."""
    exchanges = [
        (example.prompt_ids, asked, target)
        for record, conversation in zip(held_out.records, held_out.conversations, strict=True)
        for example, asked, target in zip(conversation, record.prompts, record.replies, strict=True)
    ]
    number = min(count, len(exchanges))
    if not number:
        return None
    chosen = [exchanges[place * len(exchanges) // number] for place in range(number)]
    return Sampler(fmt, chosen, min(max_new_tokens, SAMPLE_TOKENS))
