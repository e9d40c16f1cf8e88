"""Fine-tune a language model on conversations, so that it speaks like the person in them.

    python finetune.py
    python finetune.py --config config/presets/qwen2.5-1.5b-8gb.json --set data.train_file=data/mine/train.jsonl
    accelerate launch --multi_gpu --num_processes 2 finetune.py

The same command continues an interrupted run. Every setting lies in the JSON file; see config/README.md.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from persona.console import colour_wanted, run_script

if TYPE_CHECKING:
    from persona.train.devices import Devices


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("config/default.json"), help="settings (%(default)s)")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="change one setting")
    parser.add_argument("--resume", choices=["auto", "never"], default="auto",
                        help="auto continues an interrupted run; never sets it aside and starts over")  # fmt: skip
    parser.add_argument("--show", type=int, metavar="N", help="print N examples as the model sees them, and stop")
    args = parser.parse_args()
    if args.show is not None and args.show < 1:
        parser.error(f"--show takes a number from 1 on, not {args.show}")

    from persona.train.devices import joined

    with joined() as devices:
        tune(args, devices)


def tune(args: argparse.Namespace, devices: "Devices") -> None:
    from persona.config import load_config

    config = load_config(args.config, args.set)

    from datetime import date

    from persona.model.dataset import read_data
    from persona.model.sources import resolve_model

    read_data(config.data, config.seed)  # mistakes in the data come before a download
    # before transformers is imported: a local model switches the hub off
    devices.first_on_each_machine(lambda: resolve_model(config.model.name_or_path))

    from persona.train.run import finetune, prepare, show_examples

    if args.show is not None:
        material = prepare(config, date.today())
        if devices.main:
            print(show_examples(material, args.show, colour_wanted()))
            print("".join(f"note: {note}\n" for note in material.notes), end="")
        return
    run = finetune(config, args.resume == "auto", lambda text: print(text, flush=True), devices)
    if not devices.main:
        return

    from persona.train.curves import draw
    from persona.train.history import read_history

    draw([read_history(run.parent)], run.parent / "loss.png", 0.9)


if __name__ == "__main__":
    run_script(main)
