"""The loss of a pack: negative log-likelihood at the supervised positions, without the logits of all the others."""

from typing import Any

import torch
import torch.nn.functional as F

from persona.engine.attention import NAME, NAMES
from persona.engine.fused import KNOWN, compute_dtype
from persona.engine.packing import Pack
from persona.engine.recurrent import CARRYING, carry_over_trees

# The logits of the first are W h, or W h times a constant, which is a constant of h then; those of the second have a
# soft cap. Each is held to the whole model by tests/engine/test_loss.py.
LINEAR = KNOWN | {
    *CARRYING,
    "apertus", "arcee", "cohere", "cohere2", "deepseek_v2", "deepseek_v3", "ernie4_5", "exaone4", "gemma", "glm",
    "glm4", "glm4_moe", "gpt_oss", "granite", "granitemoe", "helium", "hunyuan_v1_dense", "minicpm3", "ministral",
    "mixtral", "olmo2", "olmo3", "phi3", "qwen2_moe", "qwen3_moe", "seed_oss", "smollm3", "starcoder2",
}  # fmt: skip
CAPPED = frozenset({"gemma2", "gemma3_text", "gemma4_text", "gemma4_unified_text"})
# Logits that exist at a time, in 16 bits 32 MiB and 128 MiB. A GPU reads the whole output layer for each chunk.
CHUNK, CHUNK_ON_GPU = 2**24, 2**26
# Logits turned into float32 probabilities at a time. On a CPU they stay in a core's cache; a GPU works through more of
# them sooner than it starts many times.
PIECE, PIECE_ON_GPU = 2**20, 2**23


def negative_log_likelihood(model: Any, packed: Pack) -> torch.Tensor:
    """Sum over the pack's supervised tokens of -ln p(token), in float32."""
    if (hidden := _before_output_layer(model, packed)) is None:
        return F.cross_entropy(supervised_logits(model, packed).float(), packed.targets, reduction="sum")
    weight, cap = model.get_output_embeddings().weight, _cap(model.config)
    loss: Any = _NegativeLogLikelihood.apply(hidden, weight, packed.targets, cap)
    return loss


def token_losses(model: Any, packed: Pack) -> torch.Tensor:
    """-ln p of every supervised token of the pack (supervised,), in float32 and without gradients."""
    with torch.no_grad():
        hidden = _before_output_layer(model, packed)
        rows = supervised_logits(model, packed) if hidden is None else hidden
        weight = None if hidden is None else model.get_output_embeddings().weight.to(hidden.dtype)
        size = _rows_at_once(rows, rows.shape[1] if weight is None else len(weight), CHUNK, CHUNK_ON_GPU)
        losses = []
        for start in range(0, len(rows), size):
            piece, wanted = rows[start : start + size], packed.targets[start : start + size]
            logits = piece if weight is None else _capped(F.linear(piece, weight), _cap(model.config))
            losses.append(F.cross_entropy(logits.float(), wanted, reduction="none"))
        return torch.cat(losses)


def _cap(config: Any) -> float | None:
    """The soft cap of the logits, if the architecture has one."""
    text = config.get_text_config()
    return text.final_logit_softcapping if text.model_type in CAPPED else None


def _capped(logits: torch.Tensor, cap: float | None) -> torch.Tensor:
    """`logits` held below `cap` by a tanh, in float32 (Gemma 2, arXiv 2408.00118)."""
    return logits if cap is None else (logits.float() / cap).tanh_().mul_(cap)


def _rows_at_once(like: torch.Tensor, words: int, on_cpu: int, on_gpu: int) -> int:
    return max(1, (on_cpu if like.device.type == "cpu" else on_gpu) // words)


def _before_output_layer(model: Any, packed: Pack) -> torch.Tensor | None:
    """Input of the output layer at the supervised positions (supervised, size), times the scale of the logits.

    None if the architecture is not among those above, or its output layer has a bias.
    """
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    if config.model_type not in LINEAR | CAPPED or head.bias is not None:
        return None
    cap = _cap(config)
    head.forward = lambda hidden: hidden  # the output layer is applied elsewhere, and the cap behind it too
    if cap is not None:
        config.final_logit_softcapping = None
    try:
        hidden = supervised_logits(model, packed)
    finally:
        del head.forward
        if cap is not None:
            config.final_logit_softcapping = cap
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
    if config._attn_implementation not in NAMES:  # any other attention would not look at the tree, and say nothing
        raise ValueError(f"a prefix tree needs the attention {NAME}, not {config._attn_implementation}")
    if (kind := config.get_text_config().model_type) in CARRYING:
        carry_over_trees(kind)
    # transformers passes a 4-D mask through unchanged; this keeps it from building its own, and no one can use it
    nothing = torch.full((1, 1, 1, 1), torch.nan, device=packed.input_ids.device)
    return row | {"position_ids": packed.position_ids, "tree": packed.tree, "attention_mask": nothing}


class _NegativeLogLikelihood(torch.autograd.Function):
    """Computes the gradient with the loss, chunk by chunk, so that logits are never kept (as in arXiv 2410.10989)."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, cap: float | None
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
                capped = _capped(piece, cap)
                logs = torch.log_softmax(capped, -1, dtype=torch.float32)
                total -= logs.gather(1, wanted).sum()
                if gradient is not None:
                    chances = logs.exp_()
                    chances.scatter_add_(1, wanted, chances.new_full((1, 1), -1.0).expand_as(wanted))
                    if cap is not None:
                        chances.mul_(capped.div_(cap).square_().neg_().add_(1))
                    piece.copy_(chances)
            if gradient is not None:
                torch.mm(logits, weight, out=gradient[start : start + size])
        ctx.gradient = gradient
        return total

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return (ctx.gradient.float() * grads[0]).to(ctx.gradient.dtype), None, None, None
