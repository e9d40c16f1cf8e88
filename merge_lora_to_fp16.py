"""Merge an adapter into its 16-bit base: one standard folder for transformers, vLLM and llama.cpp.

python merge_lora_to_fp16.py
python merge_lora_to_fp16.py outputs/mine --output merged/mine
"""

import argparse
from pathlib import Path

from persona.console import run_script


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "adapter", nargs="?", help="folder of a run or an adapter (default: that of the configured run)"
    )
    parser.add_argument("--output", type=Path, help="folder to write (default: merged/NAME of the run)")
    parser.add_argument("--config", type=Path, help="settings (default: the run's own, else config/default.json)")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="change one setting")
    parser.add_argument(
        "--no-verify", action="store_true", help="do not compare the merged model with base + adapter before it appears"
    )
    parser.add_argument(
        "--compare-bases",
        action="store_true",
        help="of an adapter trained in 4 bits: merge into the original weights and into those that training saw, "
        "measure both on the held-out file, and keep the better",
    )
    args = parser.parse_args()
    if args.no_verify and args.compare_bases:
        parser.error("--compare-bases measures both; it cannot go with --no-verify")

    from persona.artifacts import adapter_folder, merged_name, run_settings
    from persona.errors import EnvironmentFault, UsageError

    config = run_settings(args.adapter, args.config, args.set)
    adapter = adapter_folder(Path(args.adapter or config.training.output_dir).expanduser())
    own_run = (adapter.resolve().parent / "config.json").is_file()
    if args.compare_bases and not (own_run and config.quantization.load_in_4bit):
        raise UsageError(f"--compare-bases: {adapter} was not trained in 4 bits, as far as its run says; leave it out.")

    from persona.sources import resolve_model

    base = resolve_model(config.model.name_or_path)

    import torch

    from persona.merging.merge import merge
    from persona.merging.verify import prepare, trained_in

    name = merged_name(adapter)
    output = args.output or Path("merged") / name
    dtype = getattr(torch, config.export.dtype)
    check = None if args.no_verify else prepare(base, adapter, config.data if own_run else None, dtype, print)
    skipped = (
        "that the merged model says what base + adapter say was not measured (held-out loss, first choices, logits)"
    )
    if args.compare_bases and check is None:
        raise EnvironmentFault("--compare-bases: there is not enough free memory to compute the model; leave it out.")
    held = (None, (config.quantization, trained_in(adapter))) if args.compare_bases else (None,)
    report = merge(base, adapter, output, dtype, round(config.export.max_shard_size_gb * 1e9), check, held)
    if check is None:
        why = "--no-verify" if args.no_verify else "not enough free memory to compute the model, even in 16 bits"
        print(f"Not verified ({why}): {skipped}.")
    if args.compare_bases:
        kept = "the original 16-bit weights" if report.held is None else "the weights as training in 4 bits saw them"
        print(f"The held-out loss is lower when merged into {kept}; that is what was written.")
    unknown = "This adapter does not say which weights it was trained on; only shapes were compared.\n"
    untied = "The embeddings were one tensor and are two now, as the adapter changes them differently.\n"
    print(
        f"Merged {adapter} into {config.model.name_or_path}: {report.changed} of {report.tensors} tensors changed, all "
        f"finite, largest change {report.largest_change:.4f}; {config.export.dtype} in {report.shards} file(s).\n"
        f"{'' if report.verified_base else unknown}{untied if report.untied else ''}Written to {report.folder}\n\n"
        "Next:\n"
        f"  python test_model.py {report.folder.as_posix()}\n"
        f"  python llama.cpp/convert_hf_to_gguf.py {report.folder.as_posix()} --outfile {name}.gguf --outtype f16"
    )


if __name__ == "__main__":
    run_script(main)
