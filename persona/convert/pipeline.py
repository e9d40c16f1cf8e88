"""The way from files to records: parse, normalise, clean, drop duplicates, split by group, order by the seed.

The order of the output depends on the seed and each conversation alone: converting the output again changes nothing.
Records go through one at a time; what memory holds grows by some thirty bytes a record.
"""

import json
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from persona.console import excerpt, table
from persona.convert.draft import Rejection
from persona.convert.formats.format import Intake
from persona.convert.formats.recognise import TEXT_FORMATS
from persona.convert.formats.scenes import fold_name
from persona.convert.inputs import Foreign, Source
from persona.convert.ledger import (
    LORE,
    PAGE,
    REJECTED,
    REPORT,
    TRAIN,
    VALIDATION,
    Account,
)
from persona.convert.options import Options
from persona.convert.output import Staged, explain_disk
from persona.convert.reading import Opened, open_source, read_together
from persona.convert.report import warnings_of
from persona.convert.report_page import page
from persona.convert.statistics import measure
from persona.errors import DataError, UsageError
from persona.records import SHOWN_FAULTS, Record

# --- speakers ---------------------------------------------------------------------------------------------------------
# Whose lines are learned: the names on the command line held against the speakers of the files.


_SHOWN = 20


def with_character(named: Iterable[str | None], options: Options) -> Options:
    """The options with the character that all files with speakers name themselves, where the person named none."""
    names = set(named)
    if options.characters or len(names) != 1 or None in names:
        return options
    return replace(options, characters=(str(names.pop()),))


def check_characters(speakers: Counter[str], files: Collection[str], characters: Collection[str]) -> None:
    """A UsageError with the speakers found unless every name in `characters` is one, where there are speakers."""
    if not speakers:
        return
    spellings: dict[str, str] = {}
    counts: Counter[str] = Counter()
    for name, count in speakers.items():
        spellings.setdefault(fold_name(name), name)
        counts[fold_name(name)] += count
    unknown = [name for name in characters if fold_name(name) not in counts]
    if characters and not unknown:
        return
    top = counts.most_common(_SHOWN)
    listed = table((excerpt(spellings[name], 40), f"{count:,}") for name, count in top)
    more = f"\n  and {len(counts) - len(top):,} more" if len(counts) > len(top) else ""
    if unknown:
        close = _close(fold_name(unknown[0]), list(counts))
        say = f'No lines of "{excerpt(unknown[0], 40)}".'
        say += f" Did you mean {' or '.join(_flag(spellings[name]) for name in close)}?" if close else ""
        raise UsageError(f"{say}\nSpeakers found (lines):\n{listed}{more}")
    names = ", ".join(sorted(files))
    head = (
        f"{excerpt(names)}: several people speak; --character must say whose lines are learned. Speakers found (lines):"
    )
    raise UsageError(f"{head}\n{listed}{more}\nAdd for example: {_flag(spellings[top[0][0]])}")


def _close(name: str, known: list[str]) -> list[str]:
    containing = [other for other in known if name in other or other in name]
    return list(dict.fromkeys(get_close_matches(name, known, 3) + containing))[:3]


def _flag(name: str) -> str:
    return f'--character "{excerpt(name, 40)}"'


# In the order in which they get their names: the data before the reports
OUTPUTS = (
    *(TRAIN, VALIDATION),
    *(name for one in TEXT_FORMATS for name in (*one.names.values(), one.statistics) if name),
    *(LORE, REJECTED, REPORT, PAGE),
)


@dataclass(frozen=True)
class Conversion:
    """The outcome: the first records in the order of the input, some refusals of each code, the report."""

    records: list[Record]
    shown: dict[str, list[Rejection]]
    report: dict[str, Any]
    examples: list[dict[str, Any]]


def convert_files(
    sources: Sequence[Source], options: Options, skipped: Sequence[str], staged: Staged, keep: int = 0
) -> Conversion:
    """The conversion of all sources into `staged`. One DataError names all files that cannot be read."""
    opened, faults, skipped = _survey(sources, options, list(skipped))
    options = with_character((file.character for file in opened if file.speakers), options)
    speakers = sum((file.speakers for file in opened), Counter[str]())
    check_characters(speakers, {file.source.name for file in opened if file.speakers}, options.characters)
    with explain_disk(staged.folder), ExitStack() as stack:
        folder = stack.enter_context(TemporaryDirectory(prefix=".convert-", dir=staged.folder))
        account = stack.enter_context(closing(Account(options, staged, Path(folder), keep)))
        entries: list[dict[str, Any]] = []
        tallies = {} if faults else read_together(opened, options)
        if len({file.format for file in opened}) == 1:
            for one in tallies:
                account.names |= one.names
        for file in opened:
            try:
                entries.append(_read(file, options, account))
            except DataError as fault:
                faults.append(str(fault))
        if faults:
            more = [f"... and {len(faults) - SHOWN_FAULTS} more files"] if len(faults) > SHOWN_FAULTS else []
            raise DataError("\n".join([*faults[:SHOWN_FAULTS], *more, "Nothing was written."]))
        written, sample = account.finish()
        lore_beside = (staged.folder / LORE).exists()
    report = _report(account, options, entries, skipped, written)
    report |= {"lore_beside": lore_beside}
    for one, tally in tallies.items():
        counts = {"total_samples": report["written"], "train_samples": report["train"], "val_samples": report["val"]}
        share = round(report["train"] / max(1, report["train"] + report["val"]), 4)
        report[one.name] = {**tally.to_json(), **counts, "train_ratio": share}
    tokenizer = options.tokenizer if options.tokenizer_is_local else None
    report["statistics"] = measure(sample, report["written"], tokenizer)
    report["warnings"] = warnings_of(report, sample)
    report["speakers"] = dict(speakers.most_common(50))
    if options.val_ratio and report["written"] and not report["val"]:
        count = "1 record" if report["written"] == 1 else f"{report['written']:,} records"
        found = f"{count} in one group, so none can be held out"
        raise DataError(
            f"--val-ratio {options.val_ratio:g}: {found}. Use --val-ratio 0, or give more. Nothing was written."
        )
    return Conversion(account.first, account.shown, report, sample[:5])


def _survey(
    sources: Sequence[Source], options: Options, skipped: list[str]
) -> tuple[list[Opened], list[str], list[str]]:
    """The files opened, the faults of those that cannot be, and what of folders is passed over."""
    opened: list[Opened] = []
    faults: list[str] = []
    for source in sources:
        try:
            opened.append(open_source(source, options))
        except DataError as fault:
            passed_over = source.from_folder and isinstance(fault, Foreign)
            (skipped if passed_over else faults).append(str(fault))
    if not opened and not faults:
        raise DataError("\n".join(["No file of a known format was found.", *skipped]))
    if not opened:
        raise DataError("\n".join([*faults[:SHOWN_FAULTS], "Nothing was written."]))
    return opened, faults, skipped


def _read(file: Opened, options: Options, account: Account) -> dict[str, Any]:
    """The drafts of a file settled; its entry in the report."""
    intake = Intake()
    before = account.outcome.copy()
    for number, draft in enumerate(file.drafts(options, intake), 1):
        account.settle(draft, file.source, number)
    account.speeches["total"] += intake.speeches
    account.not_used += intake.not_used
    account.repairs.update(intake.repairs)
    account.system_prompt = intake.system_prompt or account.system_prompt
    notes = list(file.notes)
    if intake.other_splits:
        others = ", ".join(f"{name} ({count:,})" for name, count in intake.other_splits.items())
        notes.append(f"not of --split {options.split}: {others}")
    reasons = " and ".join(intake.reasons)
    if not intake.formats and not options.split and account.outcome == before:
        intake.formats[file.name] = 0
    return {
        "file": file.source.name,
        "formats": dict(intake.formats),
        "why": ", ".join(part for part in (file.why, reasons) if part),
        "encoding": file.probed.label,
        "bytes": file.probed.size,
        "sha256": file.probed.digest,
        **{name: account.outcome[name] - before[name] for name in ("read", "written", "rejected", "duplicates")},
        "notes": notes,
    }


def _report(
    account: Account,
    options: Options,
    entries: list[dict[str, Any]],
    skipped: list[str],
    written: Counter[str],
) -> dict[str, Any]:
    outcome = account.outcome
    report: dict[str, Any] = {
        **{name: outcome[name] for name in ("read", "written", "rejected", "duplicates", "repaired")},
        "train": written[TRAIN],
        "val": written[VALIDATION],
        "lore": written[LORE],
        "val_ratio": options.ratio,
        "seed": options.seed,
        "characters": list(options.characters),
        "system_prompt": options.system or account.system_prompt,
        "files": entries,
        "skipped": skipped,
        "kinds": dict(sorted(account.kinds.items())),
        "lore_weight": options.lore_weight if any(kind.startswith("lore") for kind in account.kinds) else None,
        "repairs": dict(sorted((+account.repairs).items())),
        "rejected_by_code": dict(sorted(account.codes.items())),
        "unknown_roles": dict(account.roles.most_common(20)),
        "speeches": _speeches(account),
    }
    report["names"] = {"train": account.names[TRAIN], "val": account.names[VALIDATION]}
    return report


def _speeches(account: Account) -> dict[str, Any] | None:
    """Where every speech went; None without named speakers."""
    if not (total := account.speeches["total"]):
        return None
    learned, context = account.speeches["learned"], account.speeches["context"]
    assert total == learned + context + account.not_used.total(), (total, learned, context, account.not_used)
    return {"total": total, "learned": learned, "context": context, "not_used": dict(+account.not_used)}


def check_output(output: Path, sources: Sequence[Source]) -> None:
    """A UsageError if writing to `output` would destroy an input."""
    if output.exists() and not output.is_dir():
        raise UsageError(f"--output {output} is a file. Name a folder.")
    inputs = {source.path.resolve() for source in sources}
    for name in OUTPUTS:
        if (output / name).resolve() in inputs:
            raise UsageError(f"{output / name} is an input and would be overwritten. Choose another --output.")


def publish(conversion: Conversion, staged: Staged) -> list[str]:
    """The names of the files written; a val.jsonl of an earlier conversion does not stay beside new training data."""
    report = conversion.report
    with explain_disk(staged.folder):
        staged.write_line(REPORT, _readable(report))
        staged.write_line(PAGE, page(report, conversion.examples).encode("utf-8", "backslashreplace"))
        for one in TEXT_FORMATS:
            if one.statistics and one.name in report:
                staged.write_line(one.statistics, _readable(report[one.name]))
        return staged.publish(OUTPUTS, (report["names"]["val"],) if report["written"] else ())


def _readable(value: dict[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False, indent=2).encode("utf-8", "backslashreplace")
