"""finetune.py --doctor: whether this machine can train, on one screen, and what to do where it cannot.

Something may be missing on it, so that each library is imported inside the check that needs it.
"""

import getpass
import os
import platform
import re
import shutil
import struct
import sys
import tempfile
import textwrap
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from persona.console import safe
from persona.errors import EnvironmentFault

REQUIREMENTS = Path(__file__).resolve().parents[2] / "requirements.txt"
INSTALL = "python -m pip install -r requirements.txt"
OLDEST, NEWEST = (3, 11), (3, 13)  # Python, as requirements.txt says
LITTLE, MODEL = 5e9, 30e9  # bytes of disk: a small run and its merged model; an 8B model and its merged copy
NF4_ERROR = 0.15  # of normal numbers; NF4 in blocks of 64 measured 0.091 (arXiv 2305.14314 defines it)
HUB_SECONDS = 8.0
HEADS = (32, 8, 128)  # heads, groups that share keys and their size, of most models of the presets
MIRROR = "https://hf-mirror.com"


@dataclass(frozen=True)
class Check:
    """One line of the screen; a fault stops a run, a note does not. The advice is printed as it is, to be copied."""

    name: str
    state: Literal["ok", "note", "fault"]
    text: str
    advice: str = ""


def examine(report: Callable[[str], None], file: Path | None) -> int:
    """Report each check when it is done, and write them to `file`; the exit code is 0, or 4 after a fault."""
    checks: list[Check] = []
    for check in checked():
        checks.append(check)
        report(_shown(check, min(shutil.get_terminal_size().columns, 120)))
    faults = sum(check.state == "fault" for check in checks)
    verdict = f"{faults} of {len(checks)} checks failed: mend them before a run." if faults else "Ready to train."
    report(f"\n{verdict}")
    if file is not None:
        text = "\n".join([date.today().isoformat(), *(_shown(check, 120) for check in checks), verdict, ""])
        try:
            file.write_text(without_private_parts(text), encoding="utf-8", newline="\n")
        except OSError as error:
            raise EnvironmentFault(f"{file} cannot be written: {error.strerror}. Name another file.") from None
        report(f"Written to {safe(str(file))} without your folders and your name, to be sent with a bug report.")
    return EnvironmentFault.exit_code if faults else 0


def _shown(check: Check, width: int) -> str:
    head = f"{check.state:<7}{check.name:<13}"
    lines = textwrap.wrap(safe(check.text), max(30, width - len(head)), break_on_hyphens=False)
    lines += [f"-> {safe(line)}" for line in check.advice.splitlines()]
    return head + f"\n{' ' * len(head)}".join(lines)


def without_private_parts(text: str) -> str:
    """`text` with the working folder, the home folder, the user and the computer under other names."""
    private = {str(Path.cwd()): "(project)", str(Path.home()): "~", platform.node(): "(computer)"}
    with suppress(KeyError, OSError):  # a user without a name, as in some containers
        private[getpass.getuser()] = "(user)"
    for name, other in private.items():
        if len(name) > 1:
            text = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", lambda _, other=other: other, text, flags=re.IGNORECASE)
    return text


def checked() -> Iterator[Check]:
    """Every check of this machine, each as soon as it is done; the first two need only Python."""
    yield python()
    yield packages()
    try:
        from persona.model.sources import prepare_libraries

        prepare_libraries(offline=False)
        import torch
    except (ImportError, OSError) as error:
        windows = "\nMicrosoft Visual C++ Redistributable: https://aka.ms/vs/17/release/vc_redist.x64.exe"
        yield Check("torch", "fault", _said(error), INSTALL + (windows if sys.platform == "win32" else ""))
        return
    yield Check("torch", "ok", f"{torch.__version__}, built for {_cuda(torch)}, {torch.get_num_threads()} threads")
    for name, check in (("GPU", gpu), ("4 bits", four_bits), ("attention", attention)):
        yield _guarded(name, check)
    yield _guarded("memory", memory)
    yield disk()
    yield _guarded("fonts", fonts)
    yield _guarded("model hub", hub)


def _guarded(name: str, check: Callable[[], Check]) -> Check:
    """The check, or its error as a fault: the doctor tells what fails and goes on."""
    try:
        return check()
    except Exception as error:
        return Check(name, "fault", _said(error), INSTALL if isinstance(error, ImportError) else "")


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no reason given').splitlines()[0]}"


def _cuda(torch: Any) -> str:
    return f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU only"


def python() -> Check:
    """The version of Python and the system it runs on."""
    version, bits = sys.version_info[:2], 8 * struct.calcsize("P")
    text = f"{platform.python_version()}, {bits} bits, {platform.system()} {platform.release()}, {platform.machine()}"
    if version < OLDEST or bits != 64:
        return Check("Python", "fault", text, "install Python 3.13, 64 bits, from https://www.python.org/downloads")
    if version > NEWEST:
        return Check("Python", "note", f"{text}; tested up to {NEWEST[0]}.{NEWEST[1]}")
    return Check("Python", "ok", text)


def packages() -> Check:
    """The installed versions against the pins, without an import of any of them."""
    pins = dict(re.findall(r"^([\w.-]+)==([\w.]+)", REQUIREMENTS.read_text(encoding="utf-8"), re.MULTILINE))
    installed: dict[str, str | None] = {}
    for name in pins:
        try:
            installed[name] = metadata.version(name).partition("+")[0]  # torch's build follows the sign
        except metadata.PackageNotFoundError:
            installed[name] = None
    missing = [name for name, version in installed.items() if version is None]
    others = [f"{name} {version} (pinned {pins[name]})" for name, version in installed.items() if version != pins[name]]
    if missing:
        return Check("packages", "fault", f"not installed: {', '.join(missing)}", INSTALL)
    if others:
        return Check("packages", "note", f"other than pinned: {', '.join(others)}", INSTALL)
    return Check("packages", "ok", f"{len(pins)} as pinned in {REQUIREMENTS.name}")


def gpu() -> Check:
    """The GPU that training would use, its driver and its free memory, or why there is none."""
    import torch

    from persona.model.device import choose_device, choose_precision, nvidia_gpu, why_no_gpu

    device = choose_device("auto")
    listed = nvidia_gpu()
    if device.type == "cpu":
        if listed is None and not torch.cuda.is_available():
            precision = choose_precision("auto", device)
            text = f"no NVIDIA GPU; the CPU trains the embedded model, in {precision}, and little more"
            return Check("GPU", "note", text)
        return Check("GPU", "fault", f"not used: {why_no_gpu()}")
    free, total = (size / 2**30 for size in torch.cuda.mem_get_info())
    major, minor = torch.cuda.get_device_capability()
    text = (
        f"{torch.cuda.get_device_name()} (compute capability {major}.{minor}), "
        f"driver {listed[1] if listed else 'unknown'}, {free:.1f} of {total:.1f} GiB free, "
        f"trains in {choose_precision('auto', device)}"
    )
    if free < 0.7 * total:
        return Check("GPU", "note", text, "close programs that use the GPU: nvidia-smi lists them")
    return Check("GPU", "ok", text)


def four_bits() -> Check:
    """A product with a 4-bit weight and its gradient on the device that trains, against the same in float32."""
    import bitsandbytes
    import torch

    from persona.model.device import DTYPES, choose_device, choose_precision

    device = choose_device("auto")
    dtype = DTYPES[choose_precision("auto", device)]
    generator = torch.Generator().manual_seed(0)
    weight, rows = torch.randn(512, 256, generator=generator), torch.randn(64, 256, generator=generator)
    library: Any = bitsandbytes
    layer = library.nn.Linear4bit(256, 512, bias=False, compute_dtype=dtype, quant_type="nf4")
    layer.weight = library.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
    layer = layer.to(device)
    taken = rows.to(device, dtype).requires_grad_()
    output = layer(taken)
    (gradient,) = torch.autograd.grad(output.float().square().sum(), taken)
    held = library.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    expected = taken.detach().float() @ held.T
    errors = (
        _relative(held, weight.to(device)) / NF4_ERROR,
        _relative(output.detach().float(), expected) / 0.02,  # a number in 16 bits is off by up to 0.004
        _relative(gradient.float(), 2 * expected @ held) / 0.03,
    )
    if not max(errors) < 1:
        text = f"wrong on this {device.type}: weight, product and gradient are {', '.join(f'{e:.2g}' for e in errors)} "
        return Check("4 bits", "fault", text + "times as far off as allowed", f"{INSTALL} --force-reinstall")
    return Check("4 bits", "ok", f"bitsandbytes multiplies and differentiates on the {device.type} as float32 does")


def _relative(tensor: Any, expected: Any) -> float:
    return float((tensor - expected).norm() / expected.norm())


def attention() -> Check:
    """The form of attention over prefix trees that training takes here, as the engine itself chooses and tries it."""
    from persona.engine.attention import form_of
    from persona.engine.flash import BLOCKS
    from persona.model.device import DTYPES, choose_device, choose_precision

    device = choose_device("auto")
    if device.type == "cpu":
        return Check("attention", "ok", "in blocks, on the CPU")
    choice = form_of(device, DTYPES[choose_precision("auto", device)], *HEADS)
    if choice.form == BLOCKS:
        return Check(
            "attention", "note", f"no fused kernel: {choice.reason}; attention goes in blocks, which is slower"
        )
    return Check("attention", "ok", f"{choice.form}: {choice.reason}")


def memory() -> Check:
    """The computer's free memory."""
    import psutil

    state = psutil.virtual_memory()
    text = f"{state.available / 2**30:.1f} of {state.total / 2**30:.1f} GiB free"
    if state.available < 3 * 2**30:
        return Check("memory", "note", text, "close other programs: the embedded model takes 2.2 GiB on the CPU")
    return Check("memory", "ok", text)


def disk() -> Check:
    """Space for runs here and for models in the hub's cache, and whether this folder can be written to."""
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    spaces = {"this folder": _free(Path.cwd()), "the model cache": _free(home)}
    text = ", ".join(f"{free / 1e9:.0f} GB free for {name}" for name, free in spaces.items())
    try:
        with tempfile.TemporaryFile(dir=Path.cwd()):
            pass
    except OSError:
        return Check("disk", "fault", f"{text}; this folder cannot be written to", "copy the project to another folder")
    least = min(spaces.values())
    if least < MODEL:
        advice = "HF_HOME moves the model cache; --set training.output_dir=FOLDER moves the run"
        few = f"{text}. An 8B model and its merged copy take {MODEL / 1e9:.0f} GB"
        return Check("disk", "fault" if least < LITTLE else "note", few, advice)
    return Check("disk", "ok", text)


def _free(folder: Path) -> int:
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def fonts() -> Check:
    """Whether a font with Chinese characters is there for the curves."""
    from persona.train.curves import has_glyph

    if has_glyph("汉"):
        return Check("fonts", "ok", "Chinese titles can be drawn")
    advice = "sudo apt install fonts-noto-cjk" if sys.platform == "linux" else "install Noto Sans CJK SC"
    return Check("fonts", "note", "no Chinese font: loss.png shows Chinese names as escapes", advice)


def hub() -> Check:
    """Whether the model hub, or the mirror in HF_ENDPOINT, answers. Nothing is sent but the request itself."""
    endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    host = urlsplit(endpoint).hostname or endpoint
    if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "TRUE", "YES", "ON"):
        return Check("model hub", "note", "HF_HUB_OFFLINE is set: only local models can be used")
    try:
        request = urllib.request.Request(endpoint, method="HEAD")
        with urllib.request.urlopen(request, timeout=HUB_SECONDS):
            pass
    except urllib.error.HTTPError:
        pass  # it answers
    except (OSError, ValueError) as error:
        shell = f'$env:HF_ENDPOINT = "{MIRROR}"' if sys.platform == "win32" else f"export HF_ENDPOINT={MIRROR}"
        advice = f"{shell}\nor copy a model's folder here: --set model.name_or_path=FOLDER"
        reason = str(getattr(error, "reason", error)) or type(error).__name__
        return Check("model hub", "note", f"{host} does not answer ({reason}); only local models can be used", advice)
    return Check("model hub", "ok", f"{host} answers")
