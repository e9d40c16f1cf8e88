"""The memory of one training step by part, counted at full size on tensors without numbers.

Layers of a model are alike, or kinds of them come back in the same order: a few are run, and as many more as are in
such a round, and the figures of all layers are on the line through both.
"""

import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from persona.config import Lora, Quantization
from persona.engine.attention import IN_FORM, attend_by, head_size, widest_layer
from persona.engine.flash import choose
from persona.engine.fused import fuse, unfuse
from persona.engine.loss import negative_log_likelihood
from persona.engine.packing import pack, plan_packs
from persona.engine.trial import HEAD, TAIL, TRIAL_BLOCK, plain_loss, trial_examples, why_not, without_chance
from persona.model.architecture import layers_in_4_bits, without_weights
from persona.model.device import DTYPES
from persona.model.loading import add_adapter, keep_gradients_in_4bit, refuse_experts
from persona.model.render import Example
from persona.train.estimate.paper import CAPABILITY, META, Kernel, Paper

GIB = 2**30
LAYERS_RUN = 2  # at least
SMALL = 4096  # bitsandbytes' min_8bit_size
_Run = Callable[[torch.device], tuple[torch.Tensor, int]]  # the loss of a forward pass, and its tokens


@dataclass(frozen=True)
class Setup:
    """Everything but the pack that decides the memory of a step."""

    config: Any
    """The model's configuration, as transformers reads it."""
    lora: Lora
    quantization: Quantization
    precision: str
    device: str
    """`cuda` or `cpu`."""
    optimizer: str
    checkpointing: bool


@dataclass(frozen=True)
class Step:
    """One training step on paper."""

    parts: dict[str, float]
    """Bytes at the peak, by part."""
    passing: float
    """Bytes of all that comes and goes in a step if nothing that is kept for the backward pass is computed again."""
    tokens: int
    """Tokens that the pack computes."""
    forward: Sequence[tuple[Kernel, float]]
    """The operations of the forward pass, each with the number of times it occurs."""
    backward: Sequence[tuple[Kernel, float]]

    @property
    def peak(self) -> float:
        """Bytes at the peak of a step."""
        return sum(self.parts.values())


class OnPaper:
    """A model without numbers, on which steps are counted; at most three of its layers, since the others are alike."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        dtype = DTYPES[setup.precision]
        config = copy.deepcopy(setup.config)
        model = without_weights(config, dtype)
        if setup.quantization.load_in_4bit:
            refuse_experts(model, dtype)
        self.weights = sum(weight.numel() for weight in model.parameters())
        layers = _layers(model)[1]
        self.depth = len(layers)
        types = getattr(model.config.get_text_config(), "layer_types", None) or [None] * self.depth
        period = _period(layers, types)
        few = max(period, LAYERS_RUN)
        self.run = (few, few + period) if few + period < self.depth else (self.depth, self.depth)
        _cut(model, self.run[1])
        model.requires_grad_(False)
        model.config.use_cache = False
        if setup.quantization.load_in_4bit:
            _quantize(model, setup.quantization, dtype)
        if setup.checkpointing:
            # on paper no random number has to be brought back, and nothing can differ the second time
            options = {"use_reentrant": False, "preserve_rng_state": False, "determinism_check": "none"}
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        with META:
            self.model: Any = add_adapter(model, setup.lora, 0, "on paper")
        for module in self.model.modules():  # made by libraries elsewhere
            for name, weight in [*module._parameters.items(), *module._buffers.items()]:
                if weight is not None and not weight.is_meta:
                    with torch.no_grad():
                        moved = weight.to(META)
                    module._parameters[name] = (
                        nn.Parameter(moved, weight.requires_grad) if name in module._parameters else moved
                    )
        self.own = self.model.config._attn_implementation
        self.share = why_not(self.model.config, 1) is None
        self.path, self.layers = _layers(self.model)
        self._passing_a_token: float | None = None

    def _attention(self) -> str:
        """The form of attention over trees on the device, as any GPU since RTX 30 has it."""
        text, dtype = self.model.config.get_text_config(), DTYPES[self.setup.precision]
        size = head_size(widest_layer(text))
        return IN_FORM[choose(self.setup.device, CAPABILITY, sys.platform != "win32", dtype, size).form]

    def step(self, examples: Sequence[Example]) -> Step:
        """A training step with `examples` in one pack, while the gradients of an earlier pack are there."""
        fuse(self.model.train())
        if self.share:
            attend_by(self.model.get_base_model(), self._attention())
        few, more = self._twice(lambda device: self._loss(examples, device))
        parts = self._of_all(few, more)
        rounds = self._rounds
        weights = {"more": float(max(rounds, 1)), "few": float(-max(rounds - 1, 0))}
        kernels = [
            [*((one, weights["more"]) for one in a), *((one, weights["few"]) for one in b if weights["few"])]
            for a, b in ((more.forward, few.forward), (more.backward, few.backward))
        ]
        return Step(parts, self._passing(examples, parts, few.tokens), few.tokens, *kernels)

    def _passing(self, examples: Sequence[Example], parts: dict[str, float], tokens: int) -> float:
        """Bytes that come and go in a step with `examples`, whose `parts` with checkpointing are known."""
        if self.setup.device != "cpu" or not self.setup.checkpointing:
            return parts["kept activations"] + parts["workspace"]
        if self._passing_a_token is None:
            with self._nothing_again():
                whole = self._while(lambda device: self._loss(examples, device), True)
            self._passing_a_token = (whole["kept activations"] + whole["workspace"]) / tokens
        return self._passing_a_token * tokens

    @contextmanager
    def _nothing_again(self) -> Iterator[None]:
        """Inside, the layers keep all that the backward pass needs."""
        layers = [layer for layer in self.layers if isinstance(layer, GradientCheckpointingLayer)]
        for layer in layers:
            layer.gradient_checkpointing = False
        try:
            yield
        finally:
            for layer in layers:
                layer.gradient_checkpointing = True

    def trial(self, examples: Sequence[Example]) -> float:
        """Bytes at the peak of the trial before the first update (persona/engine/trial.py) with the data's `examples`.

        Each of three short examples is computed alone in the libraries' own layers, and then all of them in one pack.
        """
        few = trial_examples(examples)
        (group,) = plan_packs(few, len(few) * (HEAD + TAIL + 1), self.share)
        with without_chance(self.model):
            unfuse(self.model)
            attend_by(self.model.get_base_model(), self.own)
            alone = self._while(lambda device: (plain_loss(self.model, few[0], device), 0), True)
            fuse(self.model)
            if self.share:
                attend_by(self.model.get_base_model(), self._attention())
            # the gradients of the examples alone are kept meanwhile
            together = self._while(lambda device: self._loss(group, device, TRIAL_BLOCK), False)
        # no optimizer yet; a copy of one half of the adapter
        return max(
            sum(parts.values()) - parts["optimizer states"] + parts["adapter"] / 2 for parts in (alone, together)
        )

    def _while(self, run: _Run, adds: bool) -> dict[str, float]:
        """Bytes by part at the peak of `run` and its backward pass, for all layers.

        The pass `adds` to the gradients that are there, or makes others.
        """
        return self._of_all(*self._twice(run, adds))

    def _twice(self, run: _Run, adds: bool = True) -> tuple["_Count", "_Count"]:
        """`run` with a few layers and with more of them; the same if no layers are left out."""
        few = self._counted(self.run[0], run, adds)
        return few, few if self.run[0] == self.run[1] else self._counted(self.run[1], run, adds)

    @property
    def _rounds(self) -> float:
        """How many times what more layers add comes on top of a few, for all layers."""
        few, more = self.run
        return (self.depth - few) / max(more - few, 1)

    def _of_all(self, few: "_Count", more: "_Count") -> dict[str, float]:
        """Bytes by part for all layers."""
        return {name: few.parts[name] + self._rounds * (more.parts[name] - few.parts[name]) for name in more.parts}

    def _loss(
        self, examples: Sequence[Example], device: torch.device, block: int | None = None
    ) -> tuple[torch.Tensor, int]:
        packed = pack(examples, device, self.share, block)
        return negative_log_likelihood(self.model, packed), packed.input_ids.numel()

    def _counted(self, depth: int, run: _Run, adds: bool = True) -> "_Count":
        self.model.set_submodule(self.path, self.layers[:depth])
        self.model.config.get_text_config().num_hidden_layers = depth
        device = torch.device(self.setup.device)
        with Paper(device, DTYPES[self.setup.precision]) as paper:
            parts = self._lasting(paper)
            if not adds:
                self.model.zero_grad()
            lasting = paper.peak = paper.live
            loss, tokens = run(device)
            kept, forward = paper.live - lasting, len(paper.kernels)
            paper.backward(loss)
        self.model.zero_grad()
        parts["kept activations"], parts["workspace"] = kept, paper.peak - lasting - kept
        return _Count(parts, tokens, paper.kernels[:forward], paper.kernels[forward:])

    def _lasting(self, paper: Paper) -> dict[str, float]:
        """Bytes that are there before and after a step, by part."""
        names = ("weights in 4 bits", "other weights", "adapter", "gradients", "optimizer states")
        parts: dict[str, float] = dict.fromkeys(names, 0.0)
        for weight in self.model.parameters():
            size = paper.hold(weight)
            if weight.requires_grad:
                weight.grad = torch.empty_like(weight)
                parts["adapter"] += size
                parts["gradients"] += size
                parts["optimizer states"] += _state_bytes(self.setup.optimizer, weight.numel())
            elif (state := getattr(weight, "quant_state", None)) is not None:
                scales = (state.absmax, state.state2.absmax) if state.nested else (state.absmax,)
                parts["weights in 4 bits"] += size + sum(map(paper.hold, scales))
            else:
                parts["other weights"] += size
        parts["other weights"] += sum(map(paper.hold, self.model.buffers()))
        return parts


@dataclass(frozen=True)
class _Count:
    parts: dict[str, float]
    tokens: int
    forward: list[Kernel]
    backward: list[Kernel]


def _state_bytes(optimizer: str, count: int) -> float:
    """Bytes of AdamW's two states of a weight of `count` numbers; bitsandbytes keeps small weights in 32 bits."""
    if optimizer == "adamw_torch" or count < SMALL:
        return 8.0 * count
    return 2.0 * (count + 4 * -(-count // 256))


def _layers(model: Any) -> tuple[str, nn.ModuleList]:
    """The decoder's layers and their path: its largest list of modules."""
    inside = set(model.get_decoder().modules())
    lists = ((path, one) for path, one in model.named_modules() if isinstance(one, nn.ModuleList) and one in inside)
    return max(lists, key=lambda pair: sum(weight.numel() for weight in pair[1].parameters()))


def _period(layers: nn.ModuleList, types: Sequence[str | None]) -> int:
    """After how many layers the same kinds of them come again, to the last one; all of them if they never do."""
    shapes = [tuple((name, weight.shape) for name, weight in layer.named_parameters()) for layer in layers]
    kinds = list(zip(types, shapes, strict=True))  # sliding and full attention have one shape in some models
    return next(n for n in range(1, len(kinds) + 1) if len(kinds) % n == 0 and kinds == kinds[:n] * (len(kinds) // n))


def _cut(model: Any, depth: int) -> None:
    """Leave the first `depth` layers of `model`."""
    path, layers = _layers(model)
    model.set_submodule(path, layers[:depth])
    model.config.get_text_config().num_hidden_layers = depth


def _quantize(model: Any, quantization: Quantization, dtype: torch.dtype) -> None:
    """Put 4-bit layers where transformers puts them, and leave the others, such as stacked experts, in 16 bits."""
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn.modules import Linear4bit, Params4bit

    make: Any = Params4bit  # typed by its __init__, which does not take what its __new__ does
    kind, double = quantization.bnb_4bit_quant_type, quantization.bnb_4bit_use_double_quant
    for path, module in layers_in_4_bits(model).items():
        count, linear = module.weight.numel(), type(module) is nn.Linear
        out, into = module.weight.shape if linear else module.weight.shape[::-1]  # GPT-2's are transposed
        blocks = -(-count // 64)
        with META:
            layer = Linear4bit(into, out, module.bias is not None, dtype, double, kind)
            second = QuantState(
                torch.empty(-(-blocks // 256)), code=torch.empty(256), blocksize=256, dtype=torch.float32
            )
            state = QuantState(
                torch.empty(blocks, dtype=torch.uint8 if double else torch.float32),
                torch.Size((out, into)),
                torch.empty(16),
                64,
                kind,
                dtype,
                torch.empty(()) if double else None,
                second if double else None,
            )
            packed: Any = torch.empty(-(-count // 2), 1, dtype=torch.uint8)
            layer.weight = make(
                packed, requires_grad=False, quant_state=state, quant_type=kind, bnb_quantized=True, module=layer
            )
            setattr(layer, "quant_state", state)  # noqa: B010 - bitsandbytes' layers are not typed
            if module.bias is not None:
                layer.bias = nn.Parameter(torch.empty(out, dtype=dtype), False)
        model.set_submodule(path, layer)
    keep_gradients_in_4bit(model)
    model.is_loaded_in_4bit = True
