"""A base model shared out over the devices: each keeps a part of every layer and gets the rest when it is needed.

Only the frozen base is sharded. The adapter, its gradients and its optimizer stay whole in every process, so that the
update, the checkpoints and the finished adapter are the same as without.
"""

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from persona.errors import UsageError


def shard_base(model: Any, device: torch.device, count: int) -> None:
    """Leave on `device` one of `count` parts of every weight in the layers and the embedding of an adapted `model`.

    The output layer, and an embedding that is tied to it, stay whole. Raises `UsageError` for an unknown architecture.
    """
    base = model.get_base_model()
    layers = max((m for m in base.modules() if isinstance(m, nn.ModuleList)), key=_weights, default=None)
    decoder, head = base.get_decoder(), base.get_output_embeddings()
    if layers is None or decoder is None or decoder is base:
        raise UsageError(f"FSDP cannot share out a {base.config.model_type} model; train it without.")
    whole = {weight for weight in model.parameters() if weight.requires_grad} | set(head.parameters())
    for weight in whole:
        weight.data = weight.data.to(device)
    mesh = init_device_mesh(device.type, (count,))
    # Given up after every pass, the embedding too: what stays gathered, process 0 would give up alone when it saves
    for module in (*layers, decoder):
        fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=whole)


def _weights(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())
