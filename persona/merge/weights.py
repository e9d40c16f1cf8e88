"""Which part of which parameter each tensor of a checkpoint is, and the files that the merged model will have.

transformers renames and fuses tensors when it loads some architectures; the merged folder keeps the base's own names,
as every other tool expects them.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    dot_natural_key,
    rename_source_key,
)

from persona.errors import UsageError
from persona.merge.adapter import Adapter
from persona.merge.changes import Change, LowRank
from persona.model.folders import tensor_index

# --- tensors ----------------------------------------------------------------------------------------------------------
# safetensors files, read and written block by block, so that no tensor has to be in memory whole.
#
# The format (https://huggingface.co/docs/safetensors): eight bytes with the length of the header, little-endian; the
# header, JSON padded with spaces, which gives every tensor's type, shape and place; then the tensors, back to back.
# Blocks are read, not mapped: mapped pages would count as the program's memory.


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


@dataclass(frozen=True)
class Part:
    """What a tensor of a checkpoint is in the model: a parameter, or some rows of one expert in a stacked parameter."""

    parameter: str
    expert: int | None = None
    first_row: int = 0
    converted: bool = False
    """Whether transformers converts it in a way that is not known here."""


@dataclass(frozen=True)
class Output:
    """A tensor of the merged model: the stored one it is made of, and what is done to it."""

    name: str
    source: Stored
    dtype: torch.dtype
    changes: Sequence[Change]
    first_row: int = 0

    @property
    def size(self) -> int:
        """Its bytes."""
        return prod(self.source.shape) * self.dtype.itemsize


def skeleton(base: Path) -> Any:
    """The model in `base` without weights, on torch's meta device; raises `UsageError` for one of unknown kind."""
    try:
        config = AutoConfig.from_pretrained(base, trust_remote_code=False)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (ValueError, KeyError, OSError, ImportError, AttributeError) as error:
        raise UsageError(
            f"The model in {base} is of no kind that can be merged: {str(error).splitlines()[0]}"
        ) from None


def parts(names: Sequence[str], model: Any) -> dict[str, Part]:
    """What each tensor named in a checkpoint is in `model`; names that it does not know are left out."""
    transforms = get_model_conversion_mapping(model)
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    renamings: list[Any] = [transform for transform in transforms if not isinstance(transform, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    parameters = model.state_dict()
    counted: Counter[tuple[str, str]] = Counter()
    found = {}
    for name in sorted(names, key=dot_natural_key):  # the order in which experts are stacked
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, parameters)
        if target not in parameters:
            target, pattern = rename_source_key(name, [], [], model.base_model_prefix, parameters)
        if target not in parameters:
            continue
        if pattern is None:
            found[name] = Part(target)
            continue
        expert = counted[target, pattern]
        counted[target, pattern] += 1
        found[name] = _part_of_stack(target, expert, by_pattern[pattern], pattern, parameters[target].shape)
    return found


def _part_of_stack(target: str, expert: int, converter: WeightConverter, pattern: str, shape: torch.Size) -> Part:
    """The place of a tensor that transformers stacks: one matrix an expert, or several on top of each other."""
    kinds = [(type(operation), getattr(operation, "dim", None)) for operation in converter.operations]
    sources = converter.source_patterns
    if len(converter.target_patterns) == 1 and len(shape) == 3:
        if kinds == [(MergeModulelist, 0)] and len(sources) == 1:
            return Part(target, expert)
        if kinds == [(MergeModulelist, 0), (Concatenate, 1)] and shape[1] % len(sources) == 0:
            return Part(target, expert, sources.index(pattern) * (shape[1] // len(sources)))
    return Part(target, converted=True)


def outputs(stored: Mapping[str, Stored], model: Any, adapter: Adapter, dtype: torch.dtype, base: Path) -> list[Output]:
    """Every tensor of the merged model in the base's order, those behind that the adapter has untied.

    Raises `UsageError` when a change has no place in the base's files.
    """
    places = parts(list(stored), model)
    wide = _kept_in_float32(model)
    made, reached = [], set()
    for name, tensor in stored.items():
        part = places.get(name)
        parameter = part.parameter if part is not None else None
        parameter = adapter.tied.get(parameter, parameter) if parameter is not None else None
        changes = adapter.changes.get(parameter, []) if parameter is not None else []
        if changes and part is not None:
            if part.converted:
                raise UsageError(
                    f"The adapter changes {parameter}, which transformers converts from {name} in a way that this "
                    "merge does not know."
                )
            if part.expert is not None:
                changes = [_expert_change(change, part.expert, name) for change in changes]
            reached.add(parameter)
        kept = tensor.dtype == torch.float32 and wide is not None and wide.search(name)
        target = dtype if tensor.dtype.is_floating_point and not kept else tensor.dtype
        made.append(Output(name, tensor, target, changes, part.first_row if part is not None else 0))
    by_parameter = {part.parameter: name for name, part in places.items()}
    for parameter, source in adapter.untied.items():
        here, there = by_parameter.get(parameter), by_parameter.get(source)
        for name, other in ((parameter, there), (source, here)):
            if name not in by_parameter and other is not None:
                made.append(Output(name, stored[other], dtype, adapter.changes.get(name, [])))
                reached.add(name)
    if lost := sorted(adapter.changes.keys() - reached):
        raise UsageError(f"The adapter changes {lost[0]}, which the files of {base} do not have.")
    return made


def _expert_change(change: Change, expert: int, name: str) -> Change:
    if not isinstance(change, LowRank):
        raise UsageError(f"The adapter changes {name} by {type(change).__name__}; of experts only LoRA can be merged.")
    return change.of_expert(expert)


def _kept_in_float32(model: Any) -> re.Pattern[str] | None:
    """Names of the tensors that transformers keeps in float32 whatever the model's type is."""
    names = [*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())]
    return re.compile("|".join(rf"(^|\.){name}(\.|$)" for name in names)) if names else None


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
