"""Windows' rules for files, on Linux: a file that is open or mapped cannot be renamed, replaced or deleted.

    with WindowsRules(folder) as rules:
        finetune(...)
    assert not rules.broken

Python opens files without FILE_SHARE_DELETE, and a mapped file cannot be deleted at all, so each of these calls would
raise PermissionError on Windows while a handle or a map is left, also one of a file inside the folder that is renamed.
The rules look into /proc before each os.rename, os.replace, os.unlink, os.remove and os.rmdir below the folder; pathlib
and shutil call these too.
"""

import os
import traceback
from pathlib import Path

CALLS = {"rename": 2, "replace": 2, "unlink": 1, "remove": 1, "rmdir": 1}  # with the number of their paths


def held(path: str) -> list[str]:
    """The files at or below `path` that this process has open or mapped, each with its way."""
    files = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            files.add(("open", os.readlink(f"/proc/self/fd/{name}")))
        except OSError:  # the handle of the listing itself
            continue
    with open("/proc/self/maps", encoding="utf-8") as maps:
        files |= {("mapped", "/" + line.rstrip("\n").partition("/")[2]) for line in maps if "/" in line}
    inside = path.rstrip("/") + "/"
    below = [(way, file) for way, file in files if (file + "/").startswith(inside)]
    return sorted(f"{os.path.relpath(file, path)} is {way}" for way, file in below if not os.path.isdir(file))


class WindowsRules:
    """The rules below one folder while the block lasts; a call that breaks them is noted and raises PermissionError."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder.resolve())
        self.broken: list[str] = []
        self.checked = 0
        self._originals = {}

    def _call(self, name, original):
        def call(*paths, **options):
            for path in paths[: CALLS[name]]:
                self._check(name, path, options.get("dir_fd"))
            return original(*paths, **options)

        return call

    def _check(self, name, path, descriptor):
        base = os.getcwd() if descriptor is None else os.readlink(f"/proc/self/fd/{descriptor}")
        full = os.path.normpath(os.path.join(base, os.fspath(path)))
        if not full.startswith(self.folder) or not os.path.lexists(full):
            return
        self.checked += 1
        if files := held(full):
            frames = [f for f in traceback.extract_stack() if "/persona/" in f.filename or "/tests/" in f.filename]
            where = " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in reversed(frames[-5:-2]))
            fault = f"{name} {os.path.relpath(full, self.folder)}: {', '.join(files[:3])}, at {where}"
            self.broken.append(fault)
            raise PermissionError(13, f"[WinError 32] {fault}", full)

    def __enter__(self) -> "WindowsRules":
        for name in CALLS:
            self._originals[name] = getattr(os, name)
            setattr(os, name, self._call(name, self._originals[name]))
        return self

    def __exit__(self, *error: object) -> None:
        for name, original in self._originals.items():
            setattr(os, name, original)
