"""Several processes that train one model: which one this is, and what they tell each other.

They meet whenever numbers are exchanged, and at every meeting they first say whether one of them has failed, so that a
fault in one ends all of them, with one message and one exit code, and none waits for ever.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
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
    """Number of this process on its machine, and of its card."""
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
        """Make this process's card the current one; raises `UsageError` when there are more processes than cards."""
        import torch

        if self.count == 1 or device.type != "cuda":
            return
        cards = torch.cuda.device_count()
        if self.local_rank >= cards:
            raise UsageError(f"More processes than CUDA cards ({cards}) on one machine; start one for each card.")
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
