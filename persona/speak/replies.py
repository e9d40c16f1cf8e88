"""Messages in, replies out, many at a time; kept in a file so that a break loses none."""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

from persona.console import excerpt
from persona.engine.fused import unpacked
from persona.errors import DataError
from persona.model.loading import stop_ids
from persona.model.render import Message, Untrainable, fit, prompt_room
from persona.speak.batches import generate, measure
from persona.speak.choices import Decoding
from persona.speak.rounding import Rounding
from persona.speak.speaker import Speaker, text_of

Progress = Callable[[int, int, float | None], None]


@dataclass(frozen=True)
class Reply:
    """The reply to one prompt."""

    text: str
    ids: tuple[int, ...]
    """Its tokens, without the one that ended it."""
    ended: bool
    """Whether it ended by itself, before the limit."""


class ReplyFile:
    """Finished replies in a JSONL file, each under the hash of all that it depends on."""

    def __init__(self, path: Path, model: str) -> None:
        """Continue `path`; `model` names the weights, for example by fingerprints of base and adapter.

        A last line that was cut off is dropped; raises `DataError` for any other line that is not a reply.
        """
        self._model = model
        self.replies: dict[str, Reply] = {}
        """The finished replies, by their keys."""
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
                self.replies[entry["key"]] = reply
            except (ValueError, TypeError, KeyError):
                self._file.close()
                text = excerpt(line.decode("utf-8", errors="replace"), 60)
                raise DataError(
                    f"{path}:{number}: not a finished reply: {text!r}. Delete the file to generate all replies again."
                ) from None

    def __enter__(self) -> "ReplyFile":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def key(self, prompt: Sequence[int], decoding: Decoding, adapter: bool, precision: str) -> str:
        """The hash of all that a reply depends on."""
        parts = json.dumps([list(prompt), asdict(decoding), self._model, adapter, precision])
        return hashlib.sha256(parts.encode()).hexdigest()

    def add(self, key: str, reply: Reply) -> None:
        """Write a finished reply."""
        self.replies[key] = reply
        line = json.dumps({"key": key, **asdict(reply)}, ensure_ascii=False)
        self._file.write(line.encode("utf-8", errors="replace") + b"\n")
        self._file.flush()


def rounding_of(speaker: Speaker, prompts: Sequence[Sequence[Message]], new_tokens: int) -> Rounding:
    """The measured rounding of the speaker's model, with its adapter on; raises `DataError` as `reply_to_all` does."""
    with unpacked(speaker.model):
        return measure(speaker.model, _prompt_ids(speaker, prompts), new_tokens)


def reply_to_all(
    speaker: Speaker,
    prompts: Sequence[Sequence[Message]],
    decoding: Decoding,
    batch_size: int,
    rounding: Rounding,
    adapter: bool,
    finished: ReplyFile | None,
    progress: Progress,
) -> list[Reply]:
    """The reply to each of `prompts`, in their order; equal prompts get equal replies; `finished` ones are kept.

    `progress` gets the numbers of done and of all replies, and the seconds left when they are known. Raises `DataError`
    for a prompt that is too long.
    """
    asked = _prompt_ids(speaker, prompts)
    different = list(dict.fromkeys(asked))  # no prompt twice
    computed = _computed(speaker, rounding)
    keys = {ids: finished.key(ids, decoding, adapter, computed) for ids in different} if finished else {}
    replies = {ids: known for ids in different if finished and (known := finished.replies.get(keys[ids]))}
    missing = [ids for ids in different if ids not in replies]
    before, started = len(replies), time.perf_counter()
    progress(before, len(different), None)

    def done(number: int, ids: tuple[int, ...], ended: bool) -> None:
        reply = replies[missing[number]] = Reply(text_of(ids, speaker.fmt), ids, ended)
        if finished is not None:
            finished.add(keys[missing[number]], reply)
        each = (time.perf_counter() - started) / (len(replies) - before)
        progress(len(replies), len(different), each * (len(different) - len(replies)))

    if missing:
        stops = stop_ids(speaker.model, speaker.fmt.end_id, speaker.fmt.tokenizer)
        off = not adapter and speaker.kind == "adapter"
        switched: AbstractContextManager[object] = speaker.model.disable_adapter() if off else nullcontext()
        with unpacked(speaker.model), switched:
            generate(speaker.model, missing, stops, decoding, batch_size, rounding, done)
    return [replies[ids] for ids in asked]


def _computed(speaker: Speaker, rounding: Rounding) -> str:
    """The arithmetic that decides a near tie: the precision, and in 16 bits the rows of a pass."""
    dtype = str(speaker.model.get_input_embeddings().weight.dtype)
    return dtype if rounding.rows is None else f"{dtype}, {rounding}"


def _prompt_ids(speaker: Speaker, prompts: Sequence[Sequence[Message]]) -> list[tuple[int, ...]]:
    asked = []
    for number, messages in enumerate(prompts, 1):
        try:
            ids, _ = fit(messages, speaker.fmt, prompt_room(speaker.max_length))
        except Untrainable as error:
            raise DataError(f"Prompt {number} of {len(prompts)} cannot be asked: {error}.") from None
        asked.append(tuple(ids))
    return asked
