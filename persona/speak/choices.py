"""The choice of a reply's next token from its logits, and whether rounding could turn it."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch


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


def chance_of(prompt: Sequence[int], decoding: Decoding) -> torch.Generator | None:
    """The random numbers of the reply to `prompt`, whatever row it is in; None for greedy decoding."""
    if decoding.temperature == 0:
        return None
    digest = hashlib.sha256(f"{decoding.seed} {list(prompt)}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


def noise_of(chance: torch.Generator | None, size: int, device: torch.device) -> torch.Tensor | None:
    """Gumbel noise for the next token (`size`): the largest of log p + noise is a draw from p (arXiv 1411.0030)."""
    if chance is None:
        return None
    return (-torch.empty(size).exponential_(generator=chance).log()).to(device)


def penalised(logits: torch.Tensor, seen: Sequence[int], decoding: Decoding) -> torch.Tensor:
    """`logits` (vocabulary) with the tokens in `seen` made less likely."""
    if decoding.repetition_penalty == 1:
        return logits
    places = torch.tensor(seen, device=logits.device)
    values, by = logits[places], decoding.repetition_penalty
    return logits.scatter(0, places, torch.where(values < 0, values * by, values / by))


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
