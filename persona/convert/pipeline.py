"""The way from files to records: parse, normalise, clean, drop duplicates, split by group, order by the seed.

The order of the output depends on the seed and each conversation alone: converting the output again changes nothing.
"""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from persona.convert.clean import conversation_key
from persona.convert.detect import Foreign
from persona.convert.draft import Draft, Rejection, reject
from persona.convert.formats import DIALOGUE
from persona.convert.opened import Opened, check_characters, open_bytes, row_drafts, script_drafts
from persona.convert.options import Options
from persona.convert.report import warnings_of
from persona.convert.sources import Source, read_bytes
from persona.errors import DataError, UsageError
from persona.records import (
    SHOWN_FAULTS,
    SURROGATE,
    Record,
    RecordFault,
    check_messages,
    rank,
    split_by_group,
    write_lines,
    write_records,
)

TRAIN, VALIDATION, REPORT, REJECTED = "train.jsonl", "val.jsonl", "report.json", "rejected.jsonl"


@dataclass(frozen=True)
class Conversion:
    """The outcome: records in the order of the input and as they will be written, what was refused, the report."""

    records: list[Record]
    train: list[Record]
    validation: list[Record]
    rejections: list[Rejection]
    report: dict[str, Any]


@dataclass
class _Account:
    """What has become of the drafts so far."""

    kept: dict[str, Record] = field(default_factory=dict)  # by the key that finds duplicates
    rejections: list[Rejection] = field(default_factory=list)
    duplicates: int = 0
    repaired: int = 0
    repairs: Counter[str] = field(default_factory=Counter)
    speeches: Counter[str] = field(default_factory=Counter)
    not_used: Counter[str] = field(default_factory=Counter)


def convert_files(sources: Sequence[Source], options: Options, skipped: Sequence[str] = ()) -> Conversion:
    """The conversion of all sources; nothing is written yet. One DataError names all files that cannot be read."""
    return convert_bytes(((source, read_bytes(source)) for source in sources), options, skipped)


def convert_bytes(files: Iterable[tuple[Source, bytes]], options: Options, skipped: Sequence[str] = ()) -> Conversion:
    """The same for contents that are in memory already."""
    opened: list[Opened] = []
    faults: list[str] = []
    skipped = list(skipped)
    for source, data in files:
        try:
            opened.append(open_bytes(source, data, options.format, options.characters))
        except DataError as fault:
            passed_over = source.from_folder and isinstance(fault, Foreign)
            (skipped if passed_over else faults).append(str(fault))
    if not opened and not faults:
        raise DataError("\n".join(["No file of a known format was found.", *skipped]))
    if faults:
        more = [f"... and {len(faults) - SHOWN_FAULTS} more files"] if len(faults) > SHOWN_FAULTS else []
        raise DataError("\n".join([*faults[:SHOWN_FAULTS], *more, "Nothing was written."]))
    check_characters(opened, options.characters)
    account = _Account()
    entries = []
    for file in opened:
        drafts, entry = _drafts(file, options, account)
        entries.append(entry)
        for number, draft in enumerate(drafts, 1):
            _settle(draft, file.source, number, options, account)
    return _conclude(account, options, entries, skipped)


def _drafts(file: Opened, options: Options, account: _Account) -> tuple[list[Draft], dict[str, Any]]:
    """The drafts of a file and its entry in the report."""
    if file.script is None:
        drafts, formats, reasons = row_drafts(file.rows, options.format)
        why = f"{file.layout}, {' and '.join(reasons)}"
    else:
        drafts, not_used, scenes = script_drafts(
            file.script, options.characters, options.context_turns, options.max_exchanges
        )
        formats, why = {DIALOGUE: len(drafts)}, f"{file.layout}, {scenes}"
        account.speeches["total"] += len(file.script.speeches)
        account.not_used += not_used
        account.repairs += file.script.repairs
    entry = {"file": file.source.name, "formats": formats, "why": why, "encoding": file.encoding, "read": len(drafts)}
    return drafts, {**entry, "notes": file.notes}


def _settle(draft: Draft, source: Source, number: int, options: Options, account: _Account) -> None:
    """The draft becomes a record, a rejection or a duplicate."""
    try:
        record = _record(draft, source, number, options)
    except RecordFault as fault:
        account.rejections.append(reject(source.name, draft, fault))
        account.not_used["in a rejected conversation"] += draft.learned + draft.context
        return
    key = conversation_key(record.messages)
    if key in account.kept:
        account.duplicates += 1
        account.not_used["in a duplicate conversation"] += draft.learned + draft.context
        return
    account.kept[key] = record
    account.repairs += draft.repairs
    account.repaired += bool(+draft.repairs)
    account.speeches["learned"] += draft.learned
    account.speeches["context"] += draft.context


def _record(draft: Draft, source: Source, number: int, options: Options) -> Record:
    if draft.fault:
        raise draft.fault
    messages = draft.messages
    if options.system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": options.system}, *messages]
    meta = {"source": source.name, "group": f"{source.label}#{draft.group or number}", "type": "dialogue"}
    if options.characters:
        meta["character"] = options.characters[0]
    missing = {key: value for key, value in meta.items() if key not in draft.meta}
    record = Record(check_messages(tuple(messages)), {**missing, **draft.meta})
    if SURROGATE.search(json.dumps(record.meta, ensure_ascii=False)):
        raise RecordFault("SURROGATE", "$.meta", "half of a character (a lone surrogate)", "export the text as UTF-8")
    return record


def _conclude(account: _Account, options: Options, entries: list[dict[str, Any]], skipped: list[str]) -> Conversion:
    records = [record for _, record in sorted(account.kept.items(), key=lambda item: rank(options.seed, item[0]))]
    train, validation = split_by_group(records, options.val_ratio, options.seed)
    read = sum(entry["read"] for entry in entries)
    assert read == len(records) + len(account.rejections) + account.duplicates
    report = {
        "read": read,
        "written": len(records),
        "rejected": len(account.rejections),
        "duplicates": account.duplicates,
        "repaired": account.repaired,
        "train": len(train),
        "val": len(validation),
        "val_ratio": options.val_ratio,
        "seed": options.seed,
        "characters": list(options.characters),
        "system_prompt": options.system,
        "files": entries,
        "skipped": skipped,
        "repairs": dict(sorted((+account.repairs).items())),
        "rejected_by_code": dict(sorted(Counter(rejection.code for rejection in account.rejections).items())),
        "speeches": _speeches(account),
        "warnings": warnings_of(records, len(validation), options.val_ratio),
    }
    return Conversion(list(account.kept.values()), train, validation, account.rejections, report)


def _speeches(account: _Account) -> dict[str, Any] | None:
    """Where every speech went; None without raw dialogue."""
    if not (total := account.speeches["total"]):
        return None
    learned, context = account.speeches["learned"], account.speeches["context"]
    assert total == learned + context + account.not_used.total()
    return {"total": total, "learned": learned, "context": context, "not_used": dict(+account.not_used)}


def check_output(output: Path, sources: Sequence[Source]) -> None:
    """A UsageError if writing to `output` would destroy an input."""
    if output.exists() and not output.is_dir():
        raise UsageError(f"--output {output} is a file. Name a folder.")
    inputs = {source.path.resolve() for source in sources}
    for name in (TRAIN, VALIDATION, REPORT, REJECTED):
        if (output / name).resolve() in inputs:
            raise UsageError(f"{output / name} is an input and would be overwritten. Choose another --output.")


def write_conversion(conversion: Conversion, output: Path) -> list[str]:
    """The names of the files written, the data before the report; an older val.jsonl without a successor is removed."""
    written = []
    if conversion.records:
        write_records(output / TRAIN, conversion.train)
        written.append(TRAIN)
        if conversion.validation:
            write_records(output / VALIDATION, conversion.validation)
            written.append(VALIDATION)
        else:
            (output / VALIDATION).unlink(missing_ok=True)
    write_lines(output / REJECTED, (rejection.to_json() for rejection in conversion.rejections))
    write_lines(output / REPORT, [json.dumps(conversion.report, ensure_ascii=False, indent=2)])
    return [*written, REJECTED, REPORT]
