"""The merge that merge_lora_to_fp16.py asks for: what is merged and verified, and the lines that a person reads."""

from collections.abc import Iterator
from pathlib import Path

import torch

from persona.config import Config
from persona.errors import EnvironmentFault, UsageError
from persona.files import read_json
from persona.merge.changes import FourBits
from persona.merge.merge import MergeReport, merge
from persona.merge.verify import Proof, plan_proof
from persona.model.device import DTYPES

ORIGINAL, DEQUANTIZED = "the original 16-bit weights", "the dequantized 4-bit weights"


def check_comparable(config: Config, adapter: Path) -> None:
    """Raise `UsageError` unless `adapter` is that of a run in 4 bits, which has the settings `config`."""
    if not (_has_run(adapter) and config.quantization.load_in_4bit):
        raise UsageError(f"--compare-bases: {adapter} was not trained in 4 bits, as far as its run says; leave it out.")


def _has_run(adapter: Path) -> bool:
    return (adapter.resolve().parent / "config.json").is_file()


def merge_and_verify(
    config: Config, base: Path, adapter: Path, output: Path, verified: bool, compare_bases: bool
) -> Iterator[str]:
    """Merge into `output`, compare with base + adapter if `verified`, and return the lines to print.

    With `compare_bases` the adapter is merged into the original and into the dequantized weights, and the better merge
    is kept; raises `EnvironmentFault` if the memory cannot hold the model then.
    """
    proof = plan_proof(base, adapter, config.data if _has_run(adapter) else None) if verified else None
    if compare_bases and proof is None:
        raise EnvironmentFault("--compare-bases: there is not enough free memory to compute the model; leave it out.")
    dtype, shard_bytes = getattr(torch, config.export.dtype), round(config.export.max_shard_size_gb * 1e9)
    four_bits = FourBits(config.quantization, trained_in(adapter)) if compare_bases else None
    report = merge(base, adapter, output, dtype, shard_bytes, config.generation, proof, four_bits)
    yield from _verification(report, proof, verified)
    weights = report.weights
    yield (
        f"Merged {adapter} into {config.model.name_or_path}: {weights.changed} of {weights.tensors} tensors changed, "
        f"{weights.untouched} are the base's byte for byte, all finite, largest change {weights.largest_change:.4f}; "
        f"{config.export.dtype} in {weights.shards} file(s)."
    )
    if not report.base_checked:
        yield "This adapter does not say which weights it was trained on; only shapes were compared."
        yield "The chat template is written with thinking off; if it was trained with it, put the base's in its place."
    if report.untied:
        yield "The embeddings were one tensor and are two now, as the adapter changes them differently."
    yield f"Written to {output}"


def _verification(report: MergeReport, proof: Proof | None, verified: bool) -> Iterator[str]:
    if proof is None:
        why = "not enough free memory to compute the model, even in 16 bits" if verified else "--no-verify"
        compared = "held-out loss, top-1, logits"
        yield f"Not verified ({why}): the merged model was not compared with base + adapter ({compared})."
        return
    for verdict, into in zip(report.verdicts, ("", f" into {DEQUANTIZED}"), strict=False):
        yield f"Verified{into}, pass: {verdict} ({proof.source})."
    if len(report.verdicts) > 1:
        kept = DEQUANTIZED if report.dequantized else ORIGINAL
        yield f"The held-out loss is lower when merged into {kept}; that merge was kept."


def trained_in(adapter: Path) -> torch.dtype:
    """The number format in which the run that made `adapter` computed; bfloat16 if nothing says it."""
    path = adapter.resolve().parent / "run.json"
    resolved = read_json(path).get("resolved") if path.is_file() else None
    return DTYPES.get(resolved.get("precision", "") if isinstance(resolved, dict) else "", torch.bfloat16)
