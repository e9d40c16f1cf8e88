"""Output on the terminal: safe text, aligned tables, progress, colour, errors without tracebacks."""

import errno
import os
import re
import sys
import time
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from importlib.util import find_spec

from persona.errors import EnvironmentFault, PersonaError, UsageError

GREEN, GREY = 32, 90  # as a terminal numbers them
_BAD_PATH = (errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EEXIST)
_BAD_DISK = (errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EDQUOT)
# C0 without tab and newline, DEL, C1, and the bidirectional controls, with which a text could steer the terminal
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def safe(text: str) -> str:
    """`text` with every character that could steer a terminal made visible as an escape."""
    return _UNSAFE.sub(
        lambda match: f"\\x{ord(match[0]):02x}" if ord(match[0]) < 256 else f"\\u{ord(match[0]):04x}", text
    )


def excerpt(text: str, width: int = 80) -> str:
    """One safe line of at most `width` characters, for messages that must not print a whole conversation."""
    line = safe(" ".join(text.split()))
    return line if len(line) <= width else line[: width - 1] + "…"


def colour_wanted() -> bool:
    """Whether standard output is a terminal that shows colours (https://no-color.org)."""
    return sys.stdout.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"


def painted(text: str, colour: int, wanted: bool) -> str:
    """`text` in `colour`, GREEN or GREY, when `wanted`, otherwise as it is."""
    return f"\x1b[{colour}m{text}\x1b[0m" if wanted else text


def display_width(text: str) -> int:
    """Columns that `text` takes on a terminal; East Asian wide characters take two (Unicode TR 11)."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def table(rows: Iterable[tuple[str, str]]) -> str:
    """Two aligned columns, one line for each name and its value."""
    pairs = list(rows)
    width = max((display_width(name) for name, _ in pairs), default=0)
    return "\n".join(f"  {name}{' ' * (width - display_width(name))}  {value}" for name, value in pairs)


def columns(rows: Iterable[Sequence[str]]) -> str:
    """Aligned columns, one line a row: the first to the left, figures to the right."""
    lines = [list(row) for row in rows]
    widths = [max(map(display_width, column)) for column in zip(*lines, strict=True)]

    def line(cells: Sequence[str]) -> str:
        gaps = [" " * (width - display_width(cell)) for cell, width in zip(cells, widths, strict=True)]
        right = [gap + cell for gap, cell in zip(gaps[1:], cells[1:], strict=True)]
        return "  ".join(["  " + cells[0] + gaps[0], *right]).rstrip()

    return "\n".join(map(line, lines))


def progress(step: str) -> Callable[[int, int, float | None], None]:
    """A function that shows progress and time left: in place on a terminal, else as a line every twenty seconds."""
    shown_at = float("-inf")

    def show(done: int, total: int, seconds: float | None) -> None:
        nonlocal shown_at
        on_terminal, now, end = sys.stderr.isatty(), time.monotonic(), done >= total
        if not (end or now - shown_at >= (0.1 if on_terminal else 20)):
            return
        shown_at = now
        left = f", about {duration(seconds)} left" if seconds is not None and not end else ""
        line = f"  {step}: {done} of {total}{left}"
        print(f"\r\x1b[K{line}" if on_terminal else line, end="\n" if end or not on_terminal else "", file=sys.stderr)
        sys.stderr.flush()

    return show


def duration(seconds: float) -> str:
    """A duration in words: `48 s`, `7 min 05 s`, `2 h 10 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def run_script(main: Callable[[], int | None]) -> None:
    """Run a script's `main` and exit: with its code, after a `PersonaError` with that one's, with 130 after Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):  # Windows consoles default to a legacy code page
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="replace")  # pyright: ignore[reportAttributeAccessIssue]
    try:
        code = main() or 0
        sys.stdout.flush()
    except PersonaError as error:
        print(f"{error}", file=sys.stderr)
        code = error.exit_code
    except ModuleNotFoundError as error:
        if not error.name or find_spec(error.name.partition(".")[0]):  # a part of an installed library: a bug
            raise
        missing = f"The library {error.name} is not installed for {sys.executable}."
        print(f"{missing} Install all of them: python -m pip install -r requirements.txt", file=sys.stderr)
        code = EnvironmentFault.exit_code
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        code = 130
    except BrokenPipeError:  # `... | head` closed the pipe; the interpreter must not try to flush it again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except OSError as error:  # the system refuses a path; whoever can say more about it does so before
        if error.errno not in (*_BAD_PATH, *_BAD_DISK):
            raise
        is_path = error.errno in _BAD_PATH
        advice = "Choose another path." if is_path else "Check the permissions, and the space on the disk."
        place = f"{excerpt(str(error.filename))}: " if error.filename is not None else ""
        print(f"{place}{error.strerror}. {advice}", file=sys.stderr)
        code = (UsageError if is_path else EnvironmentFault).exit_code
    sys.exit(code)
