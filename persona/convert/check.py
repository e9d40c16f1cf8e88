"""--check: the data report on files that are converted already, and whether anything is on both sides of the split."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from persona.console import safe
from persona.convert import advice, report
from persona.convert.clean import control_token, conversation_key, fold_conversation, replies_of
from persona.convert.options import Options
from persona.convert.sources import find_sources
from persona.convert.split import fingerprint
from persona.convert.statistics import measure
from persona.errors import DataError
from persona.records import Record, read_records


def describe(inputs: Sequence[str], options: Options) -> str:
    """What is in the files, in words; a DataError when they cannot be trained on together."""
    sources, _ = find_sources(inputs)
    files = {source.path: read_records(source.path) for source in sources if source.path.suffix == ".jsonl"}
    if not files:
        raise DataError(f"No .jsonl file in {', '.join(inputs)}. --check reads what this tool has written.")
    lines: list[str] = []
    for path, records in files.items():
        lines.append(_file(path, records, options))
    leaks = list(_leaks(files))
    if leaks:
        raise DataError("\n".join([*lines, *leaks, "Convert the raw files again: the split is made anew."]))
    return "\n".join([*lines, "no group, conversation or reply stands both in training and in validation"])


def _file(path: Path, records: list[Record], options: Options) -> str:
    keys = [conversation_key(fold_conversation(record.messages)) for record in records]
    kinds: dict[str, int] = {}
    for record in records:
        kind = str(record.meta.get("type", "dialogue"))
        kinds[kind] = kinds.get(kind, 0) + 1
    sample = [{"messages": list(record.messages), "meta": record.meta} for record in records]
    tokens = sum(any(control_token(m["content"]) for m in record.messages) for record in records)
    shown: dict[str, Any] = {
        "written": len(records),
        "val_ratio": 0,
        "val": 0,
        "kinds": kinds,
        "speeches": None,
        "characters": [],
        "settings_beside": True,
        "statistics": measure(sample, len(sample), options.tokenizer if options.tokenizer_is_local else None),
    }
    found = advice.warnings_of(shown, sample)
    if tokens:
        found.append(f"{tokens:,} records hold control tokens; convert the file to have them refused by name.")
    repeated = len(keys) - len(set(keys))
    listed = ", ".join(f"{name} {count:,}" for name, count in sorted(kinds.items()))
    head = f"{path}: {len(records):,} records ({listed}), {repeated:,} of them repetitions"
    return "\n".join(
        [head, *(f"  {line}" for line in report.measures(shown)), *(f"  warning: {safe(w)}" for w in found)]
    )


def _leaks(files: dict[Path, list[Record]]) -> Iterator[str]:
    """What stands on both sides: files whose name says val, dev or test against the others."""
    held = {path for path in files if any(part in path.stem.lower() for part in ("val", "dev", "test"))}
    if not held or len(held) == len(files):
        return
    seen = {side: _contents(files[path] for path in files if (path in held) == side) for side in (False, True)}
    for what in ("conversations", "groups", "replies"):
        if common := seen[False][what] & seen[True][what]:
            yield f"{len(common):,} {what} stand both in training and in validation"


def _contents(files: Iterator[list[Record]]) -> dict[str, set[Any]]:
    found: dict[str, set[Any]] = {"conversations": set(), "groups": set(), "replies": set()}
    for record in (record for records in files for record in records):
        folded = fold_conversation(record.messages)
        found["conversations"].add(conversation_key(folded))
        found["replies"] |= set(map(fingerprint, replies_of(folded)))
        if "group" in record.meta:
            found["groups"].add(str(record.meta["group"]))
    return found
