"""safetensors files, read and written block by block, so that no tensor has to be in memory whole.

The format (https://huggingface.co/docs/safetensors): eight bytes with the length of the header, little-endian; the
header, JSON padded with spaces, which gives every tensor's type, shape and place; then the tensors, back to back.
Blocks are read, not mapped: mapped pages would count as the program's memory.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, Any

import torch

from persona.errors import UsageError
from persona.folders import tensor_index

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
BLOCK = 2**20  # numbers in a block: 4 MiB in float32, which stay in a processor's cache


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies, and what it is."""

    name: str
    path: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numbers(self) -> int:
        """How many numbers it holds."""
        return prod(self.shape)

    def blocks(self, whole: bool = False) -> Iterator[tuple[int, torch.Tensor]]:
        """The first row's number and the rows of every block in order; the next block overwrites the last one's memory.

        Rows are those of the first dimension; a tensor without dimensions has one.
        """
        shape = self.shape or (1,)
        columns = prod(shape[1:])
        step = max(1, shape[0] if whole else min(shape[0], BLOCK // max(1, columns)))
        buffer = bytearray(max(1, step * columns) * self.dtype.itemsize)
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.offset)
            for start in range(0, shape[0], step):
                rows = min(step, shape[0] - start)
                view = memoryview(buffer)[: rows * columns * self.dtype.itemsize]
                _fill(file, view, self.path)
                if view:
                    yield start, torch.frombuffer(view, dtype=self.dtype).view(rows, *shape[1:])


def _fill(file: IO[bytes], view: memoryview, path: Path) -> None:
    while view:
        count = file.readinto(view)  # pyright: ignore[reportAttributeAccessIssue]
        if not count:
            raise UsageError(f"{path} became shorter while it was read. Copy or download it again completely.")
        view = view[count:]


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """Every tensor of the model in `folder`, in the order in which it lies on the disk."""
    found = []
    for name, (path, start, info) in tensor_index(folder).items():
        if info["dtype"] not in DTYPES:
            raise UsageError(
                f"{path}: {name} is stored as {info['dtype']}; merging starts from 16- or 32-bit weights. Download the "
                "original model."
            )
        place = start + info["data_offsets"][0]
        found.append(Stored(name, path, place, DTYPES[info["dtype"]], tuple(info["shape"])))
    return {tensor.name: tensor for tensor in sorted(found, key=lambda tensor: (tensor.path, tensor.offset))}


def header(tensors: list[tuple[str, torch.dtype, tuple[int, ...]]]) -> bytes:
    """The first bytes of a file that holds `tensors` back to back."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0
    for name, dtype, shape in tensors:
        end = place + prod(shape) * dtype.itemsize
        entries[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [place, end]}
        place = end
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write(file: IO[bytes], tensor: torch.Tensor) -> None:
    """Append the numbers of `tensor`."""
    numbers: Any = tensor.contiguous().view(-1).view(torch.uint8).numpy()
    view = memoryview(numbers)
    while view:
        view = view[file.write(view) :]
