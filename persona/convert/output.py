"""The records on their way to the disk: sorted by rank in parts that fit into memory, then written aside and renamed.

The output folder holds the old conversion or the whole new one.
"""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from persona.errors import EnvironmentFault
from persona.files import rename

_RANKS = 4  # values of a first byte that share a part: 64 files, a number that every system allows to be open
_BUFFERED = 1 << 16


@contextmanager
def explain_disk(folder: Path) -> Iterator[None]:
    """An EnvironmentFault for what the disk refuses in `folder`, in words; other paths are not its business."""
    try:
        yield
    except OSError as error:
        ours, path = os.path.abspath(folder), os.path.abspath(str(error.filename or folder))
        if os.path.commonpath([ours, path]) not in (ours, path):
            raise
        fix = "Choose another folder, or free space and permissions."
        raise EnvironmentFault(f"{folder} cannot be written: {error.strerror}. {fix}") from error


class Shuffle:
    """Lines put in, and given back in the order of their ranks; at most one part of them is in memory."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._parts: dict[int, BinaryIO] = {}

    def add(self, rank: str, number: int, copy: int, line: bytes) -> None:
        """Put in a line; `rank` has 16 hexadecimal digits, `number` and `copy` settle ties."""
        part = int(rank[:2], 16) // _RANKS
        if part not in self._parts:
            self._parts[part] = self._path(part).open("wb", buffering=_BUFFERED)
        self._parts[part].writelines((b"%b%010x%04x" % (rank.encode(), number, copy), line, b"\n"))

    def _path(self, part: int) -> Path:
        return self._folder / f"part-{part:02}"

    def close(self) -> None:
        """Close the files, which cannot be deleted on Windows before."""
        for file in self._parts.values():
            file.close()

    def in_order(self) -> Iterator[tuple[int, int, bytes]]:
        """Number, copy and line in the order of the ranks."""
        for part, file in sorted(self._parts.items()):
            file.close()
            lines = self._path(part).read_bytes().split(b"\n")
            self._path(part).unlink()
            lines.pop()
            lines.sort()  # by rank, then in the order of the input
            for line in lines:
                yield int(line[16:26], 16), int(line[26:30], 16), line[30:]


class Staged:
    """Files written beside their final names; `publish` gives them these names, one after another at the very end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, BinaryIO] = {}
        self._new: list[Path] = []  # folders
        self._stack = ExitStack()

    def __enter__(self) -> "Staged":
        self._new = [folder for folder in (self.folder, *self.folder.parents) if not folder.exists()]
        with explain_disk(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()
        for name in self._files:
            with suppress(OSError):  # gone after publishing; on a full disk it may stay
                self._path(name).unlink()
        for folder in self._new:
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
        self.open(name).writelines((line, b"\n"))

    def publish(self, order: tuple[str, ...], stale: tuple[str, ...]) -> list[str]:
        """Flush all files to the disk and name them in `order`; remove those of `stale` that were not written."""
        names = sorted(self._files, key=order.index)
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
            file.close()
        for name in names:
            rename(self._path(name), self.folder / name)
        for name in stale:
            if name not in self._files:
                (self.folder / name).unlink(missing_ok=True)
        return names
