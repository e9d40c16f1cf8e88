"""Several processes that train one model: how they start, what they exchange, and how they end together.

`accelerate launch` and `torchrun` start the same script once for each device and say in environment variables which
process is which. The processes meet whenever they exchange numbers, and at each meeting they first say whether one of
them has failed. So a fault in one ends all of them, with one message and one exit code, and none waits for ever.
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
# The first process may download a model while the others wait; a process that dies is noticed at once all the same.
PATIENCE = timedelta(days=1)
REFUSED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism configuration",
    "FSDP_OFFLOAD_PARAMS": "FSDP's offloading to the CPU",
}


class EndedTogether(PersonaError):
    """A fault of one process that all of them know."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(eq=False)
class Devices:
    """This process among those of the run. Its methods are meetings: all processes must call them."""

    rank: int
    """Number of this process, from 0; process 0 writes, prints and holds the run's folder."""
    count: int
    """Processes of the run, over all machines."""
    local_rank: int
    """Number of this process on its machine, and of its GPU."""
    sharded: bool = False
    """Whether each process holds a part of the base model, so that none can compute without the others."""
    in_passes: bool = False
    """Whether this process is in the middle of passes with a sharded base, when it cannot tell of a fault."""

    @property
    def main(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def largest(self, value: float, fault: tuple[str, int] | None = None) -> float:
        """The largest `value` of all processes; raises `EndedTogether` when one of them has a `fault`."""
        if self.count == 1:
            return value
        failed, largest = _reduced("MAX", float(fault is not None), value)
        if failed:
            faults = enumerate(self._gathered(fault))
            rank, (message, code) = next((rank, fault) for rank, fault in faults if fault is not None)
            where = f"In process {rank} of {self.count}: " if rank else ""
            raise EndedTogether(where + message, code)
        return largest

    def total(self, value: float) -> float:
        """The sum of every process's `value`, in double precision."""
        if self.count == 1:
            return value
        self.largest(0)
        return _reduced("SUM", value)[0]

    def gather(self, value: T) -> list[T]:
        """The `value` of every process, in their order."""
        if self.count == 1:
            return [value]
        self.largest(0)
        return self._gathered(value)

    def on_main(self, work: Callable[[], T]) -> T:
        """The result of `work`, done in the main process, for all of them; an error there ends all of them."""
        result = [work() if self.main else None]
        if self.count > 1:
            import torch

            self.largest(0)
            _exchange(lambda: torch.distributed.broadcast_object_list(result, src=0))
        return result[0]  # pyright: ignore[reportReturnType]

    def same(self, value: str, setting: str) -> str:
        """`value`, the meaning of `setting` here; raises `UsageError` when another process has another one."""
        values = self.gather(value)
        if len(set(values)) > 1:
            raise UsageError(f"{setting} auto means something else on each device ({', '.join(values)}); set it.")
        return value

    def first_on_each_machine(self, work: Callable[[], T]) -> T:
        """The result of `work`, done by one process of each machine and then by the others, who find its files."""
        result = work() if self.local_rank == 0 else None
        self.largest(0)
        return work() if self.local_rank else result  # pyright: ignore[reportReturnType]

    def passes(self, groups: Sequence[Sequence[T]], spare: Sequence[T]) -> Iterator[tuple[Sequence[T], float]]:
        """Each of `groups` with weight 1.0; with a sharded base also `spare` with 0.0, until all have equally many."""
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
        self.largest(0)  # all memory is taken by now: an error has come before the exchange
        _exchange(lambda: torch.distributed.all_reduce(flat))
        *sums, loss = flat.split([*(part.numel() for part in parts), 1])
        for weight, part in zip(weights, sums, strict=True):
            weight.grad = part.view_as(weight)
        return loss[0]

    def take_gpu(self, device: Any) -> None:
        """Make this process's GPU the current one; raises `UsageError` when there are more processes than GPUs."""
        import torch

        if self.count == 1 or device.type != "cuda":
            return
        gpus = torch.cuda.device_count()
        if self.local_rank >= gpus:
            raise UsageError(f"More processes than GPUs ({gpus}) on one machine; start one for each GPU.")
        torch.cuda.set_device(self.local_rank)

    def own_random_numbers(self, seed: int) -> None:
        """Let every process but the main one draw random numbers of its own; the main one draws as if alone."""
        if self.rank:
            import torch

            torch.manual_seed(seed + self.rank)

    def tell(self, error: Exception) -> None:
        """End all processes with `error`; raises `EndedTogether`, or `error` itself if it is a bug."""
        known = isinstance(error, PersonaError)
        message = str(error) if known else f"a fault of the program, see above: {type(error).__name__}: {error}"
        try:
            self.largest(0, (message, error.exit_code if known else PersonaError.exit_code))
        except PersonaError:
            if known:
                raise
            raise error from None  # with its traceback

    def _gathered(self, value: T) -> list[T]:
        import torch

        values: list[Any] = [None] * self.count
        _exchange(lambda: torch.distributed.all_gather_object(values, value))
        return values


ALONE = Devices(0, 1, 0)


class Unreachable(EnvironmentFault):
    """The other processes do not answer any more."""

    def __init__(self, error: Exception) -> None:
        reason = (str(error).splitlines() or [""])[0]
        super().__init__(
            f"Another process of this run has ended, or cannot be reached ({reason}). Run the same command again to "
            "continue after the last checkpoint."
        )


def _reduced(operation: str, *values: float) -> list[float]:
    """The SUM or MAX over all processes of each of `values`, in double precision."""
    import torch

    numbers = torch.tensor(values, dtype=torch.float64)
    _exchange(lambda: torch.distributed.all_reduce(numbers, getattr(torch.distributed.ReduceOp, operation)))
    return numbers.tolist()


def _exchange(work: Callable[[], Any]) -> None:
    try:
        work()
    except RuntimeError as error:
        raise Unreachable(error) from None


@contextmanager
def joined() -> Iterator[Devices]:
    """This process among those that `accelerate launch` or `torchrun` started; alone without them.

    An error that is raised inside is raised in all processes; the first one on each machine prints it.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    # taken out, since accelerate and transformers would wrap and load the model their own way
    sharded = _is_on(os.environ.pop("ACCELERATE_USE_FSDP", ""))
    if count == 1:
        _refuse_unsupported()
        yield ALONE
        return
    devices = _join(count, sharded)
    import torch

    try:
        try:
            _refuse_unsupported()
            yield devices
            devices.largest(0)  # the others may have failed at the very end
        except (EndedTogether, Unreachable):
            raise
        except Exception as error:
            if devices.in_passes:
                gone = isinstance(error, torch.distributed.DistError) or "gloo" in str(error)
                raise (Unreachable(error) if gone else error) from None
            devices.tell(error)
    except (EndedTogether, KeyboardInterrupt) as error:
        if devices.local_rank:
            raise SystemExit(error.exit_code if isinstance(error, EndedTogether) else 130) from None
        raise
    finally:
        # The launcher terminates the others once the first process has ended with an error: let each end by itself.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        torch.distributed.destroy_process_group()  # gloo's threads abort a process that ends without


def build_accelerator(precision: str, device: Any, devices: Devices) -> Any:
    """accelerate's mixed precision and, for fp16, scaling of the loss, on the device that was chosen.

    Raises `UsageError` when the processes were started for another device, or by an unknown launcher.
    """
    from accelerate import Accelerator
    from accelerate.utils import GradientAccumulationPlugin

    accelerator = Accelerator(
        mixed_precision="no" if precision == "fp32" else precision,
        cpu=device.type == "cpu",
        # set here, so that accelerate's configuration file cannot divide the loss
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
    )
    if accelerator.num_processes != devices.count:
        raise UsageError(
            f"accelerate counts {accelerator.num_processes} processes, but torchrun's variables name {devices.count}; "
            "start them with accelerate launch or torchrun."
        )
    if accelerator.device.type != device.type:
        raise UsageError(
            f"accelerate uses {accelerator.device.type}, but model.device means {device.type} here; start "
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


def _join(count: int, sharded: bool) -> Devices:
    from persona.model.sources import prepare_libraries

    prepare_libraries(offline=False)  # before torch is imported
    import torch
    import torch.distributed.nn  # before there is a group: its functions keep the group of their import as a default

    # objects and single numbers travel over gloo, and so do gradients on the CPU; those on GPUs over NCCL
    nccl = torch.cuda.is_available() and torch.distributed.is_nccl_available()
    torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if nccl else "gloo", timeout=PATIENCE)
    return Devices(torch.distributed.get_rank(), count, int(os.environ["LOCAL_RANK"]), sharded)
