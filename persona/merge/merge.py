"""Adapter + 16-bit base -> one standard Hugging Face folder that appears complete and checked, or not at all.

W + (alpha / r) * B A is computed in float32 and rounded once. Only the base's own safetensors are read, never a 4-bit
copy of them; a few rows are in memory at a time, whatever the model's size.
"""

import os
import re
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path

import torch

from persona.config import Quantization
from persona.errors import DataError, EnvironmentFault, UsageError
from persona.files import publish, recover, write_json
from persona.merge.adapter import read_adapter
from persona.merge.folder import _write_rest
from persona.merge.weights import Output, header, outputs, shards, skeleton, stored_tensors, write
from persona.model.adapters import PERSONA, TOKENIZER_FILES, check_base
from persona.model.folders import check_model_folder

_OWN_FILES = {"config.json", "generation_config.json", "chat_template.jinja", "README.md", "run.json", PERSONA}
_OWN_FILES |= {*TOKENIZER_FILES}
_OWN_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")
WORKERS = 2  # tensors at a time: one is computed while the other is read or written
_REST_BYTES = 64 * 2**20  # tokenizer and settings: the largest tokenizer.json known has 34 MB


@dataclass(frozen=True)
class MergeReport:
    """What a merge did."""

    folder: Path
    tensors: int
    changed: int
    """Tensors that differ from the base's after rounding."""
    largest_change: float
    """The largest difference of a number before rounding."""
    shards: int
    verified_base: bool
    """Whether the adapter says which weights it was trained on; if not, only shapes could be compared."""
    untied: bool
    """Whether input and output embeddings were one tensor in the base and are two now."""
    held: Quantization | None = None
    """The quantization that the base's weights went through, or None for the original ones."""


Check = Callable[[Path, Quantization | None], float]
"""Measures a merged folder that is not published yet: its loss; raises what keeps it from being published."""


def merge(
    base: Path,
    adapter: Path,
    output: Path,
    dtype: torch.dtype,
    shard_bytes: int,
    check: Check | None = None,
    held: Sequence[tuple[Quantization, torch.dtype] | None] = (None,),
    complete: Callable[[Path], None] = lambda folder: None,
) -> MergeReport:
    """Write `output`, complete and passed by `check`, or not at all; one that is there stays until then.

    `held` are the forms of the base to merge into: None is its own weights, a quantization and compute type those
    that training in 4 bits saw. Of several the one whose loss `check` finds lowest is kept. `complete` adds files of
    its own to a merged folder before that.

    Raises `UsageError` when adapter and base do not belong together or `output` holds something else, `DataError` for
    numbers that cannot be written, and `EnvironmentFault` when the disk is full.
    """
    check_model_folder(base)
    _check_paths(base, adapter, output)
    persona = check_base(adapter, base)
    folder = output.resolve()
    stagings = [folder.with_name(f".staging-{folder.name}{suffix}") for suffix in ("", "-4bit")]
    best: tuple[float, Path, MergeReport] | None = None
    try:
        recover(folder)
        for staging in stagings:
            shutil.rmtree(staging, ignore_errors=True)
        for number, (form, staging) in enumerate(zip(held, stagings, strict=False)):
            plan, untied = _plan(base, adapter, dtype, form)
            _check_space(plan, folder, len(held) - number)
            staging.mkdir(parents=True)
            report = replace(_write_weights(plan, staging, shard_bytes, dtype), folder=output, untied=untied,
                             verified_base=persona is not None, held=form[0] if form is not None else None)  # fmt: skip
            _write_rest(base, adapter, staging, dtype, persona, untied)
            complete(staging)
            loss = check(staging, report.held) if check is not None else 0.0
            if best is None or loss < best[0]:
                best = (loss, staging, report)
        assert best is not None
        publish(best[1], folder)
        return best[2]
    except OSError as error:
        raise EnvironmentFault(
            f"The merged model could not be written to {output}: {error}. Nothing of it is left there; make space, or "
            "choose another folder with --output."
        ) from None
    finally:
        for staging in stagings:
            shutil.rmtree(staging, ignore_errors=True)


def _plan(
    base: Path, adapter: Path, dtype: torch.dtype, form: tuple[Quantization, torch.dtype] | None
) -> tuple[list[Output], bool]:
    model = skeleton(base)
    quantized = {}
    if form is not None:
        from persona.merge.changes import held_in_4_bits

        quantized = held_in_4_bits(model, *form)
    read = read_adapter(adapter, model, base)
    changes = {name: [*quantized.get(name, []), *read.changes.get(name, [])] for name in {**quantized, **read.changes}}
    plan = outputs(stored_tensors(base), skeleton(base), replace(read, changes=changes), dtype, base)
    return plan, bool(read.untied)


def _check_paths(base: Path, adapter: Path, output: Path) -> None:
    folder, another = output.resolve(), "choose another folder with --output."
    for source in (base, adapter):
        if folder == source.resolve() or source.resolve() in folder.parents:
            raise UsageError(f"The output {output} lies in the input {source}; {another}")
        if folder in source.resolve().parents:
            raise UsageError(f"The output {output} would replace the folder that holds the input {source}; {another}")
    for path in (folder, *folder.parents):
        if os.path.exists(path) and not os.path.isdir(path):
            raise UsageError(f"The output {output} cannot be a folder, since {path} is a file; {another}")
    if folder in (Path.cwd(), *Path.cwd().parents):
        raise UsageError(f"The output {output} is the current folder or holds it; {another}")
    found = sorted(path.name for path in folder.iterdir()) if os.path.isdir(folder) else []
    strange = [name for name in found if name not in _OWN_FILES and not _OWN_WEIGHTS.fullmatch(name)]
    if strange:
        names = ", ".join(strange[:5]) + (", ..." if len(strange) > 5 else "")
        raise UsageError(f"{output} would be replaced, but holds what no merge wrote: {names}. Move it, or {another}")
    if found and PERSONA not in found:
        raise UsageError(f"{output} exists and is no merged model of ours (no {PERSONA}); remove it, or {another}")


def _check_space(plan: Sequence[Output], folder: Path, times: int) -> None:
    there = next(path for path in folder.parents if os.path.isdir(path))
    needed, free = times * (sum(tensor.size for tensor in plan) + _REST_BYTES), shutil.disk_usage(there).free
    if needed > free:
        kept = " The model that is there is kept until the new one is whole." if os.path.isdir(folder) else ""
        raise EnvironmentFault(
            f"The merged model needs {needed / 1e9:.1f} GB, and {there} has {free / 1e9:.1f} GB free.{kept} Nothing "
            "was written; make space, or choose a folder on another disk with --output."
        )


@dataclass
class _Tally:
    changed: int = 0
    largest: float = 0.0
    beyond: int = 0
    beyond_in: str = ""
    broken: str = ""


def _write_weights(plan: Sequence[Output], folder: Path, shard_bytes: int, dtype: torch.dtype) -> MergeReport:
    files = shards(plan, shard_bytes)
    jobs: list[tuple[Output, Path, int]] = []
    for file_name, tensors in files.items():
        start = header([(tensor.name, tensor.dtype, tensor.source.shape) for tensor in tensors])
        (folder / file_name).write_bytes(start)
        places = accumulate((tensor.size for tensor in tensors), initial=len(start))
        jobs += [(tensor, folder / file_name, place) for tensor, place in zip(tensors, places, strict=False)]
    tally = _Tally()
    threads = torch.get_num_threads()
    # torch's own threads wait for each other at every block: 9 s of processor time instead of 0.5 s for the embedded
    # model
    pool = ThreadPoolExecutor(WORKERS, initializer=torch.set_num_threads, initargs=(1,))
    try:
        for job in [pool.submit(_write_tensor, *job) for job in jobs]:
            done = job.result()
            tally.changed += done.changed
            tally.largest = max(tally.largest, done.largest)
            tally.beyond += done.beyond
            tally.beyond_in = tally.beyond_in or done.beyond_in
            tally.broken = tally.broken or done.broken
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # one thread set it for every thread to come
    if tally.broken:
        raise DataError(f"{tally.broken} is not finite: the base already is. Copy or download it again completely.")
    if tally.beyond:
        advice = (
            "" if dtype == torch.bfloat16 else ' Use --set export.dtype="bfloat16", whose range is that of float32.'
        )
        raise DataError(
            f"{tally.beyond} merged numbers are outside the range of {str(dtype).removeprefix('torch.')}, the first "
            f"in {tally.beyond_in}.{advice} Nothing was written."
        )
    if not tally.changed:
        raise DataError(
            f"The adapter changes nothing: rounded to {dtype}, every weight is that of the base. Was it trained? "
            "Nothing was written."
        )
    if len(files) > 1:
        total = sum(tensor.size for tensor in plan)
        places = {tensor.name: file_name for file_name, tensors in files.items() for tensor in tensors}
        index = {"metadata": {"total_size": total}, "weight_map": places}
        write_json(folder / "model.safetensors.index.json", index)
    return MergeReport(folder, len(plan), tally.changed, tally.largest, len(files), False, False)


def _write_tensor(tensor: Output, path: Path, place: int) -> _Tally:
    """Write one tensor of the merged model to its place in a file; once a number was out of range they are counted."""
    tally = _Tally()
    with path.open("r+b", buffering=0) as file:
        file.seek(place)
        for start, stored in tensor.source.blocks(any(change.whole for change in tensor.changes)):
            if not stored.dtype.is_floating_point:
                write(file, stored)
                continue
            merged = stored.to(torch.float32, copy=bool(tensor.changes))
            for change in tensor.changes:
                merged = change.apply(merged, tensor.first_row + start)
            rounded = merged.to(tensor.dtype)
            low, high = map(float, merged.aminmax())
            if not -torch.finfo(tensor.dtype).max <= low <= high <= torch.finfo(tensor.dtype).max:  # also where NaN
                if not torch.isfinite(stored).all():
                    tally.broken = tensor.name
                elif beyond := int((~torch.isfinite(rounded)).sum()):
                    tally.beyond += beyond
                    tally.beyond_in = tensor.name
            if tensor.changes and not tally.changed:
                tally.changed = int(not torch.equal(rounded, stored.to(tensor.dtype)))
            if not tally.beyond:
                write(file, rounded)
            if tensor.changes:  # in place, as it is written; another block of memory would take longer than the sum
                least, most = merged.sub_(stored).aminmax()
                tally.largest = max(tally.largest, -least.item(), most.item())
    return tally
