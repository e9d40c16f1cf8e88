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
    args = parser.parse_args()

    from persona.artifacts import adapter_folder, merged_name, run_settings

    config = run_settings(args.adapter, args.config, args.set)
    adapter = adapter_folder(Path(args.adapter or config.training.output_dir).expanduser())

    from persona.sources import resolve_model

    base = resolve_model(config.model.name_or_path)

    import torch

    from persona.merging import merge

    name = merged_name(adapter)
    output = args.output or Path("merged") / name
    report = merge(
        base, adapter, output, getattr(torch, config.export.dtype), round(config.export.max_shard_size_gb * 1e9)
    )
    unknown = "This adapter does not say which weights it was trained on; only shapes were compared.\n"
    print(
        f"Merged {adapter} into {config.model.name_or_path}: {report.changed} of {report.tensors} tensors changed, all "
        f"finite, largest change {report.largest_change:.4f}; {config.export.dtype} in {report.shards} file(s).\n"
        f"{'' if report.verified_base else unknown}Written to {report.folder}\n\nNext:\n"
        f"  python test_model.py {report.folder.as_posix()}\n"
        f"  python llama.cpp/convert_hf_to_gguf.py {report.folder.as_posix()} --outfile {name}.gguf --outtype f16"
    )


if __name__ == "__main__":
    run_script(main)
