"""Whether a model can compute prefix trees, and the proof on its own data that it computes them right."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from transformers.modeling_layers import GradientCheckpointingLayer

from persona.engine.attention import IN_FORM, NAME, NAMES, NotCarried, attend_by
from persona.engine.flash import BLOCKS
from persona.engine.fused import KNOWN, fuse, unfuse
from persona.engine.loss import negative_log_likelihood
from persona.engine.packing import inputs, pack, plan_packs
from persona.engine.recurrent import CARRYING
from persona.model.architecture import computable
from persona.model.render import Example

# Architectures whose layers hand on the tree and take positions as they are given, each held to the loss and gradients
# of the rows by tests/engine/test_packing.py. A new one is a name here, and its sizes in tests/making/tiny.py.
SHARING = KNOWN | {
    "apertus", "arcee", "cohere", "cohere2", "deepseek_v2", "deepseek_v3", "ernie4_5", "exaone4", "gemma", "gemma2",
    "gemma3_text", "gemma4_text", "gemma4_unified_text", "glm", "glm4", "glm4_moe", "gpt_oss", "granite", "granitemoe",
    "helium", "hunyuan_v1_dense", "minicpm3", "ministral", "mixtral", "olmo2", "olmo3", "phi3", "qwen2_moe",
    "qwen3_moe", "seed_oss", "smollm3", "starcoder2", *CARRYING,
}  # fmt: skip
CARRIED = frozenset({"linear_attention", "conv"})  # types of layers that carry a state, which trees can carry too
UNTOLD = frozenset({"qwen2_moe"})  # their window is in the mask alone, and their attention does not learn of it
LEARNED = frozenset({"gpt2", "opt", "gpt_neo", "gpt_bigcode", "xglm"})
ALIBI = frozenset({"bloom", "mpt"})
STATE = frozenset({"mamba", "mamba2", "falcon_mamba", "rwkv", "jamba", "bamba", "zamba2", "nemotron_h"})
# Largest relative differences of the loss, and of the gradient of one kind of weights, that rounding may make. On the
# embedded model in bfloat16 they are 0.002 and 0.06; if branches see each other, they are above 0.1 and 0.9.
TOLERANCE = {torch.float32: (1e-4, 1e-2), torch.bfloat16: (0.01, 0.2), torch.float16: (0.01, 0.1)}
HEAD, TAIL = 160, 40  # tokens of the trial's common prefix, and behind it
SHARE_OF_TRIAL = 4  # a window's share of an example of the trial is one in so many
TRIAL_BLOCK = 64  # so that even a short tree has several blocks


def why_not(config: Any, longest: int) -> str | None:
    """Why a model of this configuration cannot compute prefix trees of examples of up to `longest` tokens, or None."""
    whole, config = config, config.get_text_config()
    kind = config.model_type
    layers = getattr(config, "layer_types", None) or ()
    known = {"full_attention", "sliding_attention"} | (CARRIED if kind in CARRYING else set())
    if other := sorted(set(layers) - known):
        return f"it has layers of {', '.join(other)}, which attention over prefix trees does not know"
    if kind in STATE:
        return "it carries a state from token to token"
    if kind in LEARNED:
        return "its positions are learned, and it counts them itself"
    if kind in ALIBI:
        return "its attention counts distances in the row (ALiBi)"
    if kind not in SHARING:
        return f"{kind} is not among the architectures that are tested with them"
    if kind in UNTOLD and "sliding_attention" in layers and config.sliding_window < longest:
        return f"its attention reaches back only {config.sliding_window} tokens, and an example has up to {longest}"
    if (edge := _switch(config)) is not None and edge[1] < longest:
        return f"its positions change with an example of over {edge[1]} tokens beside it (rope_type {edge[0]})"
    if whole._attn_implementation not in ("sdpa", "eager", *NAMES):
        return f"its attention runs as {whole._attn_implementation}"
    return None


def carries_state(config: Any) -> bool:
    """Whether layers of this configuration carry more from token to token than keys and values."""
    config = config.get_text_config()
    return config.model_type in STATE or not CARRIED.isdisjoint(getattr(config, "layer_types", None) or ())


def _switch(config: Any) -> tuple[str, int] | None:
    """The kind of rotary positions that are others in a longer row, and the length up to which they are not."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    for kind in [rope, *rope.values()]:  # some have a kind for each type of layer
        if isinstance(kind, dict) and kind.get("rope_type") in ("longrope", "dynamic"):
            edge = kind.get("original_max_position_embeddings") or config.max_position_embeddings
            return kind["rope_type"], min(edge, config.max_position_embeddings)
    return None


def has_experts(config: Any) -> bool:
    """Whether a model of this configuration chooses among experts, so that each computes other tokens in each batch."""
    values = config.get_text_config().to_dict()
    return any("experts" in name and value for name, value in values.items())


def prepare_layout(model: Any, examples: Sequence[Example], longest: int, accelerator: Any) -> str | None:
    """Let `model` compute prefix trees in fused layers, after a trial with the beginning of one of `examples`.

    Examples have up to `longest` tokens. Returns the reason why each needs a row of its own, or None if prefixes are
    shared.
    """
    reason = why_not(model.config, longest)
    fault = None
    for name in _attentions(model, reason is None, accelerator):
        if name != model.config._attn_implementation:
            attend_by(model.get_base_model(), name)
        fault = difference(model, trial_examples(examples), accelerator, share=reason is None)
        if fault is None:
            break
    if accelerator.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(accelerator.device)
    if fault is None:
        if reason is None:
            drop_no_attention(model)
        return reason
    keep_rows(model)
    return f"in a trial before the first update {fault}"


def drop_no_attention(model: Any) -> None:
    """Let rows of `model` drop no attention weights either: a tree does not, and an example may come alone."""
    for module in model.modules():
        if "attention_dropout" in vars(module):
            module.attention_dropout = 0.0


def _attentions(model: Any, share: bool, accelerator: Any) -> Sequence[str]:
    """The attentions to try, the best first; the last resort, rows in the model's own, is not among them."""
    own = model.config._attn_implementation
    if accelerator.device.type != "cuda":
        return [NAME if share else own]
    if not share:  # rows attend by it too, so that torch does not keep the scores of all pairs
        return [NAME if own == "sdpa" else own]
    # several processes must agree, and their passes too if they share out the base
    return [NAME, IN_FORM[BLOCKS]] if accelerator.num_processes == 1 else [NAME]


def keep_rows(model: Any) -> None:
    """Give `model` its own attention and layers back, which take one example a row."""
    if model.config._attn_implementation in NAMES:
        base = model.get_base_model()
        attend_by(base, "sdpa" if base._supports_sdpa else "eager")
    unfuse(model)


def trial_examples(examples: Sequence[Example]) -> list[Example]:
    """Three short examples with a common prefix, from the tokens of the shortest of `examples` in three orders."""
    shortest = min(examples, key=lambda example: len(example.prompt_ids) + len(example.reply_ids))
    ids = (*shortest.prompt_ids, *shortest.reply_ids)
    head = ids[: min(HEAD, len(ids) * 2 // 3)]
    tail = ids[len(head) : len(head) + TAIL]
    ways = (tail, tail[::-1], (*tail[1::2], *tail[::2]))
    return [Example((*head, *way[:1]), way[1:] or way) for way in ways]


def difference(model: Any, examples: Sequence[Example], accelerator: Any, share: bool) -> str | None:
    """The difference between `examples` in one pack and each alone in the libraries' own layers; None if none.

    The layers of `model` are left fused; its weights, gradients, mode and the random state are as they were.
    """
    device, attention = accelerator.device, model.config._attn_implementation
    dtype = next(weight.dtype for weight in model.get_base_model().parameters() if weight.is_floating_point())
    with _trial(model), short_windows(model, examples):
        keep_rows(model)
        with computable(model):
            alone = _measured(model, (plain_loss(model, example, device) for example in examples), accelerator)
        if attention in NAMES:
            attend_by(model.get_base_model(), attention)
        fuse(model)
        (group,) = plan_packs(examples, len(examples) * (HEAD + TAIL + 1), share)
        packed = pack(group, device, share, TRIAL_BLOCK)
        try:
            together = _measured(model, (negative_log_likelihood(model, one) for one in [packed]), accelerator)
        except NotCarried as error:
            return str(error)
    by_loss, by_gradient = TOLERANCE[dtype]
    if not abs(together[0] - alone[0]) <= by_loss * abs(alone[0]):
        return f"the loss of three short examples was {together[0]:.4f} in one pack and {alone[0]:.4f} one by one"
    for kind, right in alone[1].items():
        if not (apart := difference_of(together[1][kind], right)) <= by_gradient:
            return f"the gradient of {kind} from three short examples was {apart:.0%} off in one pack"
    return None


@contextmanager
def short_windows(model: Any, examples: Sequence[Example]) -> Iterator[None]:
    """Inside, the windows of `model` are shorter than `examples`, so that these show whether a tree keeps to them."""
    window = max(1, min(len(inputs(example)) for example in examples) // SHARE_OF_TRIAL)
    owners = [model.config.get_text_config(), *model.modules()]
    windows = [(one, vars(one)["sliding_window"]) for one in owners if isinstance(vars(one).get("sliding_window"), int)]
    try:
        for owner, size in windows:
            owner.sliding_window = min(size, window)  # 0 where there is none
        yield
    finally:
        for owner, size in windows:
            owner.sliding_window = size


@contextmanager
def _trial(model: Any) -> Iterator[None]:
    """Nothing random, and an adapter with two random halves inside; everything is put back afterwards."""
    halves = [weight for name, weight in model.named_parameters() if "lora_B" in name]
    before = [weight.detach().clone() for weight in halves]
    chance = torch.Generator().manual_seed(0)
    try:
        for weight in halves:
            weight.data.copy_(torch.randn(weight.shape, generator=chance) * 0.01)
        with without_chance(model):
            yield
    finally:
        for weight, value in zip(halves, before, strict=True):
            weight.data.copy_(value)
        model.zero_grad()


@contextmanager
def without_chance(model: Any) -> Iterator[None]:
    """Inside, nothing of `model` draws random numbers, and its layers are checkpointed if they are in training."""
    modules = list(model.modules())
    modes = [module.training for module in modules]
    # transformers checkpoints in training mode only, in which some layers drop numbers without a module for it
    layers = [one for one in modules if isinstance(one, GradientCheckpointingLayer) and one.gradient_checkpointing]
    layers = [one for one in layers if "forward" not in vars(one)]  # set by another library
    try:
        model.eval()
        for layer in layers:
            layer.forward = partial(_checkpointed, layer, layer.forward)
        yield
    finally:
        for layer in layers:
            del layer.forward
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode


def _checkpointed(layer: Any, forward: Any, *args: Any, **options: Any) -> Any:
    return layer._gradient_checkpointing_func(partial(forward, **options), *args)


def _measured(
    model: Any, losses: Iterator[torch.Tensor], accelerator: Any
) -> tuple[float, dict[str, list[torch.Tensor]]]:
    """The sum of `losses`, and its gradients for each kind of adapter weights, such as `q_proj.lora_A`."""
    model.zero_grad()
    total = 0.0
    with accelerator.autocast():
        for loss in losses:
            loss.backward()
            total += loss.item()
    kinds: dict[str, list[torch.Tensor]] = {}
    for name, weight in model.named_parameters():
        if weight.grad is not None:
            kinds.setdefault(".".join(name.split(".")[-4:-2]), []).append(weight.grad)
            weight.grad = None
    return total, kinds


def difference_of(gradients: Sequence[torch.Tensor], right: Sequence[torch.Tensor]) -> float:
    """The norm of the difference of `gradients` from `right`, as a share of the norm of `right`."""
    apart = torch.stack([(a - b).norm() for a, b in zip(gradients, right, strict=True)]).norm()
    return float(apart / torch.stack([x.norm() for x in right]).norm().clamp(min=1e-30))


def plain_loss(model: Any, example: Example, device: torch.device) -> torch.Tensor:
    """The loss of `example` alone, from the logits of the model's own forward."""
    logits = model(input_ids=torch.tensor([inputs(example)], device=device), use_cache=False).logits[0]
    reply = torch.tensor(example.reply_ids, device=device)
    return F.cross_entropy(logits[-len(reply) :].float(), reply, reduction="sum")
