"""Shares of a training step in attention and norms, and its launches, for each preset on two GPUs, on paper.

    python benchmarks/on_paper.py          write the table into docs/benchmarks.md

No GPU is needed, and nothing is measured: the operations of a step are counted on tensors without numbers, and each
takes as long as its arithmetic or its memory traffic (persona/train/estimate/speed.py).
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch.utils import _python_dispatch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from persona.engine import flash  # noqa: E402
from persona.files import write_text  # noqa: E402
from persona.train.estimate.gpus import GPUS, Gpu  # noqa: E402
from persona.train.estimate.memory import Step  # noqa: E402
from persona.train.estimate.presets import full_pack, gpu_size, on_paper  # noqa: E402
from persona.train.estimate.speed import seconds, seconds_of  # noqa: E402

ON = ("RTX 4060", "RTX 4090")
LAYERS = 36  # those of Qwen3-4B and 8B, for launches that can be compared
PRESETS, PAGE = ROOT / "config" / "presets", ROOT / "docs" / "benchmarks.md"
BEGIN, END = "<!-- on paper -->\n", "<!-- /on paper -->"


@dataclass(frozen=True)
class Figures:
    """A step of a preset with a full pack."""

    preset: str
    tokens: int
    launches: int
    """Operations that are started for a pack, if the model had `LAYERS` layers."""
    seconds: tuple[float, ...]
    """On each GPU of `ON`."""
    attention: tuple[float, ...]
    """Share of the operations' time, on each GPU; 0 if it is not told apart from the others, as in `norms`."""
    norms: tuple[float, ...]


def figures(preset: Path) -> Figures:
    """The figures of the file `preset`."""
    paper, limit = on_paper(preset)
    examples = full_pack(limit)
    with _named_attention():
        step = paper.step(examples)
        paper.depth = LAYERS if paper.run[0] < paper.run[1] else paper.depth
        launches = sum(times for _, times in _kernels(paper.step(examples))) * LAYERS / paper.depth
    gpus = [GPUS[name] for name in ON]
    times, attention, norms = zip(*(_times(step, gpu) for gpu in gpus), strict=True)
    return Figures(preset.stem, step.tokens, round(launches), times, attention, norms)


def _kernels(step: Step) -> Sequence[tuple[Any, float]]:
    return [*step.forward, *step.backward]


def _times(step: Step, gpu: Gpu) -> tuple[float, float, float]:
    """Seconds of `step`, and the shares of attention and of norms."""
    spent = [(kernel.name, times * seconds_of(kernel, gpu)) for kernel, times in _kernels(step)]
    whole = sum(time for _, time in spent)
    shares = (sum(time for name, time in spent if word in name) / whole for word in ("attention", "rms_norm"))
    return seconds(_kernels(step), gpu), *shares


@contextmanager
def _named_attention() -> Iterator[None]:
    """Inside, every operation of attention over trees has it in its name, such as those that put calls together."""
    before = flash.forward, flash.backward

    def named(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            kernels = _python_dispatch._get_current_dispatch_mode().kernels
            first = len(kernels)
            result = function(*arguments)
            kernels[first:] = [replace(kernel, name=f"attention, {kernel.name}") for kernel in kernels[first:]]
            return result

        return run

    flash.forward, flash.backward = map(named, before)
    try:
        yield
    finally:
        flash.forward, flash.backward = before


def row(one: Figures) -> str:
    """The row of a preset."""
    cells = [f"`{one.preset}`", f"{one.tokens:,}", f"{one.launches:,}"]
    for column in zip(one.seconds, one.attention, one.norms, strict=True):
        cells += [f"{column[0]:.2f}", *(f"{share:.1%}" if share else "–" for share in column[1:])]
    return f"| {' | '.join(cells)} |"


def table() -> str:
    """The Markdown table of all presets, on paper."""
    columns = [f"{word} on {name.removeprefix('RTX ')}" for name in ON for word in ("seconds", "attention", "norms")]
    head = ["preset", "tokens", f"launches for {LAYERS} layers", *columns]
    order = sorted(PRESETS.glob("*.json"), key=lambda path: (gpu_size(path), path.stem))
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|", *(row(figures(path)) for path in order)]
    return "\n".join([*lines, ""])


def main() -> None:
    before, begin, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    text = table()
    write_text(PAGE, before + begin + text + end + after)
    print(text)


if __name__ == "__main__":
    main()
