"""Folders that appear complete or not at all: written aside, flushed to the disk, renamed."""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from persona.folders import file_sha256

MARKER = "COMPLETE.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"


def publish(staging: Path, folder: Path, marked: bool = False) -> None:
    """Flush `staging` to the disk and give it its final name, replacing an earlier folder of that name.

    With `marked`, COMPLETE.json with every file's size and SHA-256 is written last, for `fault_in` to check.
    """
    files = sorted(path for path in staging.rglob("*") if path.is_file())
    for path in files:
        _flush(path)
    if marked:
        entries = {
            p.relative_to(staging).as_posix(): {"size": p.stat().st_size, "sha256": file_sha256(p)} for p in files
        }
        write_json(staging / MARKER, {"files": entries})
        _flush(staging / MARKER)
    recover(folder)
    old = _aside(folder)
    if folder.exists():
        folder.rename(old)
    try:
        staging.rename(folder)
    except OSError:  # on Windows another program may hold a file open
        recover(folder)
        raise
    _flush(folder.parent)
    recover(folder)


def recover(folder: Path) -> None:
    """Undo or finish a `publish` that was killed: the earlier `folder` comes back if the new one had not its name yet.

    No system lets one folder take the place of another in one step everywhere, so for an instant there is none; whoever
    looks for `folder` where a `publish` may have been killed calls this first.
    """
    old, removed = _aside(folder), folder.with_name(f".removed-{folder.name}")
    shutil.rmtree(removed, ignore_errors=True)
    if os.path.isdir(old):
        if os.path.isdir(folder):
            old.rename(removed)  # first, so that half of it never has a name from which it would come back
            shutil.rmtree(removed, ignore_errors=True)
        else:
            old.rename(folder)


def _aside(folder: Path) -> Path:
    return folder.with_name(f".old-{folder.name}")


def publish_file(staging: Path, path: Path) -> None:
    """Flush the file `staging` to the disk and give it its final name, replacing an earlier file of that name."""
    _flush(staging)
    staging.replace(path)
    _flush(path.parent)


def _flush(path: Path) -> None:
    if path.is_dir() and sys.platform == "win32":
        return  # Windows has no handle on a folder that could be flushed
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as readable UTF-8 JSON, whole or not at all."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8 with Unix line ends, whole or not at all."""
    staging = path.with_name(f".{path.name}.staging")
    staging.write_text(text, encoding="utf-8", newline="\n")
    publish_file(staging, path)


def fault_in(folder: Path) -> str | None:
    """Why `folder` is no complete checkpoint or adapter, or None when every file is as it was written."""
    try:
        entries = json.loads((folder / MARKER).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError):
        return f"no readable {MARKER}"
    for name, entry in entries.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry["size"] or file_sha256(path) != entry["sha256"]:
            return f"{name} has changed since it was written"
    return None
