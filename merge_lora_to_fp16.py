"""Merge an adapter into its 16-bit base: one standard folder for transformers, vLLM and llama.cpp.

python merge_lora_to_fp16.py
python merge_lora_to_fp16.py outputs/mine --output merged/mine
python merge_lora_to_fp16.py outputs/mine --gguf mine.gguf --llama-cpp ../llama.cpp --outtype q8_0
"""

import argparse
from pathlib import Path

from persona.console import run_script


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    run = "folder of a run, or of an adapter (default: training.output_dir of the settings)"
    parser.add_argument("adapter", nargs="?", metavar="PATH", help=run)
    output = "folder for the merged model (default: merged/NAME, with the run's name)"
    parser.add_argument("--output", type=Path, metavar="DIR", help=output)
    settings = "JSON file of settings (default: the run's own, else config/default.json)"
    parser.add_argument("--config", type=Path, metavar="FILE", help=settings)
    change = "change one setting, e.g. export.dtype=bfloat16; may be repeated"
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help=change)
    unchecked = "skip the comparison of the merged model with base + adapter, which is made before the folder appears"
    parser.add_argument("--no-verify", action="store_true", help=unchecked)
    parser.add_argument(
        "--compare-bases",
        action="store_true",
        help="for an adapter trained in 4 bits: merge into the original weights and into the dequantized 4-bit "
        "weights, and keep the one with the lower held-out loss; takes twice as long",
    )
    files = parser.add_argument_group("files for other programs (docs/export.md)")
    alone = "merges nothing unless --output or --gguf is given too"
    gguf = "write the merged model also as GGUF, with Ollama's Modelfile beside it; needs --llama-cpp"
    files.add_argument("--gguf", type=Path, metavar="OUT.gguf", help=gguf)
    outtype = "number format of the --gguf file; q8_0 is half the size (default: f16)"
    files.add_argument("--outtype", choices=["f16", "bf16", "q8_0"], help=outtype)
    files.add_argument(
        "--gguf-adapter",
        type=Path,
        metavar="OUT.gguf",
        help=f"write the adapter alone as GGUF; needs --llama-cpp; {alone}",
    )
    files.add_argument(
        "--llama-cpp", type=Path, metavar="DIR", help="folder of llama.cpp's source, whose converter writes GGUF"
    )
    files.add_argument(
        "--character-card", type=Path, metavar="OUT.json", help=f"write a character card for SillyTavern; {alone}"
    )
    files.add_argument("--character", metavar="NAME", help="character's name on the card (default: the run's name)")
    files.add_argument(
        "--greeting",
        default="",
        metavar="TEXT|@FILE",
        help="first message on the card: TEXT, or the text in FILE (default: none)",
    )
    files.add_argument(
        "--examples",
        type=count,
        default=0,
        metavar="N",
        help="number of training conversations to put on the card as examples (default: 0)",
    )
    args = parser.parse_args()
    if args.no_verify and args.compare_bases:
        parser.error("--compare-bases measures both merges; it cannot be combined with --no-verify")
    return args


def count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number from 0, found {text!r}")
    return int(text)


def main() -> None:
    args = parse_arguments()

    from persona.model.adapters import adapter_folder, merged_name, run_settings

    config = run_settings(args.adapter, args.config, args.set)
    run = Path(args.adapter or config.training.output_dir)
    adapter = adapter_folder(run.expanduser())

    from persona.model.sources import resolve_model

    base = resolve_model(config.model.name_or_path)

    from persona.export.command import Tuned, check_options, write_files
    from persona.merge.command import check_comparable, merge_and_verify
    from persona.model.loading import trained_format
    from persona.train.run_folder import quoted

    if args.compare_bases:
        check_comparable(config, adapter)
    name = merged_name(adapter)
    output = args.output or Path("merged") / name
    tuned = Tuned(name, base, adapter, output, trained_format(base, adapter), config)
    check_options(args, tuned)
    if args.output or args.gguf or not (args.gguf_adapter or args.character_card):
        for line in merge_and_verify(config, base, adapter, output, not args.no_verify, args.compare_bases):
            print(line, flush=True)
        print(f"\nNext:\n  python test_model.py {quoted(output)}")
        to_gguf = f"--gguf {quoted(Path(f'{name}.gguf'))} --llama-cpp llama.cpp"
        print(f"  python merge_lora_to_fp16.py {quoted(run)} {to_gguf}", flush=True)
    for paragraph in write_files(args, tuned):
        print(paragraph, flush=True)


if __name__ == "__main__":
    run_script(main)
