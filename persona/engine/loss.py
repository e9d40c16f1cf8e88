"""The loss of a pack: negative log-likelihood at the supervised positions, without the logits of all the others."""

from typing import Any

import torch
import torch.nn.functional as F

from persona.engine.attention import NAME
from persona.engine.fused import KNOWN, compute_dtype
from persona.engine.packing import Pack

CHUNK = 2**24  # logits that exist at a time; in 16 bits these are 32 MiB
PIECE = 2**20  # logits turned into float32 probabilities at a time on a CPU: few enough to stay in a core's cache
PIECE_ON_GPU = 2**23  # a GPU works through more of them sooner than it starts many times


def negative_log_likelihood(model: Any, packed: Pack) -> torch.Tensor:
    """Sum over the pack's supervised tokens of -ln p(token), in float32."""
    if (hidden := _before_output_layer(model, packed)) is None:
        return F.cross_entropy(supervised_logits(model, packed).float(), packed.targets, reduction="sum")
    loss: Any = _NegativeLogLikelihood.apply(hidden, model.get_output_embeddings().weight, packed.targets)
    return loss


def token_losses(model: Any, packed: Pack) -> torch.Tensor:
    """-ln p of every supervised token of the pack (supervised,), in float32 and without gradients."""
    with torch.no_grad():
        hidden = _before_output_layer(model, packed)
        rows = supervised_logits(model, packed) if hidden is None else hidden
        weight = None if hidden is None else model.get_output_embeddings().weight.to(hidden.dtype)
        size = max(1, CHUNK // (rows.shape[1] if weight is None else len(weight)))
        losses = []
        for start in range(0, len(rows), size):
            piece, wanted = rows[start : start + size], packed.targets[start : start + size]
            logits = piece if weight is None else F.linear(piece, weight)
            losses.append(F.cross_entropy(logits.float(), wanted, reduction="none"))
        return torch.cat(losses)


def _before_output_layer(model: Any, packed: Pack) -> torch.Tensor | None:
    """Input of the output layer at the supervised positions (supervised, size); None if that layer is not plain."""
    head = model.get_output_embeddings()
    if model.config.model_type not in KNOWN or head.bias is not None:
        return None
    head.forward = lambda hidden: hidden  # the output layer is applied elsewhere
    try:
        hidden = supervised_logits(model, packed)
    finally:
        del head.forward
    return hidden.to(compute_dtype(hidden))


def supervised_logits(model: Any, packed: Pack) -> torch.Tensor:
    """Logits (supervised, vocabulary) of a pack; the output layer runs on the supervised positions only.

    The positions are picked in front of the output layer, whatever the architecture does behind it (soft caps, scales).
    """
    head = model.get_output_embeddings()
    picked = head.register_forward_pre_hook(
        lambda _, inputs: (inputs[0].flatten(0, 1).index_select(0, packed.positions).unsqueeze(0), *inputs[1:])
    )
    try:
        return model(**_inputs(packed, model.config)).logits[0]
    finally:
        picked.remove()


def _inputs(packed: Pack, config: Any) -> dict[str, Any]:
    row = {"input_ids": packed.input_ids, "use_cache": False}
    if packed.tree is None:
        return row
    if config._attn_implementation != NAME:  # any other attention would not look at the tree, and say nothing
        raise ValueError(f"a prefix tree needs the attention {NAME}, not {config._attn_implementation}")
    # transformers passes a 4-D mask through unchanged; this keeps it from building its own
    nothing = torch.empty(1, 1, 1, 1, device=packed.input_ids.device)
    return row | {"position_ids": packed.position_ids, "tree": packed.tree, "attention_mask": nothing}


class _NegativeLogLikelihood(torch.autograd.Function):
    """Computes the gradient with the loss, chunk by chunk, so that logits are never kept (as in arXiv 2410.10989)."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        weight = weight.to(hidden.dtype)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        size = max(1, CHUNK // len(weight))
        few = max(1, (PIECE if hidden.device.type == "cpu" else PIECE_ON_GPU) // len(weight))
        for start in range(0, len(hidden), size):
            logits = F.linear(hidden[start : start + size], weight)
            pieces = zip(logits.split(few), targets[start : start + size, None].split(few), strict=True)
            for piece, wanted in pieces:
                logs = torch.log_softmax(piece, -1, dtype=torch.float32)
                total -= logs.gather(1, wanted).sum()
                if gradient is not None:
                    chances = logs.exp_()
                    chances.scatter_add_(1, wanted, chances.new_full((1, 1), -1.0).expand_as(wanted))
                    piece.copy_(chances)
            if gradient is not None:
                torch.mm(logits, weight, out=gradient[start : start + size])
        ctx.gradient = gradient
        return total

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return (ctx.gradient.float() * grads[0]).to(ctx.gradient.dtype), None, None
