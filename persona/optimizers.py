"""What moves the weights: which ones are learned, the optimizer over them, and the course of the learning rate."""

import math
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW

from persona.config import Training
from persona.errors import EnvironmentFault


def trained_weights(model: Any) -> list[nn.Parameter]:
    """The weights that are learned: the adapter's."""
    return [weight for weight in model.parameters() if weight.requires_grad]


def choose_optimizer(setting: str, device: torch.device) -> str:
    """The optimizer for `training.optim` on `device`."""
    if setting != "auto":
        return setting
    return "paged_adamw_8bit" if device.type == "cuda" else "adamw_torch"


def rate_factor(step: int, total: int, warmup_ratio: float, kind: str) -> float:
    """Share of the peak learning rate at update `step` of `total`, counted from 0; never 0, so that each one learns."""
    warmup = min(math.ceil(warmup_ratio * total), total - 1)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / (total - warmup)
    return {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}[kind]


def build_optimizer(name: str, model: Any, training: Training) -> Any:
    """AdamW (arXiv 1711.05101) over the trainable weights: torch's, or bitsandbytes' with 8-bit states."""
    weights = trained_weights(model)
    rate, decay = training.learning_rate, training.weight_decay
    if name == "adamw_torch":
        return AdamW(weights, lr=rate, weight_decay=decay)
    try:
        from bitsandbytes.optim.adamw import AdamW8bit, PagedAdamW8bit
    except ImportError as error:
        raise EnvironmentFault(
            f'training.optim {name} needs bitsandbytes: {error}. Use --set training.optim="adamw_torch".'
        ) from None
    return (PagedAdamW8bit if name == "paged_adamw_8bit" else AdamW8bit)(weights, lr=rate, weight_decay=decay)
