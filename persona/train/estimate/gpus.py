"""NVIDIA GPUs by name: memory, bandwidth and speed of products.

NVIDIA's own papers were not at hand. In November 2026 figures were compared with pages that list them: hmc-tech.com,
fpsbench.com, sysrqmts.com, cputronic.com and waredb.com for GeForce and L4, resellers' data sheets for L40S, and
huggingface.js' hardware.ts, which is TechPowerUp's list, for float32. They agree within 1 %, where a page does not
name another number of cores or another speed of memory than the rest. Not found, and so from memory: the bandwidth of
GTX 1660 Super, RTX 3070 Ti, 4070 Super, 4070 Ti Super and 5070, products of RTX 2060 to 2080 Ti, and H100's float32.

Products of 16 bits are without sparsity and with sums in float32. GeForce GPUs from RTX 30 on do these at twice the
rate of float32, half of that with sums in 16 bits (seen for RTX 4060, 4070 Laptop and 4090, taken for the others).
"""

import difflib
import re
from dataclasses import dataclass

from persona.errors import UsageError

GIB = 2**30
# Memory that Windows keeps for the desktop, also on a GPU without a screen (WDDM); 0.5 to 1 GiB is usual
WINDOWS_KEEPS = 0.8 * GIB


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU, or only a size of memory."""

    name: str
    memory: float
    """Bytes."""
    bandwidth: float = 0.0
    """Bytes a second; 0 if only the size is known."""
    low: float = 0.0
    """Floating-point operations a second in products of 16 bits."""
    single: float = 0.0
    """The same in float32."""
    capability: tuple[int, int] = (8, 0)
    """CUDA's compute capability; from 8.0 on there is bf16."""


# name: GiB, GB/s, TFLOP/s of 16-bit products, TFLOP/s of float32, compute capability
_SHEETS = {
    "GTX 1660 Super": (6, 336, 10.0, 5.0, 7.5),  # no tensor cores: float16 at twice the rate of float32
    "RTX 2060": (6, 336, 25.8, 6.5, 7.5),
    "RTX 2070": (8, 448, 29.9, 7.5, 7.5),
    "RTX 2080": (8, 448, 40.3, 10.1, 7.5),
    "RTX 2080 Ti": (11, 616, 53.8, 13.4, 7.5),
    "RTX 3050": (8, 224, 18.2, 9.1, 8.6),
    "RTX 3060": (12, 360, 25.5, 12.7, 8.6),
    "RTX 3060 Ti": (8, 448, 32.4, 16.2, 8.6),
    "RTX 3070": (8, 448, 40.6, 20.3, 8.6),
    "RTX 3070 Ti": (8, 608, 43.5, 21.7, 8.6),
    "RTX 3080": (10, 760, 59.5, 29.8, 8.6),
    "RTX 3090": (24, 936, 71.0, 35.6, 8.6),
    "RTX 4060": (8, 272, 30.2, 15.1, 8.9),
    "RTX 4060 Laptop": (8, 256, 23.2, 11.6, 8.9),
    "RTX 4060 Ti": (8, 288, 44.1, 22.1, 8.9),
    "RTX 4060 Ti 16GB": (16, 288, 44.1, 22.1, 8.9),
    "RTX 4070": (12, 504, 58.3, 29.1, 8.9),
    "RTX 4070 Super": (12, 504, 71.0, 35.5, 8.9),
    "RTX 4070 Ti": (12, 504, 80.2, 40.1, 8.9),
    "RTX 4070 Ti Super": (16, 672, 88.2, 44.1, 8.9),
    "RTX 4080": (16, 717, 97.5, 48.7, 8.9),
    "RTX 4090": (24, 1008, 165.2, 82.6, 8.9),
    "RTX 5060 Ti 16GB": (16, 448, 47.4, 23.7, 12.0),
    "RTX 5070": (12, 672, 61.7, 30.8, 12.0),
    "RTX 5070 Ti": (16, 896, 87.9, 43.9, 12.0),
    "RTX 5080": (16, 960, 112.6, 56.3, 12.0),
    "RTX 5090": (32, 1792, 209.5, 104.8, 12.0),
    "T4": (16, 320, 65.0, 8.1, 7.5),
    "A10": (24, 600, 125.0, 31.2, 8.6),
    "L4": (24, 300, 121.0, 30.3, 8.9),
    "L40S": (48, 864, 362.0, 91.6, 8.9),
    "A100": (40, 1555, 312.0, 19.5, 8.0),
    "A100 80GB": (80, 2039, 312.0, 19.5, 8.0),
    "H100": (80, 3350, 989.0, 67.0, 9.0),
}


def _gpu(name: str) -> Gpu:
    gib, bandwidth, low, single, capability = _SHEETS[name]
    major, minor = divmod(round(capability * 10), 10)
    return Gpu(name, gib * GIB, bandwidth * 1e9, low * 1e12, single * 1e12, (major, minor))


GPUS = {name: _gpu(name) for name in _SHEETS}


def find_gpu(text: str) -> Gpu:
    """The GPU that `text` names, such as `rtx4060` or `8GB`; raises `UsageError` with the known names."""
    if size := re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*gi?b?\s*", text, re.IGNORECASE):
        if not 1 <= float(size[1]) <= 1024:
            raise UsageError(f"--for-gpu {text}: no GPU has {size[1]} GB; name its memory, such as 8GB.")
        return Gpu(f"a GPU with {size[1]} GB", float(size[1]) * GIB)
    if (name := known_name(text)) is not None:
        return GPUS[name]
    short = {_letters(name): name for name in GPUS}
    close = difflib.get_close_matches(_letters(text), short, 1, 0.75)
    hint = f" Did you mean {short[close[0]]}?" if close else ""
    raise UsageError(
        f"--for-gpu {text}: this GPU is not known.{hint} Give its memory, such as --for-gpu 8GB, or one of: "
        f"{', '.join(GPUS)}."
    )


def known_name(text: str) -> str | None:
    """The name in the list of a GPU that is called `text`, by a user or by its driver; None if it is not in it."""
    letters = _letters(text)
    exact = {_letters(name): name for name in GPUS} | {_letters(name.removeprefix("RTX ")): name for name in GPUS}
    if letters in exact:
        return exact[letters]
    return exact.get(_letters(re.sub(r"\d+\s*gb", "", text, flags=re.IGNORECASE)))


def _letters(text: str) -> str:
    """`text` without the words that drivers add, spaces and signs."""
    words = re.sub(r"nvidia|geforce|tesla|\bgpu\b|pcie|sxm\d?|hbm\d", "", text.lower())
    return re.sub(r"[^a-z0-9]", "", words)
