"""Merge an adapter into its 16-bit base: one standard folder for transformers, vLLM and llama.cpp.

python merge_lora_to_fp16.py
python merge_lora_to_fp16.py outputs/mine --output merged/mine
python merge_lora_to_fp16.py outputs/mine --gguf mine.gguf --llama-cpp ../llama.cpp --outtype q8_0
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from persona.console import run_script

if TYPE_CHECKING:
    from persona.config import Config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "adapter", nargs="?", help="folder of a run or an adapter (default: that of the configured run)"
    )
    parser.add_argument("--output", type=Path, help="folder to write (default: merged/NAME of the run)")
    parser.add_argument("--config", type=Path, help="settings (default: the run's own, else config/default.json)")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="change one setting")
    unchecked = "do not compare the merged model with base + adapter before it appears"
    parser.add_argument("--no-verify", action="store_true", help=unchecked)
    parser.add_argument(
        "--compare-bases",
        action="store_true",
        help="of an adapter trained in 4 bits: merge into the original weights and into those that training saw, "
        "measure both on the held-out file, and keep the better",
    )
    files = parser.add_argument_group("files for other programs (docs/export.md)")
    files.add_argument("--gguf", type=Path, metavar="OUT.gguf", help="the merged model as GGUF, with a Modelfile")
    files.add_argument("--outtype", default="f16", choices=["f16", "bf16", "q8_0"], help="its weights (default: f16)")
    files.add_argument(
        "--gguf-adapter", type=Path, metavar="OUT.gguf", help="the adapter alone as GGUF; alone nothing is merged"
    )
    files.add_argument("--llama-cpp", type=Path, metavar="DIR", help="llama.cpp's source folder, which converts them")
    files.add_argument("--character-card", type=Path, metavar="OUT.json", help="a character card V2; alone likewise")
    files.add_argument("--character", metavar="NAME", help="the name on it (default: that of the run)")
    files.add_argument("--greeting", default="", metavar="TEXT", help="its first message: TEXT or @FILE")
    files.add_argument("--examples", type=int, default=0, metavar="N", help="put N training conversations into it")
    args = parser.parse_args()
    if args.no_verify and args.compare_bases:
        parser.error("--compare-bases measures both; it cannot go with --no-verify")

    from persona.errors import UsageError
    from persona.model.adapters import adapter_folder, merged_name, run_settings

    config = run_settings(args.adapter, args.config, args.set)
    given = Path(args.adapter or config.training.output_dir)
    adapter = adapter_folder(given.expanduser())
    own_run = (adapter.resolve().parent / "config.json").is_file()
    if args.compare_bases and not (own_run and config.quantization.load_in_4bit):
        raise UsageError(f"--compare-bases: {adapter} was not trained in 4 bits, as far as its run says; leave it out.")

    from persona.model.sources import resolve_model

    base = resolve_model(config.model.name_or_path)

    from persona.export import command as export
    from persona.model.loading import trained_format
    from persona.train.run_folder import quoted

    name = merged_name(adapter)
    output = args.output or Path("merged") / name
    wanted = export.Wanted.of(args)
    fmt = trained_format(base, adapter)
    export.check_wanted(wanted, base, adapter, output, fmt, config.data.train_file)
    if args.output or args.gguf or not (args.gguf_adapter or args.character_card):
        merge_and_verify(args, config, base, adapter, output, own_run)
        print(f"\nNext:\n  python test_model.py {quoted(output)}")
        to_gguf = f"--gguf {quoted(Path(f'{name}.gguf'))} --llama-cpp llama.cpp"
        print(f"  python merge_lora_to_fp16.py {quoted(given)} {to_gguf}", flush=True)
    for said in export.write_files(wanted, output, base, adapter, fmt, config, name):
        print(said, flush=True)


def merge_and_verify(
    args: argparse.Namespace, config: "Config", base: Path, adapter: Path, output: Path, own_run: bool
) -> None:
    """Merge as the options say, and print what was done."""
    import torch

    from persona.errors import EnvironmentFault
    from persona.merge.folder import describe_merged
    from persona.merge.merge import merge
    from persona.merge.verify import prepare, trained_in
    from persona.model.adapters import merged_name, read_persona

    dtype = getattr(torch, config.export.dtype)
    check = None if args.no_verify else prepare(base, adapter, config.data if own_run else None, dtype, print)
    skipped = (
        "that the merged model says what base + adapter say was not measured (held-out loss, first choices, logits)"
    )
    if args.compare_bases and check is None:
        raise EnvironmentFault("--compare-bases: there is not enough free memory to compute the model; leave it out.")
    held = (None, (config.quantization, trained_in(adapter))) if args.compare_bases else (None,)
    title, persona, kind = merged_name(adapter), read_persona(adapter), config.export.dtype
    report = merge(base, adapter, output, dtype, round(config.export.max_shard_size_gb * 1e9), check, held,
        lambda folder: describe_merged(folder, adapter, title, persona, config.generation, kind))  # fmt: skip
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
        f"{'' if report.verified_base else unknown}{untied if report.untied else ''}Written to {report.folder}"
    )


if __name__ == "__main__":
    run_script(main)
