"""Draw the loss curves of one run, or of several over each other, as a PNG.

    python plot_loss.py outputs/my_run
    python plot_loss.py outputs/first outputs/second --save_path comparison.png --smoothing 0.8

A run is its folder, its metrics.jsonl, or a trainer_state.json that transformers wrote.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from persona.console import run_script, safe, table
from persona.errors import UsageError

if TYPE_CHECKING:
    from persona.train.history import History


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "runs",
        nargs="*",
        type=Path,
        metavar="RUN",
        help="run folder, metrics.jsonl or trainer_state.json; at least one",
    )
    parser.add_argument(
        "--json_file",
        action="append",
        default=[],
        type=Path,
        metavar="PATH",
        help="the same as RUN, as other tools name it; may be repeated",
    )
    parser.add_argument(
        "--save_path",
        type=Path,
        metavar="FILE.png",
        help="picture to write (default: loss.png in the run's folder; for several runs loss_comparison.png here)",
    )
    parser.add_argument(
        "--smoothing",
        type=float,
        default=0.9,
        metavar="FACTOR",
        help="smoothing of the training loss as in TensorBoard, from 0 (none) to below 1; a higher FACTOR draws a "
        "smoother line (default: %(default)s)",
    )
    return parser.parse_args()


def summary(history: "History") -> str:
    rows = [("updates", str(history.updates))]
    if history.train:
        rows.append(("last train loss", f"{history.train[-1][1]:.4f}"))
    if history.best:
        step, loss = history.best
        rows.append(("best evaluation", f"{loss:.4f} at step {step}" + " (the base model)" * (step == 0)))
    else:
        rows.append(("best evaluation", "none"))
    if history.gaps:
        rows.append(("gaps", f"{history.gaps}, where a loss is NaN or infinite"))
    return f"{safe(history.name)}\n{table(rows)}"


def main() -> None:
    arguments = parse_arguments()
    paths = list({path.resolve(): path for path in arguments.runs + arguments.json_file}.values())
    if not paths:
        raise UsageError("Nothing to draw. Give a run's folder: python plot_loss.py outputs/my_run")

    from persona.train import curves
    from persona.train.history import read_history, told_apart

    histories = told_apart([read_history(path) for path in paths])
    for history in histories:
        print(summary(history))
        if (shown := curves.drawable(history.name)) != history.name:
            print(f"  the picture calls it {shown}: it is long, or no font here has its characters (Noto Sans CJK has)")

    beside = paths[0] if paths[0].is_dir() else paths[0].parent
    default = beside / "loss.png" if len(paths) == 1 else Path("loss_comparison.png")
    print(f"written to {safe(str(curves.draw(histories, arguments.save_path or default, arguments.smoothing)))}")


if __name__ == "__main__":
    run_script(main)
