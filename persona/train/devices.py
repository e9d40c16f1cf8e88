"""Several processes that train one model: which one this is, and what they tell each other.

They meet whenever numbers are exchanged, and at every meeting they first say whether one of them has failed, so that a
fault in one ends all of them, with one message and one exit code, and none waits for ever.
"""

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from persona.errors import EnvironmentFault, PersonaError, UsageError

T = TypeVar("T")


class EndedTogether(PersonaError):
    """A fault of one process that all of them have been told."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(eq=False)
class Devices:
    """This process among those of the run. Every method but the properties is a meeting: all processes must call it."""

    rank: int
    """Number of this process, from 0; process 0 writes, prints and holds the run's folder."""
    count: int
    """Processes of the run, over all machines."""
    local_rank: int
    """Number of this process on its machine, and of its GPU."""
    sharded: bool = False
    """Whether the base model is shared out, so that no process can compute without the others."""
    in_passes: bool = False
    """Whether this process is in the middle of such passes, where the others cannot be told of a fault."""

    @property
    def main(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def largest(self, value: float) -> float:
        """The largest `value` of all processes; raises `EndedTogether` when one of them has failed."""
        return self._meet(value, None)

    def total(self, value: float) -> float:
        """The sum of every process's `value`, in double precision."""
        if self.count == 1:
            return value
        import torch

        self.largest(0)
        number = torch.tensor(value, dtype=torch.float64)
        _exchange(lambda: torch.distributed.all_reduce(number))
        return number.item()

    def gather(self, value: T) -> list[T]:
        """The `value` of every process, in their order."""
        if self.count == 1:
            return [value]
        self.largest(0)
        return self._gathered(value)

    def on_main(self, work: Callable[[], T]) -> T:
        """What `work` returns in the main process, for all of them; what it raises there ends all of them."""
        result = [work() if self.main else None]
        if self.count > 1:
            import torch

            self.largest(0)
            _exchange(lambda: torch.distributed.broadcast_object_list(result, src=0))
        return result[0]  # pyright: ignore[reportReturnType]

    def same(self, value: str, setting: str) -> str:
        """`value`, which `setting` means on this device; raises `UsageError` when it means others elsewhere."""
        found = self.gather(value)
        if len(set(found)) > 1:
            raise UsageError(f"{setting} auto means something else on each device ({', '.join(found)}); set it.")
        return value

    def first_on_each_machine(self, work: Callable[[], T]) -> T:
        """`work` done by one process of each machine and then by the others, who find on the disk what it made."""
        result = work() if self.local_rank == 0 else None
        self.largest(0)
        return work() if self.local_rank else result  # pyright: ignore[reportReturnType]

    def passes(self, groups: Sequence[Sequence[T]], spare: Sequence[T]) -> Iterator[tuple[Sequence[T], float]]:
        """Each of `groups` with the weight 1.0.

        With a sharded base all processes take equally many passes: one with fewer groups takes `spare` with weight 0.0.
        """
        if not self.sharded:
            yield from ((group, 1.0) for group in groups)
            return
        number = int(self.largest(len(groups)))
        self.in_passes = True
        for place in range(number):
            yield (groups[place], 1.0) if place < len(groups) else (spare, 0.0)
        self.in_passes = False

    def sum_gradients(self, weights: Sequence[Any], loss: Any) -> Any:
        """Give each of `weights` the sum of its gradients over all processes; returns the sum of `loss`, a tensor."""
        if self.count == 1:
            return loss
        import torch

        parts = [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in weights]
        flat = torch.cat([*(part.flatten() for part in parts), loss.reshape(1)])
        self.largest(0)  # after all memory is taken: what can fail has failed before the exchange
        _exchange(lambda: torch.distributed.all_reduce(flat))
        *sums, loss = flat.split([*(part.numel() for part in parts), 1])
        for weight, part in zip(weights, sums, strict=True):
            weight.grad = part.view_as(weight)
        return loss[0]

    def take_card(self, device: Any) -> None:
        """Make this process's GPU the current one; raises `UsageError` when there are more processes than GPUs."""
        import torch

        if self.count == 1 or device.type != "cuda":
            return
        cards = torch.cuda.device_count()
        if self.local_rank >= cards:
            raise UsageError(f"More processes than GPUs ({cards}) on one machine; start one for each GPU.")
        torch.cuda.set_device(self.local_rank)

    def own_random_numbers(self, seed: int) -> None:
        """Let every process but the main one, which is like a single one, draw random numbers of its own."""
        if self.rank:
            import torch

            torch.manual_seed(seed + self.rank)

    def tell(self, error: Exception) -> None:
        """End all processes with `error`; raises `EndedTogether`, or `error` itself where it is a bug."""
        known = isinstance(error, PersonaError)
        message = str(error) if known else f"a fault of the program, see above: {type(error).__name__}: {error}"
        try:
            self._meet(0, (message, error.exit_code if known else PersonaError.exit_code))
        except PersonaError:
            if known:
                raise
            raise error from None  # with its traceback

    def _meet(self, value: float, fault: tuple[str, int] | None) -> float:
        if self.count == 1:
            return value
        import torch

        said = torch.tensor([float(fault is not None), value], dtype=torch.float64)
        _exchange(lambda: torch.distributed.all_reduce(said, torch.distributed.ReduceOp.MAX))
        if said[0]:
            self._end_together(fault)
        return said[1].item()

    def _end_together(self, fault: tuple[str, int] | None) -> None:
        faults = self._gathered(fault)
        rank, (message, code) = next((rank, fault) for rank, fault in enumerate(faults) if fault is not None)
        where = f"In process {rank} of {self.count}: " if rank else ""
        raise EndedTogether(where + message, code)

    def _gathered(self, value: T) -> list[T]:
        import torch

        values: list[Any] = [None] * self.count
        _exchange(lambda: torch.distributed.all_gather_object(values, value))
        return values


ALONE = Devices(0, 1, 0)


class Unreachable(EnvironmentFault):
    """The other processes cannot be told anything any more."""


def _exchange(work: Callable[[], Any]) -> None:
    try:
        work()
    except RuntimeError as error:
        raise unreachable(error) from None


def unreachable(error: Exception) -> Unreachable:
    """What the failed exchange `error` means for a person."""
    reason = (str(error).splitlines() or [""])[0]
    return Unreachable(
        f"Another process of this run has ended, or cannot be reached ({reason}). Run the same command again to "
        "continue after the last checkpoint."
    )


# --- launch -----------------------------------------------------------------------------------------------------------
# How `accelerate launch` and `torchrun` start the processes of a run, and how these end: together.
#
# Both start the same script once for every device and say in environment variables which process is which.


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
    from persona.model.sources import prepare_libraries

    prepare_libraries(offline=False)  # before torch is imported
    import torch

    # objects and single numbers travel over gloo, and so do gradients on the CPU; those on CUDA cards over NCCL
    nccl = torch.cuda.is_available() and torch.distributed.is_nccl_available()
    torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if nccl else "gloo", timeout=PATIENCE)
    return Devices(torch.distributed.get_rank(), count, int(os.environ["LOCAL_RANK"]), sharded)
