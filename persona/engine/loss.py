"""The loss of a pack: negative log-likelihood at the supervised positions, without the logits of all the others."""

from typing import Any

import torch
import torch.nn.functional as F

from persona.engine.attention import NAME
from persona.engine.fused import KNOWN, compute_dtype
from persona.engine.packing import Pack

# The logits of these are W h, those of the others in `_scale_and_cap` too, but for a scale and a soft cap. Each is held
# to the loss and gradients of the whole model by tests/engine/test_loss.py.
PLAIN = KNOWN | {
    "arcee", "ernie4_5", "exaone4", "gemma", "glm", "glm4", "helium", "hunyuan_v1_dense", "ministral", "ministral3",
    "mixtral", "olmo2", "olmo3", "phi3", "qwen2_moe", "qwen3_moe", "seed_oss", "smollm3", "starcoder2",
}  # fmt: skip
# Logits that exist at a time, in 16 bits 32 MiB and 128 MiB. A GPU reads the whole output layer for each chunk.
CHUNK, CHUNK_ON_GPU = 2**24, 2**26
# Logits turned into float32 probabilities at a time. On a CPU they stay in a core's cache; a GPU works through more of
# them sooner than it starts many times.
PIECE, PIECE_ON_GPU = 2**20, 2**23


def negative_log_likelihood(model: Any, packed: Pack) -> torch.Tensor:
    """Sum over the pack's supervised tokens of -ln p(token), in float32."""
    if (known := _scale_and_cap(model)) is None:
        return F.cross_entropy(supervised_logits(model, packed).float(), packed.targets, reduction="sum")
    hidden, weight = _before_output_layer(model, packed), model.get_output_embeddings().weight
    loss: Any = _NegativeLogLikelihood.apply(hidden, weight, packed.targets, *known)
    return loss


def token_losses(model: Any, packed: Pack) -> torch.Tensor:
    """-ln p of every supervised token of the pack (supervised,), in float32 and without gradients."""
    with torch.no_grad():
        known = _scale_and_cap(model)
        rows = supervised_logits(model, packed) if known is None else _before_output_layer(model, packed)
        weight = None if known is None else model.get_output_embeddings().weight.to(rows.dtype)
        size = _rows_at_once(rows, rows.shape[1] if weight is None else len(weight), CHUNK, CHUNK_ON_GPU)
        losses = []
        for start in range(0, len(rows), size):
            piece, wanted = rows[start : start + size], packed.targets[start : start + size]
            logits = piece if weight is None or known is None else _scaled(F.linear(piece, weight), *known)
            losses.append(F.cross_entropy(logits.float(), wanted, reduction="none"))
        return torch.cat(losses)


def _scale_and_cap(model: Any) -> tuple[float, float | None] | None:
    """Scale and soft cap of the logits behind the output layer, for `_scaled`; None if the architecture is unknown."""
    config = model.config
    if model.get_output_embeddings().bias is not None:
        return None
    match config.model_type:
        case "granite" | "granitemoe":
            return 1 / config.logits_scaling, None
        case "cohere" | "cohere2":
            return config.logit_scale, None
        case "gemma2" | "gemma3_text" | "gemma4_text":
            return 1.0, config.final_logit_softcapping
        case kind:
            return (1.0, None) if kind in PLAIN else None


def _scaled(logits: torch.Tensor, scale: float, cap: float | None) -> torch.Tensor:
    """The logits that the model returns: `logits` times `scale`, and that held below `cap` by a tanh, in float32."""
    if scale == 1 and cap is None:
        return logits
    wide = logits.float() * scale
    return wide if cap is None else wide.div_(cap).tanh_().mul_(cap)


def _rows_at_once(like: torch.Tensor, words: int, on_cpu: int, on_gpu: int) -> int:
    return max(1, (on_cpu if like.device.type == "cpu" else on_gpu) // words)


def _before_output_layer(model: Any, packed: Pack) -> torch.Tensor:
    """Input of the output layer at the supervised positions (supervised, size)."""
    head = model.get_output_embeddings()
    inputs: list[torch.Tensor] = []
    # the output layer is applied elsewhere, and what the model makes of its input instead is not used
    head.forward = lambda hidden: inputs.append(hidden) or hidden
    try:
        supervised_logits(model, packed)
    finally:
        del head.forward
    return inputs[0][0].to(compute_dtype(inputs[0]))


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
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, scale: float, cap: float | None
    ) -> torch.Tensor:
        weight = weight.to(hidden.dtype)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        size = _rows_at_once(hidden, len(weight), CHUNK, CHUNK_ON_GPU)
        few = _rows_at_once(hidden, len(weight), PIECE, PIECE_ON_GPU)
        for start in range(0, len(hidden), size):
            logits = F.linear(hidden[start : start + size], weight)
            pieces = zip(logits.split(few), targets[start : start + size, None].split(few), strict=True)
            for piece, wanted in pieces:
                scaled = _scaled(piece, scale, cap)
                logs = torch.log_softmax(scaled, -1, dtype=torch.float32)
                total -= logs.gather(1, wanted).sum()
                if gradient is not None:
                    chances = logs.exp_()
                    chances.scatter_add_(1, wanted, chances.new_full((1, 1), -1.0).expand_as(wanted))
                    if cap is not None:
                        chances.mul_(scaled.div_(cap).square_().neg_().add_(1))
                    piece.copy_(chances)
            if gradient is not None:
                torch.mm(logits, weight, out=gradient[start : start + size])
        ctx.gradient, ctx.scale = gradient, scale
        return total

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        gradient = (ctx.gradient.float() * (grads[0] * ctx.scale)).to(ctx.gradient.dtype)
        return gradient, None, None, None, None
