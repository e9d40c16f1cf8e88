"""What an adapter does to one tensor of its base, applied to any block of rows on its own, in float32.

`left @ right` is written in the order in which the base stores the tensor: B A for a linear layer, its transpose for
the layers of GPT-2 and for embeddings.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from torch import nn

from persona.config import Quantization


class Change(Protocol):
    """A change of a tensor. `whole` says that it needs all rows at once, as norms of columns do."""

    @property
    def whole(self) -> bool: ...

    def apply(self, rows: torch.Tensor, start: int) -> torch.Tensor:
        """`rows` (float32, from row `start` on) as the adapter makes them; `rows` may be changed in place."""
        ...


@dataclass(frozen=True)
class LowRank:
    """W + scaling * left right (LoRA, arXiv 2106.09685)."""

    left: torch.Tensor  # (rows, r), or (experts, rows, r) for weights in which experts are stacked
    right: torch.Tensor  # (r, columns), or (experts, r, columns)
    scaling: float
    whole: bool = False

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
class Decomposed:
    """Magnitude times the direction of W + scaling * left right (DoRA, arXiv 2402.09353)."""

    direction: LowRank
    magnitude: torch.Tensor
    by_column: bool
    """Whether a column of the stored tensor has one magnitude, not a row."""

    @property
    def whole(self) -> bool:
        """See `Change`."""
        return self.by_column

    def apply(self, rows: torch.Tensor, start: int) -> torch.Tensor:
        """See `Change`."""
        rows = self.direction.apply(rows, start)
        if self.by_column:
            return rows.mul_(self.magnitude.float() / torch.linalg.norm(rows, dim=0))
        factors = self.magnitude[start : start + len(rows)].float() / torch.linalg.norm(rows, dim=1)
        return rows.mul_(factors[:, None])


@dataclass(frozen=True)
class Replaced:
    """Weights that were trained whole (`modules_to_save`, `bias`)."""

    values: torch.Tensor
    whole: bool = False

    def apply(self, rows: torch.Tensor, start: int) -> torch.Tensor:
        """See `Change`."""
        return rows.copy_(self.values[start : start + len(rows)])


@dataclass(frozen=True)
class Rows:
    """Single rows that were trained whole (`trainable_token_indices`)."""

    indices: torch.Tensor
    values: torch.Tensor
    whole: bool = False

    def apply(self, rows: torch.Tensor, start: int) -> torch.Tensor:
        """See `Change`."""
        here = (self.indices >= start) & (self.indices < start + len(rows))
        return rows.index_copy_(0, self.indices[here] - start, self.values[here].float())


@dataclass(frozen=True)
class Added:
    """A sum with a tensor of the same shape (`lora_bias`)."""

    values: torch.Tensor
    whole: bool = False

    def apply(self, rows: torch.Tensor, start: int) -> torch.Tensor:
        """See `Change`."""
        return rows.add_(self.values[start : start + len(rows)].float())


# --- four bits --------------------------------------------------------------------------------------------------------
# Weights as training in 4 bits saw them, for merging into those instead of the original ones.
#
# Whether that is better is disputed (axolotl #1263, unsloth-zoo #810, peft #2105): `--compare-bases` measures it.


@dataclass(frozen=True)
class FourBits:
    """A weight quantized and dequantized by bitsandbytes, as `persona.model.loading.load_base` holds it."""

    quantization: Quantization
    compute: torch.dtype
    turned: bool
    """Whether the stored tensor is the transpose of what is quantized (GPT-2's Conv1D)."""
    whole: bool = True

    def apply(self, rows: torch.Tensor, start: int) -> torch.Tensor:
        """See `persona.merge.changes.Change`."""
        weight = (rows.T if self.turned else rows).contiguous().to(self.compute)
        held, state = quantize_4bit(
            weight,
            blocksize=64,  # bitsandbytes' default, which load_base keeps
            compress_statistics=self.quantization.bnb_4bit_use_double_quant,
            quant_type=self.quantization.bnb_4bit_quant_type,
        )
        seen = dequantize_4bit(held, state).float()
        return seen.T.contiguous() if self.turned else seen


def held_in_4_bits(model: Any, quantization: Quantization, compute: torch.dtype) -> dict[str, list[Change]]:
    """The parameters of `model` (one without weights) that training holds in 4 bits: all linear layers but the last."""
    head = model.get_output_embeddings()
    changes: dict[str, list[Change]] = {}
    for name, module in model.named_modules():
        turned = type(module).__name__ == "Conv1D"
        if module is not head and (turned or isinstance(module, nn.Linear)):
            changes[f"{name}.weight"] = [FourBits(quantization, compute, turned)]
    return changes
