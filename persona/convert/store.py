"""The records on their way to the disk: sorted by rank in parts that fit into memory, then written aside and renamed.

What stands in the output folder is the old conversion or the whole new one.
"""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from persona.errors import EnvironmentFault

_PARTS = 256
_BUFFERED = 16_000_000  # characters in memory before they are written to the parts


@contextmanager
def explain_disk(folder: Path) -> Iterator[None]:
    """An EnvironmentFault for what the disk refuses, in words."""
    try:
        yield
    except OSError as error:
        fix = "Choose another folder, or free space and permissions."
        raise EnvironmentFault(f"{folder} cannot be written: {error.strerror}. {fix}") from error


class Shuffle:
    """Lines put in, and given back in the order of their ranks."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._buffers: list[list[bytes]] = [[] for _ in range(_PARTS)]
        self._size = 0

    def add(self, rank: str, number: int, copy: int, line: bytes) -> None:
        """Put in a line; `rank` has 16 hexadecimal digits, `number` and `copy` settle ties."""
        self._buffers[int(rank[:2], 16)].append(b"%b%010x%04x%b" % (rank.encode(), number, copy, line))
        self._size += len(line)
        if self._size > _BUFFERED:
            self._flush()

    def _part(self, part: int) -> Path:
        return self.folder / f"part-{part:03}"

    def _flush(self) -> None:
        for part, lines in enumerate(self._buffers):
            with self._part(part).open("ab") as file:
                file.write(b"\n".join([*lines, b""]))
            lines.clear()
        self._size = 0

    def in_order(self) -> Iterator[tuple[int, int, bytes]]:
        """Number, copy and line in the order of the ranks."""
        for part, lines in enumerate(self._buffers):
            path = self._part(part)
            if path.exists():
                lines = path.read_bytes().split(b"\n")[:-1] + lines
                path.unlink()
            lines.sort()  # by rank, then in the order of the input
            for line in lines:
                yield int(line[16:26], 16), int(line[26:30], 16), line[30:]
            self._buffers[part] = []


class Staged:
    """Files written beside their final names; `publish` gives them these names, one after another at the very end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, BinaryIO] = {}
        self._made: list[Path] = []
        self._stack = ExitStack()

    def __enter__(self) -> "Staged":
        missing = [folder for folder in (self.folder, *self.folder.parents) if not folder.exists()]
        with explain_disk(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        self._made = missing
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()
        for name in self._files:
            with suppress(OSError):  # gone after publishing; where nothing can be written, nothing can be removed
                self._path(name).unlink()
        for folder in self._made:
            with suppress(OSError):  # a folder that holds something stays
                folder.rmdir()

    def _path(self, name: str) -> Path:
        return self.folder / f".{name}.{os.getpid()}.tmp"

    def open(self, name: str) -> BinaryIO:
        """The file that will be called `name`, to write to."""
        if name not in self._files:
            path = self._path(name)
            self._files[name] = self._stack.enter_context(path.open("wb", buffering=1 << 20))
        return self._files[name]

    def write_line(self, name: str, line: bytes) -> None:
        """Append a line to the file that will be called `name`."""
        file = self._files.get(name) or self.open(name)
        file.write(line)
        file.write(b"\n")

    def publish(self, order: tuple[str, ...], stale: tuple[str, ...]) -> list[str]:
        """Flush all files to the disk and name them in `order`; remove those of `stale` that were not written."""
        names = sorted(self._files, key=order.index)
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
            file.close()
        for name in names:
            os.replace(self._path(name), self.folder / name)
        for name in stale:
            if name not in self._files:
                (self.folder / name).unlink(missing_ok=True)
        return names
