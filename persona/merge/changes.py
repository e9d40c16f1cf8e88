"""The change that an adapter makes to one tensor of its base, applied to a block of rows at a time, in float32.

`left @ right` is written in the order in which the base stores the tensor: B A for a linear layer, its transpose for
the layers of GPT-2 and for embeddings.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from torch import nn

from persona.config import Quantization
from persona.model.architecture import language_modules, layers_in_4_bits


class Change(ABC):
    """A change of a tensor."""

    whole = False
    """Whether it needs all rows at once, as the norm of a column does."""

    @abstractmethod
    def apply(self, rows: torch.Tensor, start: int) -> torch.Tensor:
        """The changed `rows` (float32, from row `start` on); `rows` may be changed in place."""


@dataclass(frozen=True)
class LowRank(Change):
    """W + scaling * left right (LoRA, arXiv 2106.09685)."""

    left: torch.Tensor  # (rows, r), or (experts, rows, r) for weights in which experts are stacked
    right: torch.Tensor  # (r, columns), or (experts, r, columns)
    scaling: float

    def apply(self, rows: torch.Tensor, start: int) -> torch.Tensor:
        """See `Change`."""
        left = self.left[start : start + len(rows)].float()
        if rows.dim() == 2:
            return rows.addmm_(left, self.right.float(), alpha=self.scaling)
        right = self.right[start : start + len(rows)].float()
        return rows.baddbmm_(left, right, alpha=self.scaling)

    def of_expert(self, number: int) -> "LowRank":
        """The change of one of the stacked experts."""
        return LowRank(self.left[number], self.right[number], self.scaling)


@dataclass(frozen=True)
class Decomposed(Change):
    """Magnitude times the direction of W + scaling * left right (DoRA, arXiv 2402.09353)."""

    direction: LowRank
    magnitude: torch.Tensor
    whole: bool
    """Whether the magnitude belongs to a column of the stored tensor, not to a row."""

    def apply(self, rows: torch.Tensor, start: int) -> torch.Tensor:
        """See `Change`."""
        rows = self.direction.apply(rows, start)
        if self.whole:
            return rows.mul_(self.magnitude.float() / torch.linalg.norm(rows, dim=0))
        factors = self.magnitude[start : start + len(rows)].float() / torch.linalg.norm(rows, dim=1)
        return rows.mul_(factors[:, None])


@dataclass(frozen=True)
class Replaced(Change):
    """Weights that were trained whole (`modules_to_save`, `bias`)."""

    values: torch.Tensor

    def apply(self, rows: torch.Tensor, start: int) -> torch.Tensor:
        """See `Change`."""
        return rows.copy_(self.values[start : start + len(rows)])


@dataclass(frozen=True)
class Rows(Change):
    """Single rows that were trained whole (`trainable_token_indices`)."""

    indices: torch.Tensor
    values: torch.Tensor

    def apply(self, rows: torch.Tensor, start: int) -> torch.Tensor:
        """See `Change`."""
        here = (self.indices >= start) & (self.indices < start + len(rows))
        return rows.index_copy_(0, self.indices[here] - start, self.values[here].float())


@dataclass(frozen=True)
class Added(Change):
    """A sum with a tensor of the same shape (`lora_bias`)."""

    values: torch.Tensor

    def apply(self, rows: torch.Tensor, start: int) -> torch.Tensor:
        """See `Change`."""
        return rows.add_(self.values[start : start + len(rows)].float())


@dataclass(frozen=True)
class FourBits:
    """How a run in 4 bits held its base: the quantization, and the number format in which it computed."""

    quantization: Quantization
    compute: torch.dtype


@dataclass(frozen=True)
class Dequantized(Change):
    """W quantized to 4 bits and back by bitsandbytes, as `persona.model.loading.load_base` holds it.

    Whether an adapter is better merged into these weights or into the original ones is disputed (axolotl #1263,
    unsloth-zoo #810, peft #2105): `--compare-bases` measures it.
    """

    four_bits: FourBits
    transposed: bool
    """Whether the stored tensor is the transpose of the quantized one (GPT-2's Conv1D)."""
    whole = True

    def apply(self, rows: torch.Tensor, start: int) -> torch.Tensor:
        """See `Change`."""
        quantization = self.four_bits.quantization
        packed, state = quantize_4bit(
            (rows.T if self.transposed else rows).contiguous().to(self.four_bits.compute),
            blocksize=64,  # bitsandbytes' default, which load_base keeps
            compress_statistics=quantization.bnb_4bit_use_double_quant,
            quant_type=quantization.bnb_4bit_quant_type,
        )
        dequantized = dequantize_4bit(packed, state).float()
        return dequantized.T.contiguous() if self.transposed else dequantized


def dequantized_weights(model: Any, four_bits: FourBits) -> dict[str, Dequantized]:
    """The change of each weight of the language part of `model` that training holds in 4 bits."""
    inside = language_modules(model)
    return {
        f"{name}.weight": Dequantized(four_bits, type(layer) is not nn.Linear)  # else GPT-2's Conv1D
        for name, layer in layers_in_4_bits(model).items()
        if layer in inside
    }
