"""Replies to a list of prompts, for evaluation: in batches, resumable, the same whatever the batch size and order."""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from persona.console import excerpt
from persona.decoding import Decoding, generate, margin_of
from persona.errors import DataError
from persona.fused import unpacked
from persona.generation import Speaker
from persona.modeling import stop_ids
from persona.render import Message, Untrainable, fit, prompt_room

Progress = Callable[[int, int, float | None], None]


@dataclass(frozen=True)
class Reply:
    """What the model said to one prompt."""

    text: str
    ids: tuple[int, ...]
    """Its tokens, without the one that ended it."""
    ended: bool
    """Whether it ended by itself, before the limit."""


class ReplyFile:
    """Finished replies in a JSONL file, each under the hash of all that it depends on."""

    def __init__(self, path: Path, model: str) -> None:
        """Continue `path`; `model` tells the weights apart, such as by fingerprints of base and adapter.

        A last line that was cut off is dropped; raises `DataError` for any other that is none of ours.
        """
        self._model = model
        self._replies: dict[str, Reply] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b")
        self._file.seek(0)
        content = self._file.read()
        whole = content.rfind(b"\n") + 1
        self._file.truncate(whole)
        for number, line in enumerate(content[:whole].split(b"\n")[:-1], 1):
            try:
                entry = json.loads(line)
                reply = Reply(str(entry["text"]), tuple(map(int, entry["ids"])), bool(entry["ended"]))
                self._replies[entry["key"]] = reply
            except (ValueError, TypeError, KeyError):
                self._file.close()
                found = excerpt(line.decode("utf-8", errors="replace"), 60)
                raise DataError(
                    f"{path}:{number}: not a finished reply, found {found!r}. Delete the file to generate all replies "
                    "again."
                ) from None

    def __enter__(self) -> "ReplyFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def key(self, prompt: Sequence[int], decoding: Decoding, adapter: bool, precision: str) -> str:
        """The hash of all that a reply depends on."""
        settings = json.dumps([list(prompt), asdict(decoding), self._model, adapter, precision])
        return hashlib.sha256(settings.encode()).hexdigest()

    def get(self, key: str) -> Reply | None:
        """The finished reply under `key`."""
        return self._replies.get(key)

    def add(self, key: str, reply: Reply) -> None:
        """Write a finished reply."""
        self._replies[key] = reply
        line = json.dumps({"key": key, **asdict(reply)}, ensure_ascii=False)
        self._file.write(line.encode("utf-8", errors="replace") + b"\n")
        self._file.flush()


def reply_to_all(
    speaker: Speaker,
    prompts: Sequence[Sequence[Message]],
    decoding: Decoding,
    batch_size: int,
    adapter: bool,
    finished: ReplyFile | None,
    progress: Progress,
) -> list[Reply]:
    """The reply to each of `prompts`, in their order; equal prompts get equal replies.

    `adapter` False switches it off. What lies in `finished` is not generated again. `progress` is told how many are
    done, of how many, and the seconds that are left once that can be said. Raises `DataError` for a prompt that is too
    long.
    """
    asked = _prompt_ids(speaker, prompts)
    different = list(dict.fromkeys(asked))  # no prompt twice
    precision = str(speaker.model.get_input_embeddings().weight.dtype)
    keys = {ids: finished.key(ids, decoding, adapter, precision) for ids in different} if finished else {}
    replies = {ids: known for ids in different if finished and (known := finished.get(keys[ids]))}
    missing = [ids for ids in different if ids not in replies]
    before, started = len(replies), time.perf_counter()
    progress(before, len(different), None)

    def done(number: int, ids: tuple[int, ...], ended: bool) -> None:
        reply = replies[missing[number]] = Reply(speaker.text_of(ids), ids, ended)
        if finished is not None:
            finished.add(keys[missing[number]], reply)
        each = (time.perf_counter() - started) / (len(replies) - before)
        progress(len(replies), len(different), each * (len(different) - len(replies)))

    if missing:
        stops = stop_ids(speaker.model, speaker.fmt.end_id, speaker.fmt.tokenizer)
        off = not adapter and speaker.kind == "adapter"
        with unpacked(speaker.model), speaker.model.disable_adapter() if off else nullcontext():
            generate(speaker.model, missing, stops, decoding, batch_size, margin_of(speaker.model), done)
    return [replies[ids] for ids in asked]


def _prompt_ids(speaker: Speaker, prompts: Sequence[Sequence[Message]]) -> list[tuple[int, ...]]:
    asked = []
    for number, messages in enumerate(prompts, 1):
        try:
            ids, _ = fit(messages, speaker.fmt, prompt_room(speaker.max_length))
        except Untrainable as error:
            raise DataError(f"Prompt {number} of {len(prompts)} cannot be asked: {error}.") from None
        asked.append(tuple(ids))
    return asked
