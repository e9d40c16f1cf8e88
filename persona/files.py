"""Files: strict JSON, hashes, and folders that appear complete or not at all: written aside, flushed, renamed."""

import hashlib
import json
import math
import os
import re
import shutil
import stat
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from persona.console import excerpt
from persona.errors import UsageError

MARKER = "COMPLETE.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
AGAIN = "Copy or download it again completely."
_HALF = re.compile("[\ud800-\udfff]")
_PAUSES = (0.5, 1.5)  # seconds between the tries of a rename
JsonObject = dict[str, Any]  # an object of JSON that others write, so any key may hold anything


def read_json(path: Path, advice: str = AGAIN) -> JsonObject:
    """The JSON object in `path`; raises `UsageError` with the place and `advice` for anything else, and a key twice."""
    text = ""
    try:
        text = path.read_text(encoding="utf-8-sig")
        _FAULTS.clear()
        value = json.loads(text, object_pairs_hook=_collect, parse_int=_integer)
        _note_depth(value, text)
    except json.JSONDecodeError as error:
        line = excerpt(text.split("\n")[error.lineno - 1].strip(), 80)
        place = f"{path}:{error.lineno}:{error.colno}"
        raise UsageError(f"{place}: not valid JSON: {error.msg}, at {line!r}. {advice}") from None
    except RecursionError:
        raise UsageError(f"{path}: nested too deeply. {advice}") from None
    except (UnicodeDecodeError, OSError) as error:
        raise UsageError(f"{path} cannot be read as UTF-8 text: {error}. {advice}") from None
    if _FAULTS:
        raise UsageError(f"{path}: {_FAULTS[0]}. {advice}")
    if not isinstance(value, dict):
        raise UsageError(f"{path}: expected an object {{...}}, found {excerpt(text, 40)}. {advice}")
    return value


def check_folder(folder: Path, option: str) -> None:
    """Raise `UsageError` if `folder` cannot be made: a part of its path is a file, or a name is too long."""
    for path in (folder, *folder.parents):
        try:
            is_folder = stat.S_ISDIR(path.stat().st_mode)
        except (FileNotFoundError, NotADirectoryError):  # the file itself is further up
            continue
        except OSError as error:
            reason = f"cannot be a folder: {error.strerror}"
            raise UsageError(f"{option} {excerpt(str(folder))} {reason}. Choose another.") from None
        if is_folder:
            return
        raise UsageError(f"{option} {folder} cannot be a folder, since {path} is a file. Choose another.")


def check_file(path: Path, option: str) -> None:
    """Raise `UsageError` if `path` cannot be written as a file by `appearing_file`: its folder, its name, a folder."""
    check_folder(path.parent, option)
    if os.path.isdir(path):
        raise UsageError(f"{option} {path} is a folder. Name a file in it.")
    try:
        _staging(path).lstat()
    except FileNotFoundError:
        pass
    except OSError as error:
        raise UsageError(f"{option} {excerpt(str(path))}: {error.strerror}. Choose another.") from None


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """The empty `folder`, removed when the block ends; what a killed process left in it is removed first."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def appearing(folder: Path, marked: bool = False) -> Iterator[Path]:
    """An empty folder to write to; when the block ends well it becomes `folder`, complete or not at all (`publish`)."""
    with scratch(_staging(folder)) as staging:
        yield staging
        publish(staging, folder, marked)


@contextmanager
def appearing_file(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to; when the block ends well that file becomes `path`, flushed to the disk."""
    staging = _staging(path)
    staging.unlink(missing_ok=True)
    try:
        yield staging
        _flush(staging)
        rename(staging, path)
        _flush(path.parent)
    finally:
        staging.unlink(missing_ok=True)


def _staging(path: Path) -> Path:
    return path.with_name(f".staging-{path.name}")


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
        rename(folder, old)
    try:
        rename(staging, folder)
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
            rename(old, removed)  # first, so that half of it never has a name from which it would come back
            shutil.rmtree(removed, ignore_errors=True)
        else:
            rename(old, folder)


def rename(source: Path, target: Path) -> None:
    """Give `source` the name `target`, in place of a file of that name; on Windows try three times within two seconds.

    Windows renames nothing that is open, and virus scanners and indexers open new files for a moment.
    """
    move = source.replace if target.is_file() else source.rename  # Windows promises to replace files only
    for seconds in _PAUSES if sys.platform == "win32" else ():
        try:
            move(target)
            return
        except PermissionError:
            time.sleep(seconds)
    move(target)


def _aside(folder: Path) -> Path:
    return folder.with_name(f".old-{folder.name}")


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
    with appearing_file(path) as staging:
        staging.write_text(text, encoding="utf-8", newline="\n")


def fault_in(folder: Path) -> str | None:
    """Why `folder` is no complete checkpoint or adapter, or None when every file is as it was written."""
    try:
        files = read_json(folder / MARKER)["files"]
        entries = {name: (entry["size"], entry["sha256"]) for name, entry in files.items()}
    except (UsageError, KeyError, TypeError, AttributeError):
        return f"no readable {MARKER}"
    for name, (size, digest) in entries.items():
        path = folder / name
        if not os.path.isfile(path):
            return f"{name} is missing"
        if path.stat().st_size != size or file_sha256(path) != digest:
            return f"{name} has changed since it was written"
    return None


# --- strict json ------------------------------------------------------------------------------------------------------
# Python's own json module takes a key that is there twice, NaN and any depth without a word; these are named here.

MAX_DEPTH = 64  # deeper JSON is an attack or an accident; Python's own limit would end in a RecursionError
MAX_DIGITS = 1000  # Python refuses to read or print integers of more than 4,300 digits


def scan_json(text: str, start: int = 0) -> tuple[Any, int, str | None]:
    """The JSON value at `start`, its end, and a fault that forbids its use (a key twice, NaN, depth), or None.

    Raises json.JSONDecodeError for broken syntax.
    """
    _FAULTS.clear()
    try:
        value, end = _STRICT.raw_decode(text, start)
    except RecursionError:
        raise json.JSONDecodeError(f"Nested deeper than {MAX_DEPTH} levels", text, start) from None
    _note_depth(value, text, start, end)
    return value, end, _FAULTS[0] if _FAULTS else None


def whole_json(text: str) -> Any:
    """The one JSON value in `text`; raises json.JSONDecodeError for broken syntax, ValueError for a fault."""
    start = len(text) - len(text.lstrip())
    value, end, fault = scan_json(text, start)
    if text[end:].strip():
        raise json.JSONDecodeError("Extra data", text, end)
    if not fault and "\\u" in text and _HALF.search(json.dumps(value, ensure_ascii=False)):
        fault = "a text holds half of a character (a lone surrogate)"
    if fault:
        raise ValueError(fault)
    return value


# One decoder for all values, since building one takes as long as reading a short record. It notes faults here and goes
# on, so that the end of the value is found.
_FAULTS: list[str] = []


def _collect(pairs: list[tuple[str, Any]]) -> JsonObject:
    values = dict(pairs)
    if len(values) < len(pairs):
        (key, count), *_ = Counter(key for key, _ in pairs).most_common(1)
        _FAULTS.append(f'the key "{excerpt(key, 40)}" is there {count} times in one object')
    return values


def _constant(name: str) -> None:
    _FAULTS.append(f"{name} is not JSON")


def _real(digits: str) -> float:
    if math.isinf(value := float(digits)):
        _FAULTS.append(f"the number {excerpt(digits, 20)} is too large")
    return value


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        _FAULTS.append(f"a number has {len(digits)} digits")
        return 0
    return int(digits)


_STRICT = json.JSONDecoder(object_pairs_hook=_collect, parse_constant=_constant, parse_float=_real, parse_int=_integer)


def _note_depth(value: Any, text: str, start: int = 0, end: int | None = None) -> None:
    if text.count("[", start, end) + text.count("{", start, end) > MAX_DEPTH and _deeper_than(value, MAX_DEPTH):
        _FAULTS.append(f"it is nested deeper than {MAX_DEPTH} levels")


def _deeper_than(value: JsonObject | list[Any], limit: int) -> bool:
    inner = value.values() if isinstance(value, dict) else value
    if limit == 0:
        return bool(inner)
    return any(_deeper_than(item, limit - 1) for item in inner if isinstance(item, dict | list))
