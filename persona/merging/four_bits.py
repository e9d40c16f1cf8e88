"""Weights as training in 4 bits saw them, for merging into those instead of the original ones.

Whether that is better is disputed (axolotl #1263, unsloth-zoo #810, peft #2105): `--compare-bases` measures it.
"""

from dataclasses import dataclass
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from torch import nn

from persona.config import Quantization
from persona.merging.changes import Change


@dataclass(frozen=True)
class FourBits:
    """A weight quantized and dequantized by bitsandbytes, as `persona.modeling.load_base` holds it."""

    quantization: Quantization
    compute: torch.dtype
    turned: bool
    """Whether the stored tensor is the transpose of what is quantized (GPT-2's Conv1D)."""
    whole: bool = True

    def apply(self, rows: torch.Tensor, start: int) -> torch.Tensor:
        """See `persona.merging.changes.Change`."""
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
