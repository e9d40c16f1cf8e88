"""What an adapter does to one tensor of its base, applied to any block of rows on its own, in float32.

`left @ right` is written in the order in which the base stores the tensor: B A for a linear layer, its transpose for
the layers of GPT-2 and for embeddings.
"""

from dataclasses import dataclass
from typing import Protocol

import torch


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
