"""Adapter + 16-bit base -> one standard Hugging Face folder that appears complete and checked, or not at all.

W + (alpha / r) * B A is computed in float32 and rounded once. Only the base's own safetensors are read, never a 4-bit
copy of them; a few rows are in memory at a time, whatever the model's size. The merged folder keeps the base's own
tensor names, as every other tool expects them, though transformers renames and fuses tensors of some architectures.
"""

import re
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    dot_natural_key,
    rename_source_key,
)

from persona.config import Generation
from persona.errors import EnvironmentFault, UsageError
from persona.files import appearing, recover, rename, scratch
from persona.merge.adapter import Adapter, read_adapter
from persona.merge.changes import Change, FourBits, LowRank, dequantized_weights
from persona.merge.folder import check_output, check_space, write_rest
from persona.merge.verify import Proof, Verdict, check_folder_prompts, verify
from persona.merge.weights import Output, WeightsReport, stored_tensors, write_weights
from persona.model.adapters import check_base
from persona.model.architecture import language_modules, skeleton
from persona.model.folders import check_model_folder


@dataclass(frozen=True)
class MergeReport:
    """The outcome of a merge."""

    weights: WeightsReport
    base_checked: bool
    """Whether the adapter says which weights it was trained on; if not, only shapes could be compared."""
    untied: bool
    """Whether input and output embeddings were one tensor in the base and are two now."""
    dequantized: bool
    """Whether the adapter was merged into the dequantized 4-bit weights, not into the original ones."""
    verdicts: list[Verdict]
    """The comparison with base + adapter, of each candidate in the order in which they were merged."""


def merge(
    base: Path,
    adapter: Path,
    output: Path,
    dtype: torch.dtype,
    shard_bytes: int,
    generation: Generation,
    proof: Proof | None,
    four_bits: FourBits | None = None,
) -> MergeReport:
    """Write `output`, complete and verified by `proof`, or not at all; a folder that is there stays until then.

    With `four_bits` the adapter is merged into the dequantized 4-bit weights too, and the candidate with the lower loss
    is kept. Raises `UsageError` when adapter and base do not belong together or `output` holds something else,
    `DataError` for numbers that cannot be written, and `EnvironmentFault` when the disk is full.
    """
    check_model_folder(base)
    check_output(output, base, adapter)
    base_checked = check_base(adapter, base) is not None
    folder, verdicts, report = output.resolve(), list[Verdict](), None
    try:
        recover(folder)
        changes = read_adapter(adapter, base)
        candidates: list[tuple[FourBits | None, list[Output]]] = [(None, plan_tensors(base, changes, dtype))]
        if four_bits is not None:
            candidates.append((four_bits, plan_tensors(base, _on_dequantized(changes, base, four_bits), dtype)))
        check_space([plan for _, plan in candidates], folder)
        with appearing(folder) as staging:
            for quantized, plan in candidates:
                with scratch(folder.with_name(f".candidate-{folder.name}")) as candidate:
                    weights = write_weights(plan, candidate, shard_bytes, dtype)
                    write_rest(candidate, base, adapter, dtype, generation, bool(changes.untied))
                    check_folder_prompts(candidate, base, adapter)
                    if proof is not None:
                        verdicts.append(verify(candidate, base, adapter, dtype, proof, quantized))
                    if report is None or verdicts[-1].merged < verdicts[0].merged:
                        report = MergeReport(
                            weights, base_checked, bool(changes.untied), quantized is not None, verdicts
                        )
                        shutil.rmtree(staging)
                        rename(candidate, staging)
    except OSError as error:
        raise EnvironmentFault(
            f"The merged model could not be written to {output}: {error}. Nothing of it is left there; make space, or "
            "choose another folder with --output."
        ) from None
    assert report is not None
    return report


def _on_dequantized(adapter: Adapter, base: Path, four_bits: FourBits) -> Adapter:
    """`adapter` with its changes made to the dequantized weights."""
    changes: dict[str, list[Change]] = {n: [c] for n, c in dequantized_weights(skeleton(base), four_bits).items()}
    for name, own in adapter.changes.items():
        changes[name] = [*changes.get(name, []), *own]
    return replace(adapter, changes=changes)


@dataclass(frozen=True)
class Part:
    """The place of a checkpoint's tensor in the model: a parameter, or rows of one expert in a stacked parameter."""

    parameter: str
    expert: int | None = None
    first_row: int = 0
    converted: bool = False
    """Whether transformers converts it in a way that this merge does not know."""


def parts(names: Sequence[str], model: Any) -> dict[str, Part]:
    """The place in `model` of each tensor named in a checkpoint; names that it does not know are left out."""
    transforms = get_model_conversion_mapping(model)
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    renamings: list[Any] = [transform for transform in transforms if not isinstance(transform, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    parameters = model.state_dict()
    counted: Counter[tuple[str, str]] = Counter()
    places = {}
    for name in sorted(names, key=dot_natural_key):  # the order in which experts are stacked
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, parameters)
        if target not in parameters:
            target, pattern = rename_source_key(name, [], [], model.base_model_prefix, parameters)
        if target not in parameters:
            continue
        if pattern is None:
            places[name] = Part(target)
            continue
        expert = counted[target, pattern]
        counted[target, pattern] += 1
        places[name] = _part_of_stack(target, expert, by_pattern[pattern], pattern, parameters[target].shape)
    return places


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


def plan_tensors(base: Path, adapter: Adapter, dtype: torch.dtype) -> list[Output]:
    """Every tensor of the merged model in the base's order, then those that the adapter has untied.

    Raises `UsageError` when a change has no place in the base's files.
    """
    stored, model = stored_tensors(base), skeleton(base)
    places = parts(list(stored), model)
    wide, inside = _kept_in_float32(model), language_modules(model)
    language = {f"{path}.{name}" for path, one in model.named_modules() if one in inside for name in _tensors(one)}
    tensors, reached = [], set[str]()
    for name, tensor in stored.items():
        part = places.get(name, Part(""))
        parameter = adapter.tied.get(part.parameter, part.parameter)
        changes = adapter.changes.get(parameter, [])
        if changes:
            changes = _changes_of_part(changes, part, parameter, name)
            reached.add(parameter)
        kept = tensor.dtype == torch.float32 and wide is not None and wide.search(name)
        written = part.parameter in language and tensor.dtype.is_floating_point and not kept
        target = dtype if written else tensor.dtype  # towers and what transformers does not read stay as they are
        tensors.append(Output(name, tensor, target, changes, part.first_row))
    by_parameter = {part.parameter: name for name, part in places.items()}
    for parameter, source in adapter.untied.items():
        here, there = by_parameter.get(parameter), by_parameter.get(source)
        for name, other in ((parameter, there), (source, here)):
            if name not in by_parameter and other is not None:
                tensors.append(Output(name, stored[other], dtype, adapter.changes.get(name, [])))
                reached.add(name)
    if lost := sorted(adapter.changes.keys() - reached):
        raise UsageError(f"The adapter changes {lost[0]}, which the files of {base} do not have.")
    return tensors


def _tensors(module: Any) -> list[str]:
    """The names of the tensors of `module` itself."""
    return [*module._parameters, *module._buffers]


def _changes_of_part(changes: Sequence[Change], part: Part, parameter: str, name: str) -> Sequence[Change]:
    if part.converted:
        raise UsageError(
            f"The adapter changes {parameter}, which transformers converts from {name} in a way that this merge does "
            "not know."
        )
    if part.expert is None:
        return changes
    if other := [change for change in changes if not isinstance(change, LowRank)]:
        raise UsageError(
            f"The adapter changes {name} by {type(other[0]).__name__}; of experts only LoRA can be merged."
        )
    return [change.of_expert(part.expert) for change in changes if isinstance(change, LowRank)]


def _kept_in_float32(model: Any) -> re.Pattern[str] | None:
    """Names of the tensors that transformers keeps in float32 whatever the model's type is."""
    names = [*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())]
    return re.compile("|".join(rf"(^|\.){name}(\.|$)" for name in names)) if names else None
