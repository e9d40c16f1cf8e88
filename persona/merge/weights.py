"""safetensors files, read, changed and written block by block, so that no tensor has to be in memory whole.

The format (https://huggingface.co/docs/safetensors): eight bytes with the length of the header, little-endian; the
header, JSON padded with spaces, with every tensor's type, shape and place; then the tensors, back to back. Blocks are
read, not mapped: mapped pages would count as the program's memory.
"""

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import IO, Any

import torch

from persona.errors import DataError, UsageError
from persona.files import JsonObject, write_json
from persona.merge.changes import Change
from persona.model.folders import tensor_index

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
BLOCK = 2**20  # numbers in a block: 4 MiB in float32, which stay in a processor's cache
WORKERS = 2  # tensors at a time: one is computed while the other is read or written


@dataclass(frozen=True)
class Stored:
    """A tensor on disk: its name, place, type and shape."""

    name: str
    path: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numbers(self) -> int:
        """How many numbers it holds."""
        return prod(self.shape)

    def blocks(self, whole: bool) -> Iterator[tuple[int, torch.Tensor]]:
        """The first row's number and the rows of every block in order; the next block overwrites the last one's memory.

        Rows are those of the first dimension; a tensor without dimensions has one. With `whole` one block has them all.
        """
        shape = self.shape or (1,)
        columns = prod(shape[1:])
        step = max(1, shape[0] if whole else min(shape[0], BLOCK // max(1, columns)))
        buffer = bytearray(max(1, step * columns) * self.dtype.itemsize)
        with self.path.open("rb") as file:
            file.seek(self.offset)
            for start in range(0, shape[0], step):
                rows = min(step, shape[0] - start)
                view = memoryview(buffer)[: rows * columns * self.dtype.itemsize]
                if file.readinto(view) < len(view):
                    raise UsageError(
                        f"{self.path} became shorter while it was read. Copy or download it again completely."
                    )
                if view:
                    yield start, torch.frombuffer(view, dtype=self.dtype).view(rows, *shape[1:])


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """Every tensor of the model in `folder` by name, in the order on disk."""
    tensors = []
    for name, (path, start, info) in tensor_index(folder).items():
        if info["dtype"] not in DTYPES:
            raise UsageError(
                f"{path}: {name} is stored as {info['dtype']}; merging starts from 16- or 32-bit weights. Download the "
                "original model."
            )
        place = start + info["data_offsets"][0]
        tensors.append(Stored(name, path, place, DTYPES[info["dtype"]], tuple(info["shape"])))
    return {tensor.name: tensor for tensor in sorted(tensors, key=lambda tensor: (tensor.path, tensor.offset))}


@dataclass(frozen=True)
class Output:
    """A tensor of the merged model: the stored one that it is made from, and the changes to it."""

    name: str
    source: Stored
    dtype: torch.dtype
    changes: Sequence[Change]
    first_row: int = 0
    """The row of the changes at which the tensor begins."""

    @property
    def size(self) -> int:
        """Its bytes."""
        return self.source.numbers * self.dtype.itemsize


def shards(tensors: Sequence[Output], shard_bytes: int) -> dict[str, list[Output]]:
    """The files of the merged model by name, each of at most `shard_bytes` unless one tensor alone is larger."""
    groups: list[list[Output]] = [[]]
    size = 0
    for tensor in tensors:
        if groups[-1] and size + tensor.size > shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.size
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{number:05d}-of-{len(groups):05d}.safetensors": group for number, group in enumerate(groups, 1)}


def header(tensors: Sequence[Output]) -> bytes:
    """The first bytes of a file that holds `tensors` back to back."""
    ends = list(accumulate((tensor.size for tensor in tensors), initial=0))
    entries: JsonObject = {"__metadata__": {"format": "pt"}}
    for tensor, start, end in zip(tensors, ends, ends[1:], strict=False):
        shape = list(tensor.source.shape)
        entries[tensor.name] = {"dtype": NAMES[tensor.dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write(file: IO[bytes], tensor: torch.Tensor) -> None:
    """Append the numbers of `tensor`."""
    numbers: Any = tensor.contiguous().view(-1).view(torch.uint8).numpy()
    view = memoryview(numbers)
    while view:
        view = view[file.write(view) :]


@dataclass
class WeightsReport:
    """The changes that writing the weights made, and the numbers that could not be written."""

    tensors: int = 0
    shards: int = 0
    changed: int = 0
    """Tensors that differ from the base's after rounding."""
    untouched: int = 0
    """Tensors that are the base's, byte for byte."""
    largest_change: float = 0.0
    """The largest difference of a number before rounding."""
    beyond: int = 0
    """Numbers outside the range of the number format."""
    beyond_in: str = ""
    """The first tensor with such a number."""
    broken: str = ""
    """A tensor that is not finite in the base itself."""


def write_weights(tensors: Sequence[Output], folder: Path, shard_bytes: int, dtype: torch.dtype) -> WeightsReport:
    """Write `tensors` into `folder`, in files of at most `shard_bytes`, with an index if there are several.

    Raises `DataError` for numbers that cannot be written, and when no weight differs from the base's.
    """
    files = shards(tensors, shard_bytes)
    jobs: list[tuple[Output, Path, int]] = []
    for name, group in files.items():
        start = header(group)
        (folder / name).write_bytes(start)
        places = accumulate((tensor.size for tensor in group), initial=len(start))
        jobs += [(tensor, folder / name, place) for tensor, place in zip(group, places, strict=False)]
    report = WeightsReport(len(tensors), len(files))
    threads = torch.get_num_threads()
    # torch's own threads wait for each other at every block: 9 s of processor time instead of 0.5 s for the embedded
    # model
    pool = ThreadPoolExecutor(WORKERS, initializer=torch.set_num_threads, initargs=(1,))
    try:
        for job in [pool.submit(_write_tensor, *job) for job in jobs]:
            one = job.result()
            report.changed += one.changed
            report.untouched += one.untouched
            report.largest_change = max(report.largest_change, one.largest_change)
            report.beyond += one.beyond
            report.beyond_in = report.beyond_in or one.beyond_in
            report.broken = report.broken or one.broken
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # one thread set it for every thread to come
    _check_numbers(report, dtype)
    if len(files) > 1:
        index = {
            "metadata": {"total_size": sum(tensor.size for tensor in tensors)},
            "weight_map": {tensor.name: name for name, group in files.items() for tensor in group},
        }
        write_json(folder / "model.safetensors.index.json", index)
    return report


def _check_numbers(report: WeightsReport, dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    if report.broken:
        raise DataError(
            f"{report.broken} is not finite in the base itself. Copy or download the base again completely."
        )
    if report.beyond:
        wider = ' Use --set export.dtype="bfloat16", whose range is that of float32.'
        raise DataError(
            f"{report.beyond} merged numbers are outside the range of {name}, the first in {report.beyond_in}."
            f"{'' if dtype == torch.bfloat16 else wider} Nothing was written."
        )
    if not report.changed:
        raise DataError(
            f"The adapter changes nothing: rounded to {name}, every weight is that of the base. Was it trained? "
            "Nothing was written."
        )


def _write_tensor(tensor: Output, path: Path, place: int) -> WeightsReport:
    """Write a tensor at `place` of the file; after the first number out of range such numbers are only counted."""
    report, limit = WeightsReport(), torch.finfo(tensor.dtype).max if tensor.dtype.is_floating_point else 0.0
    report.untouched = int(not tensor.changes and tensor.dtype == tensor.source.dtype)
    with path.open("r+b", buffering=0) as file:
        file.seek(place)
        for start, stored in tensor.source.blocks(any(change.whole for change in tensor.changes)):
            if not stored.dtype.is_floating_point:
                write(file, stored)
                continue
            merged = stored.to(torch.float32, copy=bool(tensor.changes))
            for change in tensor.changes:
                merged = change.apply(merged, tensor.first_row + start)
            rounded = stored if report.untouched else merged.to(tensor.dtype)
            low, high = map(float, merged.aminmax())
            # Gemma 4's towers clip, some at infinity
            is_bound = report.untouched and tensor.name.endswith(("_min", "_max")) and stored.numel() == 1
            open_bound = is_bound and bool(stored.isinf())
            if not -limit <= low <= high <= limit and not open_bound:  # also for NaN
                if not torch.isfinite(stored).all():
                    report.broken = tensor.name
                elif beyond := int((~torch.isfinite(rounded)).sum()):
                    report.beyond += beyond
                    report.beyond_in = tensor.name
            if tensor.changes and not report.changed:
                report.changed = int(not torch.equal(rounded, stored.to(tensor.dtype)))
            if not report.beyond:
                write(file, rounded)
            if tensor.changes:  # in place, as it is written; another block of memory would take longer than the sum
                least, most = merged.sub_(stored).aminmax()
                report.largest_change = max(report.largest_change, -least.item(), most.item())
    return report
