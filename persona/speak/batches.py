"""Many replies at a time, each the same as if it were generated alone.

Neither the number of rows nor their order decides a token. Random numbers belong to a prompt and a place in its reply,
not to a row. Prompts that begin alike share the keys and values of their common beginning. Matrix products of other
shapes round otherwise; `measure` finds out how much, and `Rounding` says what is done about it.
"""

import inspect
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from persona.engine.trial import STATE, carries_state, has_experts, why_not
from persona.speak.choices import Decoding, chance_of, choose, noise_of, penalised
from persona.speak.past import Past, logits_behind, own_past, read, whole_chunks
from persona.speak.rounding import LOOSE, ONE_BY_ONE, WIDTH, Rounding, with_margin

TRIED, STEPS = 3, 2  # prompts that are measured, and the tokens behind each


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
    past: Past
    alone: Past
    """The past that passes over this row alone have read."""


Done = Callable[[int, tuple[int, ...], bool], None]


@dataclass
class _Work:
    """One call of `generate`."""

    model: Any
    prompts: Sequence[Sequence[int]]
    stops: frozenset[int]
    decoding: Decoding
    batch_size: int
    rounding: Rounding
    done: Done
    again: int = 0
    """Choices that were made again."""


def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    stops: Sequence[int],
    decoding: Decoding,
    batch_size: int,
    rounding: Rounding,
    done: Done,
) -> int:
    """Call `done(number of the prompt, ids of its reply, whether it ended by itself)` for each of `prompts`.

    They come in no certain order; a reply's ids are without the token that ended it. Returns the number of choices that
    were made again. With `LOOSE`, the result holds for this batch size and these prompts only.
    """
    work = _Work(model, prompts, frozenset(stops), decoding, batch_size, rounding, done)
    own, padded = _ways(model, prompts, decoding.max_new_tokens)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            if own:
                with own_past(model):
                    _in_own_rows(work, own)
            _in_padded_rows(work, padded)
    finally:
        model.train(was_training)
    return work.again


def _ways(model: Any, prompts: Sequence[Sequence[int]], new_tokens: int) -> tuple[list[int], list[int]]:
    """The numbers of the prompts whose rows can hold their own past, as in models of prefix trees, and of the others.

    Each for itself: rotary positions that are others in long rows are the same in short ones, whatever is asked beside.
    """
    shares = [why_not(model.config, len(ids) + new_tokens) is None for ids in prompts]
    own = [number for number, free in enumerate(shares) if free and not carries_state(model.config)]
    return own, sorted(set(range(len(prompts))).difference(own))


def _row(work: _Work, number: int) -> _Row:
    prompt, limit = work.prompts[number], work.decoding.max_new_tokens
    room = getattr(work.model.config, "max_position_embeddings", None)
    limit = limit if room is None else min(limit, max(room - len(prompt), 1))
    return _Row(number, prompt, [], chance_of(prompt, work.decoding), limit, Past(), Past())


def _goes_on(work: _Work, row: _Row, logits: torch.Tensor | None, alone: Callable[[_Row], torch.Tensor] | None) -> bool:
    """Choose the next token of `row` by `logits`, or by those of `alone` if rounding could turn the choice.

    False if the reply is finished; it is handed over.
    """
    model, decoding = work.model, work.decoding
    seen = [*row.prompt, *row.reply]
    noise = noise_of(row.chance, model.config.get_text_config().vocab_size, model.device)
    token, sure = -1, False
    if logits is not None:
        margin = 0.0 if alone is None else work.rounding.margin
        token, sure = choose(penalised(logits, seen, decoding), noise, decoding, margin)
        work.again += not sure
    if alone is not None and not sure:
        token, _ = choose(penalised(alone(row), seen, decoding), noise, decoding, 0.0)
    ended = token in work.stops
    if not ended:
        row.reply.append(token)
    if not ended and len(row.reply) < row.limit:
        return True
    work.done(row.number, tuple(row.reply), ended)
    return False


# --- rows that hold their own past ------------------------------------------------------------------------------------


def _in_own_rows(work: _Work, numbers: Sequence[int]) -> None:
    """Generate the replies to the prompts of these `numbers`; the place of a finished row goes to the next prompt."""
    # in the order of their tokens, so that each shares as much as possible with the one before it
    waiting = sorted(numbers, key=lambda number: tuple(work.prompts[number]), reverse=True)
    size = 1 if work.rounding.rows == 1 else work.batch_size
    rows: list[_Row] = []
    before: tuple[Sequence[int], Past] = (), Past()

    def alone(row: _Row) -> torch.Tensor:
        return _read_alone(work.model, row)

    while rows or waiting:
        while waiting and len(rows) < size:
            row = _row(work, waiting.pop())
            row.past = _beginning(before, row.prompt)
            before = row.prompt, row.past
            if _goes_on(work, row, read(work.model, row.past, row.prompt), None):
                rows.append(row)
        logits = _steps(work.model, [(row.reply[-1], row.past) for row in rows], work.rounding.rows)
        rows = [row for row, own in zip(rows, logits, strict=True) if _goes_on(work, row, own, alone)]


def _beginning(before: tuple[Sequence[int], Past], prompt: Sequence[int]) -> Past:
    """The past of `prompt` as far as it is that of the prompt `before` too, in whole chunks.

    At least one token is left, whose logits choose the reply's first.
    """
    other, past = before
    longest = min(len(other), len(prompt) - 1)
    common = next((i for i in range(longest) if other[i] != prompt[i]), longest)
    return past.beginning(whole_chunks(common))


def _steps(model: Any, rows: Sequence[tuple[int, Past]], width: int | None) -> list[torch.Tensor]:
    """Logits (vocabulary) behind one more token for each of `rows`, `width` rows in a pass, filled up."""
    logits: list[torch.Tensor] = []
    size = width or max(1, len(rows))
    for first in range(0, len(rows), size):
        some = rows[first : first + size]
        empty = (size - len(some)) if width else 0
        ids = [[token] for token, _ in some] + [[0]] * empty
        logits += logits_behind(model, ids, [past for _, past in some] + [None] * empty)[: len(some)]
    return logits


def _read_alone(model: Any, row: _Row) -> torch.Tensor:
    """Logits behind `row` from passes over it alone, of which those over whole chunks are kept for the next time."""
    if not row.alone.tokens:
        row.alone = row.past.beginning(whole_chunks(len(row.prompt)))
    row.alone.tokens = whole_chunks(row.alone.tokens)
    return read(model, row.alone, [*row.prompt, *row.reply])


# --- padded rows ------------------------------------------------------------------------------------------------------


def _in_padded_rows(work: _Work, numbers: Sequence[int]) -> None:
    """Generate the replies by the model's own cache, padding on the left, the longest prompts first.

    If rows of a fixed number were to hold their own past, which these cannot, it is one reply at a time.
    """
    ordered = sorted(numbers, key=lambda number: (-len(work.prompts[number]), number))
    size = work.batch_size if work.rounding.rows is None else 1
    for first in range(0, len(ordered), size):
        _reply(work, [_row(work, number) for number in ordered[first : first + size]])


def _reply(work: _Work, rows: list[_Row]) -> None:
    """Generate the replies of `rows`; a finished row leaves the batch."""
    model, device, cache = work.model, work.model.device, None

    def alone(row: _Row) -> torch.Tensor:
        return _whole_pass(model, [*row.prompt, *row.reply])

    ids, mask = _padded([row.prompt for row in rows], device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    while rows:
        logits, cache = _next(model, ids, mask, positions, cache)
        going = []
        for place, row in enumerate(rows):
            if _goes_on(work, row, None if logits is None else logits[place], alone):
                going.append(place)
        if len(going) < len(rows):
            rows, kept = [rows[place] for place in going], torch.tensor(going, dtype=torch.long, device=device)
            mask = mask[kept]
            if rows and cache is not None:
                cache.reorder_cache(kept)
        ids = torch.tensor([[row.reply[-1]] for row in rows], device=device)
        positions = torch.tensor([[len(row.prompt) + len(row.reply) - 1] for row in rows], device=device)
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], 1)


def _padded(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The ids of `prompts` (rows, longest), padded on the left, and a mask that is 0 there."""
    padding = [max(map(len, prompts)) - len(prompt) for prompt in prompts]
    ids = [[0] * left + list(prompt) for prompt, left in zip(prompts, padding, strict=True)]
    mask = [[0] * left + [1] * len(prompt) for prompt, left in zip(prompts, padding, strict=True)]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


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


def _whole_pass(model: Any, ids: Sequence[int]) -> torch.Tensor:
    """Logits (vocabulary) behind `ids` from one pass over all of them."""
    row = torch.tensor([ids], device=model.device)
    return model(input_ids=row, use_cache=False, logits_to_keep=1).logits[0, -1].float()


# --- rounding ---------------------------------------------------------------------------------------------------------


def measure(model: Any, prompts: Sequence[Sequence[int]], new_tokens: int) -> Rounding:
    """How to decode on this device so that company changes no reply, tried with a few of `prompts`.

    The same for every batch size, since the replies have to be.
    """
    if model.config.model_type in STATE:
        return LOOSE  # each token has a pass of its own anyway
    half = model.get_input_embeddings().weight.dtype != torch.float32
    own, padded = _ways(model, prompts, new_tokens)
    if half and (not own or has_experts(model.config)):  # an expert's products have a shape for each batch
        return ONE_BY_ONE
    ordered = sorted((prompts[number] for number in own or padded), key=len)
    tried = [
        ordered[place * (len(ordered) - 1) // (2 * TRIED)] for place in range(TRIED)
    ]  # below the median, to be quick
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), own_past(model) if own else nullcontext():
            if not own:
                return with_margin(_padded_difference(model, tried))
            by_company, by_shape = _own_differences(model, tried, WIDTH if half else None)
    finally:
        model.train(was_training)
    return Rounding(0.0, 0.0, WIDTH) if half and by_company == 0 else with_margin(max(by_company, by_shape))


def _own_differences(model: Any, prompts: Sequence[Sequence[int]], width: int | None) -> tuple[float, float]:
    """Largest difference of a logit between a row among others and the row alone, and to a pass over all its tokens."""
    tails = [[prompt[step % len(prompt)] for step in range(STEPS)] for prompt in prompts]
    pasts: list[Past] = []
    for number, prompt in enumerate(prompts):
        pasts.append(_beginning((prompts[number - 1], pasts[-1]) if pasts else ((), Past()), prompt))
        read(model, pasts[-1], prompt)

    def behind(places: Sequence[int]) -> torch.Tensor:
        """Logits (steps, rows, vocabulary) of the prompts at `places`, side by side."""
        rows = [pasts[place].beginning(len(prompts[place])) for place in places]
        steps = zip(*(tails[place] for place in places), strict=True)
        return torch.stack([torch.stack(_steps(model, list(zip(step, rows, strict=True)), width)) for step in steps])

    places = [place % len(prompts) for place in range(WIDTH)]
    together = behind(places)
    alone = torch.cat([behind([place]) for place in range(len(prompts))], 1)[:, places]
    passes = [
        read(model, past.beginning(whole_chunks(len(prompt))), [*prompt, *tail])
        for past, prompt, tail in zip(pasts, prompts, tails, strict=True)
    ]
    right = torch.stack([passes[place] for place in places])
    return float((together - alone).abs().max()), float((together[-1] - right).abs().max())


def _padded_difference(model: Any, prompts: Sequence[Sequence[int]]) -> float:
    """Largest difference of a logit between a prompt among others and the prompt alone."""
    ids, mask = _padded(prompts, model.device)
    together, _ = _next(model, ids, mask, (mask.cumsum(1) - 1).clamp(min=0), None)
    alone = torch.stack([_whole_pass(model, prompt) for prompt in prompts])
    return 0.0 if together is None else float((together - alone).abs().max())
