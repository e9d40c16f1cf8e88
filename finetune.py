"""Fine-tune a language model on conversations, so that it speaks like the person in them.

    python finetune.py
    python finetune.py --dry-run --for-gpu 8GB
    python finetune.py --config config/presets/qwen2.5-1.5b-8gb.json --set data.train_file=data/mine/train.jsonl
    accelerate launch --multi_gpu --num_processes 2 finetune.py

The same command continues an interrupted run. All settings are in one JSON file; config/README.md lists them.
"""

import argparse
from pathlib import Path

from persona.console import run_script


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("config/default.json"), metavar="FILE",
                        help="JSON file of settings (default: %(default)s)")  # fmt: skip
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE",
                        help="change one setting, e.g. training.learning_rate=1e-4; may be repeated")  # fmt: skip
    parser.add_argument("--resume", choices=["auto", "never"], default="auto",
                        help="auto: continue the run in training.output_dir; never: rename it and start over "
                        "(default: %(default)s)")  # fmt: skip
    parser.add_argument("--show", type=int, metavar="N",
                        help="print N training examples as the model reads them, without training")  # fmt: skip
    parser.add_argument("--doctor", action="store_true",
                        help="check whether this machine can train, and say what to do where it cannot")  # fmt: skip
    parser.add_argument("--report", type=Path, metavar="FILE",
                        help="with --doctor: write the checks to FILE too, without your name and folders")  # fmt: skip
    parser.add_argument("--dry-run", action="store_true",
                        help="print the memory and time that the run needs, and whether it fits, without "
                        "training; of the model only the config and the tokenizer are downloaded")  # fmt: skip
    parser.add_argument("--for-gpu", metavar="GPU",
                        help="GPU for --dry-run that need not be here: its memory, such as 8GB, or a name, such "
                        "as rtx4060")  # fmt: skip
    args = parser.parse_args()
    if args.for_gpu is not None and not args.dry_run:
        parser.error("--for-gpu belongs to --dry-run: python finetune.py --dry-run --for-gpu ...")
    if args.show is not None and args.show < 1:
        parser.error(f"--show takes a number from 1 on, not {args.show}")
    alone = "--doctor" if args.doctor else "--dry-run" if args.dry_run else "--show"
    if args.resume == "never" and (args.doctor or args.dry_run or args.show is not None):
        parser.error(f"--resume never starts a run over, and {alone} trains nothing: leave one of them out")
    if args.doctor and (args.set or args.dry_run or args.show is not None):
        parser.error("--doctor looks at the machine alone: leave out --set, --show and --dry-run")
    if args.report is not None and not args.doctor:
        parser.error("--report FILE goes with --doctor")
    if args.doctor:
        from persona.train.doctor import examine

        return examine(lambda text: print(text, flush=True), args.report)

    from persona.train.devices import joined

    with joined() as devices:
        from persona.train.command import tune

        tune(args.config, args.set, args.resume == "auto", args.show, args.dry_run, args.for_gpu, devices)
    return 0


if __name__ == "__main__":
    run_script(main)
