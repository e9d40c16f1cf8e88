"""The input files behind the names on the command line, in sorted order, and what a folder holds besides them."""

import glob
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from persona.console import excerpt
from persona.convert.draft import printable
from persona.errors import DataError, UsageError

_REPORTS = ("report.json", "rejected.jsonl", "report.html", "dataset_stats.json")
_INDEXES = ("目录", "合集", "目錄")


@dataclass(frozen=True)
class Source:
    """A file, and the name that stands for it in records: unique, without its folders."""

    path: Path
    name: str
    label: str
    from_folder: bool


def find_sources(inputs: Iterable[str]) -> tuple[list[Source], list[str]]:
    """The files to convert, each once, and the lines that say which files of a folder are left out."""
    found: dict[Path, tuple[Path, bool]] = {}
    skipped: list[str] = []
    for given in inputs:
        for path in _expand(given):
            if path.is_dir():
                for inner in _walk(path):
                    if why := _left_out(inner):
                        skipped.append(f"{inner}: {why}")
                    else:
                        found.setdefault(inner.resolve(), (inner, True))
            elif path.is_file():
                found.setdefault(path.resolve(), (path, False))
            else:  # /dev/zero would never end, a pipe never begin
                raise UsageError(f"{path} is neither a file nor a folder. Give text or JSON files.")
    if not found:
        raise DataError(f"No input files in {', '.join(inputs)}." + "".join(f"\n  skipped {line}" for line in skipped))
    return list(_label(found.values())), skipped


def _expand(given: str) -> list[Path]:
    path = Path(given)
    try:
        path = path.expanduser()
        path.lstat()
    except FileNotFoundError:
        pass
    except (OSError, ValueError, RuntimeError) as error:
        raise UsageError(f"{excerpt(given)} cannot be opened: {error}. Check the name and its permissions.") from None
    else:
        return [path]
    matches = sorted(glob.glob(str(path)))  # shells on Windows leave patterns to the program
    if not matches:
        raise UsageError(f"{given} does not exist. Check the name; the command runs in {Path.cwd()}.")
    return [Path(match) for match in matches]


def _walk(folder: Path) -> list[Path]:
    files = [Path(parent, name) for parent, _, names in os.walk(folder) for name in names]
    return sorted(files, key=lambda path: path.relative_to(folder).parts)


def _left_out(path: Path) -> str | None:
    if path.name in _REPORTS:
        return "written by an earlier conversion"
    if path.name.startswith("."):
        return "hidden"
    if path.stem.casefold() == "readme":
        return "a description"
    if path.stem in _INDEXES:
        return "an index"
    if path.name == "meta.json":
        return "says something about the article beside it"
    return None if path.is_file() else "not a regular file"


def _label(found: Iterable[tuple[Path, bool]]) -> Iterable[Source]:
    seen: Counter[str] = Counter()
    for path, from_folder in found:
        name = printable(path.name)
        seen[name] += 1
        label = name if seen[name] == 1 else f"{name}~{seen[name]}"
        yield Source(path, name, label, from_folder)
