"""Ten minutes on a real GPU: is it right, how fast is it, and how far off was the estimate of its memory?

    python benchmarks/gpu_session.py                                 measure, on the first CUDA GPU
    python benchmarks/gpu_session.py --table gpu_session.json ...    the tables of one or several such files

It writes gpu_session.json after every step, so that a session that breaks off counts too, and the tables beside it. The
file names neither you nor your computer or folders; docs/benchmarks.md says where to send it. Nothing is downloaded
but the embedded model, from your package index.
"""

import argparse
import contextlib
import importlib
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from persona.console import run_script, safe  # noqa: E402
from persona.errors import DataError, EnvironmentFault  # noqa: E402
from persona.files import write_json, write_text  # noqa: E402
from persona.train.doctor import without_private_parts  # noqa: E402

# Each step's name in the file, its module and function, and a title; what would make the rest worthless is first
STEPS = {
    "machine": ("gpu_steps", "machine", "the machine"),
    "four_bits": ("gpu_steps", "four_bits", "4 bits on the GPU and on the CPU"),
    "equivalences": ("gpu_steps", "equivalences", "trees against rows"),
    "fused_attention": ("gpu_speed", "fused_forms", "fused attention against blocks"),
    "real_steps": ("gpu_speed", "real_steps", "steps of 4B and 8B, and plain Hugging Face + PEFT"),
    "gpu_tests": ("gpu_steps", "gpu_tests", "pytest -m gpu"),
    "whole_run": ("gpu_steps", "whole_run", "a run at once, stopped and continued"),
}
LONGEST = 900  # seconds of a step, after which it is given up
DETAILS = 12  # last lines of a traceback that are kept
Session = dict[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, metavar="FILE",
                        help="JSON file of the figures (default: gpu_session.json)")  # fmt: skip
    parser.add_argument("--table", type=Path, nargs="+", metavar="FILE",
                        help="print the tables of these files, and measure nothing")  # fmt: skip
    parser.add_argument("--pretend", action="store_true",
                        help="the same steps in small on a pretended GPU, to try this script without one")  # fmt: skip
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)  # one step, in this process
    args = parser.parse_args()
    if args.table:
        print(tables([read_session(file) for file in args.table]))
        return 0
    if args.step:
        args.output.write_text(json.dumps(measure(args.step)), encoding="utf-8")
        return 0
    file = args.output or Path("gpu_session_pretended.json" if args.pretend else "gpu_session.json")
    if not args.pretend:
        require_gpu()
    with pretended(args.pretend) as run:
        session = measure_all(file, run, args.pretend)
    text, page = tables([session]), file.with_suffix(".md")
    write_text(page, text + "\n")
    advice = "" if args.pretend else " Please send the first: docs/benchmarks.md says how."
    print(f"\n{text}\n\nWritten to {file} and {page}.{advice}")
    failed = [name for name, entry in session["steps"].items() if "fault" in entry]
    print(f"{len(failed)} of {len(STEPS)} steps failed: {', '.join(failed)}." if failed else "All steps ran.")
    return 1 if failed else 0


def require_gpu() -> None:
    """Raise `EnvironmentFault` if torch finds no CUDA GPU here; takes none of the GPU's memory."""
    from persona.model.sources import prepare_libraries

    prepare_libraries(offline=True)
    import torch

    if not torch.cuda.is_available():
        raise EnvironmentFault("torch can use no CUDA GPU here; this says what is missing: python finetune.py --doctor")


# --- measuring --------------------------------------------------------------------------------------------------------


def measure_all(file: Path, run: Callable[[str], Any], is_pretended: bool) -> Session:
    """Every step by `run`, written to `file` after each; a step that fails is written down too."""
    session: Session = {"format": 1, "date": date.today().isoformat(), "pretended": is_pretended, "steps": {}}
    for number, (name, (*_, title)) in enumerate(STEPS.items(), 1):
        print(f"{number}/{len(STEPS)} {title} ...", end=" ", flush=True)
        begun = time.perf_counter()
        try:
            entry = {"figures": run(name)}
        except Exception as error:
            entry = fault_of(error)
        entry["seconds"] = time.perf_counter() - begun
        session["steps"][name] = shareable(entry)
        write_json(file, session)
        state = f"failed: {safe(entry['fault'])}" if "fault" in entry else "done"
        print(f"{state} ({entry['seconds']:.0f} s)", flush=True)
    return session


class StepFailed(RuntimeError):
    """A step ended in its process with an error; `details` are the last lines that it wrote."""

    def __init__(self, message: str, details: str) -> None:
        super().__init__(message)
        self.details = details


def fault_of(error: Exception) -> dict[str, Any]:
    """The error in one line, and the end of its traceback."""
    if isinstance(error, StepFailed):
        return {"fault": str(error), "details": error.details.splitlines()[-DETAILS:]}
    line = f"{type(error).__name__}: {(str(error).strip() or 'no reason').splitlines()[0]}"
    return {"fault": line, "details": "".join(traceback.format_exception(error)).splitlines()[-DETAILS:]}


def in_a_process(name: str) -> Any:
    """The figures of a step, measured in a process of its own: an error inside CUDA ends it, or all that follows."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        file = Path(folder) / "figures.json"
        command = command_of(name, file)
        try:
            done = subprocess.run(
                command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, encoding="utf-8", errors="replace",
                timeout=LONGEST, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise StepFailed(f"given up after {LONGEST} s", "") from None
        if done.returncode or not file.is_file():
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise StepFailed(f"exit code {done.returncode}: {last}", done.stderr)
        return json.loads(file.read_text(encoding="utf-8"))


def command_of(name: str, file: Path) -> list[str]:
    """The command that measures a step and writes its figures to `file`."""
    return [sys.executable, str(Path(__file__).resolve()), "--step", name, "--output", str(file)]


def step_of(name: str) -> Callable[..., Any]:
    """The function that measures a step."""
    module, function, _ = STEPS[name]
    return getattr(importlib.import_module(module), function)


def measure(name: str) -> Any:
    """The figures of a step on the first GPU, measured in this process."""
    require_gpu()
    import gpu_steps

    from persona.model.device import choose_device, stay_in_gpu

    size = replace(gpu_steps.FULL, used_before=gpu_steps.used_memory())  # before CUDA takes its own part
    device = choose_device("cuda")
    stay_in_gpu(device)
    return step_of(name)(size, device)


@contextlib.contextmanager
def pretended(wanted: bool) -> Iterator[Callable[[str], Any]]:
    """A function that measures a step: in a process of its own, or if `wanted` in small on a pretended GPU."""
    if not wanted:
        yield in_a_process
        return
    sys.path.insert(0, str(ROOT / "tests"))
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DEACTIVATE_ASYNC_LOAD": "1"}  # the pretence belongs to one thread
    import gpu_steps
    import torch
    from making.pretended_gpu import PretendedGpu
    from making.tiny import family, save_model

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        save_model(Path(folder) / "tiny", "qwen3", family("chatml_default"), num_hidden_layers=1)
        size = gpu_steps.small(str(Path(folder) / "tiny"))

        def run(name: str) -> Any:
            with PretendedGpu() as gpu:
                figures = step_of(name)(size, torch.device("cuda", 0))
            if gpu.mixes:
                raise RuntimeError(gpu.mixes[0])
            return figures

        yield run


def shareable(value: Any) -> Any:
    """`value` for the file: texts without private parts, numbers of six digits, and those not finite as text."""
    if isinstance(value, dict):
        return {key: shareable(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [shareable(one) for one in value]
    if isinstance(value, str):
        return without_private_parts(re.sub(r'File "[^"]*[\\/]', 'File "', value).replace(str(ROOT), "(project)"))
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else str(value)
    return value


# --- tables -----------------------------------------------------------------------------------------------------------


def read_session(file: Path) -> Session:
    """The session in `file`; raises `DataError` for any other file."""
    try:
        session = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: cannot be read ({error}). Name a file that this script has written.") from None
    if not isinstance(session, dict) or session.get("format") != 1 or not isinstance(session.get("steps"), dict):
        raise DataError(f"{file}: not a file of this script. Name one that it has written, such as gpu_session.json.")
    return session


def tables(sessions: list[Session]) -> str:
    """Two Markdown tables: the steps of each model on each GPU, and the checks on each GPU."""
    speed = [
        "| GPU | model | pack | s a step | of it queueing | tokens/s | HF + PEFT, packed | HF + PEFT, padded | "
        "peak GiB | packed | padded | estimate | error |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    checks = [
        "| GPU | system | codes of 4 bits that differ | trees against rows, gradients | scores | "
        "attention, ms: blocks, fused | `pytest -m gpu` | continued run | losses off the CPU's | replies, tokens/s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for session in sessions:
        speed += [row(gpu_name(session), *cells) for cells in speed_cells(session)]
        checks.append(row(gpu_name(session), *check_cells(session)))
    return "\n".join([*speed, "", *checks])


def row(*cells: str) -> str:
    """A line of a Markdown table."""
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def gpu_name(session: Session) -> str:
    """The GPU of a session, and whether it was none."""
    name = cell(session, "machine", lambda figures: f"{figures['gpu']}, {figures['memory_gib']:.0f} GiB")
    return f"{name} (pretended, in small)" if session.get("pretended") else name


def cell(session: Session, step: str, text_of: Callable[[Any], str]) -> str:
    """The text of a step's figures, or why there are none."""
    entry = session["steps"].get(step)
    if entry is None:
        return "not run"
    if "figures" not in entry:
        return "failed"
    if "skipped" in entry["figures"]:
        return "skipped"
    return text_of(entry["figures"])


def speed_cells(session: Session) -> list[list[str]]:
    """The cells of each model in step 5."""
    entry = session["steps"].get("real_steps")
    if entry is None or "figures" not in entry:
        return [[cell(session, "real_steps", str), *[""] * 11]]
    return [model_cells(name, figures) for name, figures in entry["figures"].items()]


def model_cells(name: str, figures: Any) -> list[str]:
    """The cells of one model: our step, plain Hugging Face + PEFT, and the estimate."""
    if reason := figures.get("skipped") or figures.get("fault"):
        return [name, "", reason, *[""] * 9]
    ours, others = figures["ours"], [figures["packed"], figures["padded"]]
    estimate = figures["estimate"]
    return [
        name,
        f"{figures['tokens_computed']:,}",
        f"{ours['seconds']:.2f}",
        f"{ours['queueing']:.2f}",
        f"{ours['tokens_a_second']:,.0f}",
        *(f"{one['tokens_a_second']:,.0f}" if "seconds" in one else one["fault"] for one in others),
        f"{ours['on_gpu_gib']:.2f}",
        *(f"{one['on_gpu_gib']:.2f}" if "seconds" in one else "" for one in others),
        f"{estimate['peak_gib']:.2f}",
        f"{estimate['error']:+.1%}",
    ]


def check_cells(session: Session) -> list[str]:
    """The cells of the other steps."""
    return [
        cell(session, "machine", lambda f: f"{f['system']}, driver {f['driver']}, torch {f['torch']}"),
        cell(session, "four_bits", lambda f: f"{sum(one['codes_that_differ'] for one in f.values())}"),
        cell(session, "equivalences", worst_gradients),
        cell(session, "equivalences", lambda f: ", ".join(sorted({s for one in f.values() for s in scores(one)}))),
        cell(session, "fused_attention", milliseconds),
        cell(session, "gpu_tests", lambda f: ", ".join(f"{n} {word}" for word, n in f.items() if word in COUNTS)),
        cell(session, "whole_run", same_bytes),
        cell(session, "whole_run", lambda f: f"{f['largest_difference_of_losses']:.2%}"),
        cell(session, "whole_run", lambda f: f"{f['replies']['tokens_a_second']:,.0f}"),
    ]


COUNTS = ("passed", "failed", "skipped", "error", "errors")


def scores(figures: Any) -> list[str]:
    """The precisions of the scores of one architecture and precision."""
    return figures["blocks"]["scores"]


def worst_gradients(figures: Any) -> str:
    """The largest difference of a gradient in each precision."""
    worst: dict[str, float] = {}
    for name, one in figures.items():
        precision = name.rpartition(" ")[2]
        worst[precision] = max(worst.get(precision, 0.0), *(one[form]["gradients"] for form in FORMS))
    return ", ".join(f"{precision} {value:.1g}" for precision, value in worst.items())


FORMS = ("blocks", "as in a run")


def milliseconds(figures: Any) -> str:
    """The time of each form of attention at each number of tokens."""
    texts = []
    for tokens in (key for key in figures if key.isdigit()):
        forms = [f"{form} {one['ms']:.1f}" if "ms" in one else f"{form} -" for form, one in figures[tokens].items()]
        texts.append(f"{int(tokens):,} tokens: {', '.join(forms)}")
    return "; ".join(texts)


def same_bytes(figures: Any) -> str:
    """Whether the run that was stopped and continued ended in the same bytes."""
    if figures["continued_byte_for_byte"]:
        return "byte for byte"
    return f"off by up to {figures['continued_difference']:.1g}"


if __name__ == "__main__":
    run_script(main)
