"""Many replies at a time, each the same as if it were generated alone, kept in a file so that a break loses none.

Neither the number of rows nor their order decides a token. Random numbers belong to a prompt and a place in its reply,
not to a row. Matrix products of other shapes round otherwise, so a choice that rounding could turn is made again from a
pass over that prompt alone. Prompts that begin alike share the keys and values of their common prefix.
"""

import copy
import hashlib
import inspect
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from persona.console import excerpt
from persona.engine.fused import unpacked
from persona.engine.trial import STATE, why_not
from persona.errors import DataError
from persona.model.loading import stop_ids
from persona.model.render import Message, Untrainable, fit, prompt_room
from persona.speak.speaker import Speaker, text_of

# Choices whose logits are nearer to each other than this are made in a pass of their own
MARGIN = {torch.float32: 0.01, torch.bfloat16: 0.5, torch.float16: 0.1}
LEAST_SHARED = 32  # tokens of a common prefix, below which it is not worth computing it once for all


@dataclass(frozen=True)
class Decoding:
    """The way the tokens of a reply are chosen."""

    max_new_tokens: int
    temperature: float
    """0 always takes the likeliest token."""
    top_p: float
    repetition_penalty: float
    """Penalty for tokens of the prompt and the reply so far; 1 is none (arXiv 1909.05858)."""
    seed: int


def greedy(max_new_tokens: int) -> Decoding:
    """Always the likeliest token, no repetition penalty."""
    return Decoding(max_new_tokens, 0.0, 1.0, 1.0, 0)


@dataclass
class _Row:
    """A reply that is being generated."""

    number: int
    """The number of its prompt."""
    prompt: Sequence[int]
    reply: list[int]
    chance: torch.Generator | None
    limit: int
    """Tokens that the reply may have."""


Done = Callable[[int, tuple[int, ...], bool], None]
Progress = Callable[[int, int, float | None], None]


def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    stops: Sequence[int],
    decoding: Decoding,
    batch_size: int,
    margin: float,
    done: Done,
) -> None:
    """Call `done(number of the prompt, ids of its reply, whether it ended by itself)` for each of `prompts`.

    They come in no certain order; a reply's ids are without the token that ended it. With a `margin` of 0 nothing is
    chosen again, and the result holds for this batch size and these prompts only.
    """
    longest = max(map(len, prompts), default=0) + decoding.max_new_tokens
    may_share = why_not(model.config, longest) is None  # padding goes between the prefix and the rest
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for shared, numbers in families(prompts, may_share):
                ids = torch.tensor([prompts[numbers[0]][:shared]], device=model.device)
                beginning = model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values if shared else None
                for first in range(0, len(numbers), batch_size):
                    chosen = numbers[first : first + batch_size]
                    rows = [_row(model, number, prompts[number], decoding) for number in chosen]
                    _reply(model, rows, shared, copy.deepcopy(beginning), set(stops), decoding, margin, done)
    finally:
        model.train(was_training)


def families(prompts: Sequence[Sequence[int]], share: bool) -> Iterator[tuple[int, list[int]]]:
    """Prompts that begin alike: the length of their common prefix, and their numbers, the longest prompts first."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, prompt in enumerate(prompts):
        groups.setdefault(tuple(prompt[:LEAST_SHARED]) if share else (), []).append(number)
    for numbers in groups.values():
        numbers.sort(key=lambda number: (-len(prompts[number]), number))
        shared = _common(prompts[numbers[0]], [prompts[number] for number in numbers])
        yield shared if share and shared >= LEAST_SHARED and len(numbers) > 1 else 0, numbers


def _common(first: Sequence[int], prompts: Sequence[Sequence[int]]) -> int:
    """Tokens that all `prompts` begin with; at least one of each is left, whose logits choose the reply's first."""
    longest = min(map(len, prompts)) - 1
    return next((i for i in range(longest) if any(prompt[i] != first[i] for prompt in prompts)), longest)


def _row(model: Any, number: int, prompt: Sequence[int], decoding: Decoding) -> _Row:
    chance = None
    if decoding.temperature > 0:
        digest = hashlib.sha256(f"{decoding.seed} {list(prompt)}".encode()).digest()
        chance = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    room = getattr(model.config, "max_position_embeddings", None)
    limit = decoding.max_new_tokens if room is None else min(decoding.max_new_tokens, max(room - len(prompt), 1))
    return _Row(number, prompt, [], chance, limit)


def _reply(
    model: Any,
    rows: list[_Row],
    shared: int,
    cache: Any,
    stops: set[int],
    decoding: Decoding,
    margin: float,
    done: Done,
) -> None:
    """Generate the replies of `rows`, whose first `shared` tokens are in `cache`; a finished row leaves the batch."""
    device = model.device
    if cache is not None:
        cache.batch_repeat_interleave(len(rows))
    longest = max(len(row.prompt) for row in rows)
    padding = [longest - len(row.prompt) for row in rows]
    ids = torch.tensor([[0] * left + list(row.prompt[shared:]) for row, left in zip(rows, padding, strict=True)])
    mask = torch.ones(len(rows), longest, dtype=torch.long)
    for place, left in enumerate(padding):
        mask[place, shared : shared + left] = 0
    ids, mask = ids.to(device), mask.to(device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, shared:]
    while rows:
        logits, cache = _next(model, ids, mask, positions, cache)
        going = []
        for place, row in enumerate(rows):
            token = _token(model, row, None if logits is None else logits[place], decoding, margin)
            ended = token in stops
            if not ended:
                row.reply.append(token)
            if ended or len(row.reply) == row.limit:
                done(row.number, tuple(row.reply), ended)
            else:
                going.append(place)
        if len(going) < len(rows):
            rows, kept = [rows[place] for place in going], torch.tensor(going, dtype=torch.long, device=device)
            mask = mask[kept]
            if rows and cache is not None:
                cache.batch_select_indices(kept)
        ids = torch.tensor([[row.reply[-1]] for row in rows], device=device)
        positions = torch.tensor([[len(row.prompt) + len(row.reply) - 1] for row in rows], device=device)
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], 1)


def _next(
    model: Any, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: Any
) -> tuple[torch.Tensor | None, Any]:
    """Logits (rows, vocabulary) behind `ids`, and the longer cache; None for a model without keys and values."""
    if model.config.model_type in STATE:
        return None, None
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    placed = {"position_ids": positions} if "position_ids" in inspect.signature(base.forward).parameters else {}
    out = model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1, **placed)
    return out.logits[:, -1].float(), out.past_key_values


def _token(model: Any, row: _Row, logits: torch.Tensor | None, decoding: Decoding, margin: float) -> int:
    """The next token of `row`: by the batch's `logits` if rounding cannot turn the choice, else from `row` alone."""
    noise = None
    if row.chance is not None:
        # the largest of log p + Gumbel noise is a draw from p (Gumbel-max; arXiv 1411.0030)
        noise = -torch.empty(model.config.get_text_config().vocab_size).exponential_(generator=row.chance).log()
        noise = noise.to(model.device)
    if logits is not None:
        token, sure = choose(penalised(logits, row, decoding), noise, decoding, margin)
        if sure:
            return token
    ids = torch.tensor([[*row.prompt, *row.reply]], device=model.device)
    alone = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[0, -1].float()
    return choose(penalised(alone, row, decoding), noise, decoding, 0.0)[0]


def penalised(logits: torch.Tensor, row: _Row, decoding: Decoding) -> torch.Tensor:
    """`logits` (vocabulary) with the tokens of prompt and reply made less likely."""
    if decoding.repetition_penalty == 1:
        return logits
    seen = torch.tensor([*row.prompt, *row.reply], device=logits.device)
    values, by = logits[seen], decoding.repetition_penalty
    return logits.scatter(0, seen, torch.where(values < 0, values * by, values / by))


def choose(logits: torch.Tensor, noise: torch.Tensor | None, decoding: Decoding, margin: float) -> tuple[int, bool]:
    """The token that `logits` and `noise` (vocabulary) choose, and whether logits off by half of `margin` would too."""
    if noise is None:
        (best, second), (token, _) = (x.tolist() for x in logits.topk(2))
        return token, margin == 0 or best - second > margin
    margin /= decoding.temperature
    likely = (logits / decoding.temperature).log_softmax(-1)
    chances, order = likely.exp().sort(descending=True, stable=True)
    ahead = chances.cumsum(0) - chances  # probability of all likelier tokens together (nucleus, arXiv 1904.09751)
    scores = (likely + noise[: len(likely)])[order]
    edge = margin / 4 if decoding.top_p < 1 else 0.0  # a logit off by d moves such a sum by d / 4 at most
    winners, gaps = [], []
    for top_p in (decoding.top_p - edge, decoding.top_p + edge):
        inside = scores.masked_fill((ahead >= top_p) & (ahead > 0), -torch.inf)
        (best, second), (place, _) = (x.tolist() for x in inside.topk(2))
        winners.append(int(order[place]))
        gaps.append(best - second)
    return winners[0], margin == 0 or (len(set(winners)) == 1 and min(gaps) > margin)


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


def reply_to_all(
    speaker: Speaker,
    prompts: Sequence[Sequence[Message]],
    decoding: Decoding,
    batch_size: int,
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
    dtype = speaker.model.get_input_embeddings().weight.dtype
    keys = {ids: finished.key(ids, decoding, adapter, str(dtype)) for ids in different} if finished else {}
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
        margin = MARGIN.get(dtype, MARGIN[torch.bfloat16])
        off = not adapter and speaker.kind == "adapter"
        with unpacked(speaker.model), speaker.model.disable_adapter() if off else nullcontext():
            generate(speaker.model, missing, stops, decoding, batch_size, margin, done)
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
