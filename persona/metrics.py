"""A run's history as it is written: metrics.jsonl and TensorBoard, both cut back to the checkpoint on resume."""

import json
import math
import sys
from pathlib import Path

import psutil
import torch
from torch.utils.tensorboard import SummaryWriter


class MetricsWriter:
    """Writes each line of metrics to metrics.jsonl and to TensorBoard at once."""

    def __init__(self, run: Path, logs: Path, kept_bytes: int, step: int) -> None:
        """Continue after `kept_bytes` of metrics.jsonl, written up to update `step`."""
        run.mkdir(parents=True, exist_ok=True)
        self._file = (run / "metrics.jsonl").open("a+b")
        self._file.truncate(min(kept_bytes, self._file.seek(0, 2)))
        self._file.seek(0, 2)
        # TensorBoard hides events from purge_step on: updates that a crash lost, or those of an earlier run
        self._board = SummaryWriter(str(logs), purge_step=step + 1 if step else 0)

    def write(self, step: int, epoch: float, values: dict[str, float]) -> None:
        """One line of metrics after update `step`."""
        finite = {tag: value if math.isfinite(value) else None for tag, value in values.items()}
        line = json.dumps({"step": step, "epoch": round(epoch, 4)} | finite)
        self._file.write(line.encode() + b"\n")
        self._file.flush()
        for tag, value in values.items():
            self._board.add_scalar(tag, value, step)
        self._board.flush()

    @property
    def size(self) -> int:
        """Bytes of metrics.jsonl so far."""
        return self._file.tell()

    def close(self) -> None:
        """Close both files."""
        self._file.close()
        self._board.close()


def perplexity(loss: float) -> float:
    """exp of a mean negative log-likelihood in nats; infinite where a float cannot hold it."""
    return math.exp(loss) if loss < 700 else math.inf


def peak_memory_gib(device: torch.device) -> float:
    """Largest memory so far in GiB: of the device on CUDA, of the whole process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset / 2**30
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
