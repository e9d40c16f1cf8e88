"""How `accelerate launch` and `torchrun` start the processes of a run, and how these end: together.

Both start the same script once for every device and say in environment variables which process is which.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from persona.devices import ALONE, Devices, EndedTogether, Unreachable, unreachable
from persona.errors import UsageError

# The first process may download a model while the others wait; a process that dies is noticed at once all the same.
PATIENCE = timedelta(days=1)
REFUSED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism configuration",
    "FSDP_OFFLOAD_PARAMS": "FSDP's offloading to the CPU",
}


def _lost(error: Exception) -> Exception:
    """`error` itself, or that another process has ended where that is what it comes from."""
    import torch

    gone = isinstance(error, torch.distributed.DistError) or "gloo" in str(error)
    return unreachable(error) if gone else error


@contextmanager
def joined() -> Iterator[Devices]:
    """This process among those that `accelerate launch` or `torchrun` started; alone without them.

    What is raised inside is raised in all processes; only the first one on each machine says it, the others just exit.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    # taken out, so that accelerate and transformers, which would wrap and load the model their way, do not see it
    sharded = _is_on(os.environ.pop("ACCELERATE_USE_FSDP", ""))
    if count == 1:
        _refuse_unsupported()
        yield ALONE
        return
    devices = _join(count, sharded)
    try:
        try:
            _refuse_unsupported()
            yield devices
            devices.largest(0)  # the others may have failed at the very end
        except (EndedTogether, Unreachable):
            raise
        except Exception as error:
            if devices.in_passes:
                raise _lost(error) from None
            devices.tell(error)
    except (EndedTogether, KeyboardInterrupt) as error:
        if devices.local_rank:
            raise SystemExit(error.exit_code if isinstance(error, EndedTogether) else 130) from None
        raise
    finally:
        # The launcher terminates what is left once the first process has ended with an error: let each end by itself.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        _leave()


def build_accelerator(precision: str, device: Any, devices: Devices) -> Any:
    """accelerate's mixed precision and, for fp16, scaling of the loss, on the device that was chosen.

    Raises `UsageError` when the processes were started for another device, or by something else than we know.
    """
    from accelerate import Accelerator
    from accelerate.utils import GradientAccumulationPlugin

    accelerator = Accelerator(
        mixed_precision="no" if precision == "fp32" else precision,
        cpu=device.type == "cpu",
        # given, so that accelerate's configuration file cannot divide the loss
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
    )
    if accelerator.num_processes != devices.count:
        raise UsageError(
            f"accelerate counts {accelerator.num_processes} processes, but torchrun's variables name {devices.count}; "
            "start them with accelerate launch or torchrun."
        )
    if accelerator.device.type != device.type:
        raise UsageError(
            f"accelerate was told to use {accelerator.device.type}, but model.device means {device.type} here; start "
            f'it with --set model.device="{accelerator.device.type}".'
        )
    return accelerator


def _is_on(text: str) -> bool:
    return text.lower() in ("true", "1")


def _refuse_unsupported() -> None:
    for variable, name in REFUSED.items():
        if _is_on(os.environ.get(variable, "")):
            raise UsageError(
                f"Training with {name} is not possible; several devices work with plain data parallelism (accelerate "
                "launch --multi_gpu --num_processes N finetune.py) or with FSDP (--use_fsdp instead); docs/devices.md."
            )


def _leave() -> None:
    import torch

    torch.distributed.destroy_process_group()  # gloo's threads abort a process that ends without


def _join(count: int, sharded: bool) -> Devices:
    from persona.sources import prepare_libraries

    prepare_libraries(offline=False)  # before torch is imported
    import torch

    # objects and single numbers travel over gloo, and so do gradients on the CPU; those on CUDA cards over NCCL
    nccl = torch.cuda.is_available() and torch.distributed.is_nccl_available()
    torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if nccl else "gloo", timeout=PATIENCE)
    return Devices(torch.distributed.get_rank(), count, int(os.environ["LOCAL_RANK"]), sharded)
