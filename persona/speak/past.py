"""The keys and values of each reply held by themselves, so that a row of a batch is computed as if it were alone.

In a padded batch the length of the padding, and so the company of a row, decides how its attention is rounded. Here a
row attends to its own keys and values alone. Tokens of a prompt go through the model in passes that end at multiples
of `CHUNK`, whatever comes after them: so the keys of a beginning that two prompts share are the same bits in both, and
the second takes them from the first. What rows still do together are matrix products, and there a row's result does
not depend on the others if their number is always the same; `persona.speak.batches.measure` tries that on the device.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from persona.engine.attention import NotCarried, Softmax, attend_by, plain_attention

NAME = "own_past"
CHUNK = 128  # few passes for a prompt, and little of a shared beginning lost; on paper, not tuned on a GPU
ROOM = 64  # tokens by which the memory for keys and values grows


class Past:
    """The keys and values of a sequence's tokens in all layers."""

    def __init__(self) -> None:
        self.tokens = 0
        """The number of its tokens; a smaller one forgets those behind."""
        self._layers: dict[int, list[torch.Tensor]] = {}  # keys and values, each (groups, room, size)

    def extended(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> list[torch.Tensor]:
        """Keys and values (groups, tokens, size) of one layer with new ones (groups, new tokens, size) behind.

        `tokens` has to be raised when all layers have theirs.
        """
        end = self.tokens + key.shape[1]
        held = self._layers.get(layer)
        if held is None or held[0].shape[1] < end:
            larger = [new.new_empty(new.shape[0], -(-end // ROOM) * ROOM, new.shape[2]) for new in (key, value)]
            for into, old in zip(larger, held or [], strict=False):
                into[:, : self.tokens] = old[:, : self.tokens]
            self._layers[layer] = held = larger
        for into, new in zip(held, (key, value), strict=True):
            into[:, self.tokens : end] = new
        return [one[:, :end] for one in held]

    def beginning(self, tokens: int) -> "Past":
        """A copy of the first `tokens`."""
        copy = Past()
        copy.tokens = tokens
        copy._layers = {layer: [one[:, :tokens].clone() for one in held] for layer, held in self._layers.items()}
        return copy


@contextmanager
def own_past(model: Any) -> Iterator[None]:
    """Inside, `model` has the attention that `logits_behind` needs."""
    whole = model.get_base_model() if hasattr(model, "get_base_model") else model
    before = model.config._attn_implementation
    attend_by(whole, NAME)
    try:
        yield
    finally:
        attend_by(whole, before)


def logits_behind(model: Any, ids: Sequence[Sequence[int]], pasts: Sequence[Past | None]) -> torch.Tensor:
    """Logits (rows, vocabulary) in float32 behind `ids`, as many for each row, which join the row's past.

    A row without a past only fills up the batch.
    """
    device, length = model.device, len(ids[0])
    starts = torch.tensor([0 if past is None else past.tokens for past in pasts], device=device)
    positions = starts[:, None] + torch.arange(length, device=device)
    # transformers passes a 4-D mask through unchanged; NaN, so that an attention that takes it for one is noticed
    nothing = torch.full((1, 1, 1, 1), torch.nan, device=device)
    out = model(
        input_ids=torch.tensor(ids, device=device),
        position_ids=positions,
        attention_mask=nothing,
        pasts=pasts,
        use_cache=False,
        logits_to_keep=1,
    )
    for past in pasts:
        if past is not None:
            past.tokens += length
    return out.logits[:, -1].float()


def read(model: Any, past: Past, ids: Sequence[int]) -> torch.Tensor:
    """Logits (vocabulary) behind `ids`, a sequence that begins with the tokens in `past` and is longer.

    It depends on `ids` alone, bit for bit, if `past` was read too and has a multiple of `CHUNK` tokens.
    """
    logits = None
    while past.tokens < len(ids):
        end = min(len(ids), (past.tokens // CHUNK + 1) * CHUNK)
        logits = logits_behind(model, [ids[past.tokens : end]], [past])[0]
    if logits is None:
        raise ValueError("nothing is left to be read")
    return logits


def whole_chunks(tokens: int) -> int:
    """The largest multiple of `CHUNK` up to `tokens`."""
    return tokens // CHUNK * CHUNK


def _attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    pasts: Sequence[Past | None] | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    if pasts is None:
        raise NotCarried("its layers do not hand the past on to their attention")
    rows, heads, length, size = query.shape
    softmax = Softmax(size**-0.5 if scaling is None else scaling, softcap, s_aux)
    out = query.new_zeros(rows, length, heads, value.shape[3])
    for row, past in enumerate(pasts):
        if past is not None:
            keys, values = past.extended(module.layer_idx, key[row], value[row])
            out[row] = _attention(query[row], keys, values, softmax, sliding_window).transpose(0, 1)
    return out, None


def _attention(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, softmax: Softmax, window: int | None
) -> torch.Tensor:
    """Causal attention (heads, length, size) of the last `length` of the keys' tokens, over `window` tokens."""
    heads, length, size = query.shape
    groups, tokens, _ = keys.shape
    if window is not None and tokens - length >= window:  # none of them attends to those before
        keys, values = (x[:, tokens - length - window + 1 :] for x in (keys, values))
        tokens = keys.shape[1]
    mask = None
    if length > 1:
        mask = torch.ones(length, tokens, dtype=torch.bool, device=query.device).tril(tokens - length)
        mask = mask if window is None else mask.triu(tokens - length - window + 1)
    if softmax.cap is not None or softmax.sinks is not None:
        return plain_attention(query[None], keys[None], values[None], mask, softmax)[0]
    # heads of one group side by side, like more tokens: grouped-query attention without copies of the keys
    together = query.reshape(1, groups, heads // groups * length, size)
    mask = None if mask is None else mask.repeat(heads // groups, 1)
    out = F.scaled_dot_product_attention(together, keys[None], values[None], attn_mask=mask, scale=softmax.scale)
    return out.reshape(heads, length, values.shape[2])


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
