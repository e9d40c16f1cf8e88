"""The conversion in words: warnings about the whole set, the account of every record and speech, the problems found."""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from persona.console import excerpt, safe, table
from persona.convert.draft import Rejection
from persona.records import Record

SAMPLE = Path("data/tamsin")  # what config/default.json trains on
FEW_RECORDS = 20
SAME_PROMPT_SHARE = 0.3
SAME_PROMPT_RECORDS = 10  # below that a share says nothing
_PLACEHOLDER = re.compile(r"\{\{\s*\w{1,40}\s*\}\}")
_EXAMPLES = 3  # rejections shown of each code


def warnings_of(records: Sequence[Record], validation: int, val_ratio: float) -> list[str]:
    """What a person should know before training on these records."""
    if not records:
        return []
    found = []
    if len(records) < FEW_RECORDS:
        found.append(f"Only {len(records)} records: the model will hardly change, or learn them by heart. Add more.")
    if val_ratio and not validation:
        found.append("All records belong to one group, so there is no validation part.")
    prompts = Counter(record.turns[0]["content"] for record in records)
    (prompt, count), *_ = prompts.most_common(1)
    if len(records) >= SAME_PROMPT_RECORDS and count > SAME_PROMPT_SHARE * len(records):
        found.append(
            f"{count:,} of {len(records):,} records begin with the same prompt ({excerpt(prompt, 40)!r}). A model that "
            "is asked one thing only learns to answer beside the question: add what was said before each reply."
        )
    return found + _traces(records)


def _traces(records: Sequence[Record]) -> list[str]:
    """Warnings about texts that something went wrong with before they came here."""
    found = []
    placeholders: Counter[str] = Counter()
    holding = lost = 0
    for record in records:
        text = "\n".join(message["content"] for message in record.messages)
        names = set(_PLACEHOLDER.findall(text))
        placeholders.update(names)
        holding += bool(names)
        lost += "\ufffd" in text
    if holding:
        names = ", ".join(name for name, _ in sorted(placeholders.items(), key=lambda item: (-item[1], item[0]))[:5])
        found.append(
            f"{holding:,} of {len(records):,} records hold placeholders ({names}). "
            "The model would say them literally: replace them in the input first."
        )
    if lost:
        found.append(f"{lost:,} records hold U+FFFD: characters were lost before. Export the text again as UTF-8.")
    return found


def describe(report: dict[str, Any], rejections: Sequence[Rejection]) -> str:
    """All that is said of a conversion, but for the files written."""
    parts = [_files(report), *(f"skipped: {safe(line)}" for line in report["skipped"]), _account(report)]
    if report["speeches"]:
        parts.append(_speeches(report["speeches"]))
    if report["repairs"]:
        parts.append("repaired\n" + table((name, f"{count:,}") for name, count in report["repairs"].items()))
    if rejections:
        parts.append(_problems(report["rejected_by_code"], rejections))
    return "\n".join([*parts, *(f"warning: {line}" for line in report["warnings"])])


def _files(report: dict[str, Any]) -> str:
    lines = []
    for entry in report["files"]:
        formats = " + ".join(f"{name} ({count:,})" for name, count in entry["formats"].items())
        encoding = "" if entry["encoding"] == "utf-8" else f" [{entry['encoding']}]"
        lines.append(f"{safe(entry['file'])}{encoding}: {formats}: {entry['why']}")
        lines += [f"  note: {safe(note)}" for note in entry["notes"]]
    return "\n".join(lines)


def _account(report: dict[str, Any]) -> str:
    outcome = " + ".join(f"{name} {report[name]:,}" for name in ("written", "rejected", "duplicates"))
    return f"records: read {report['read']:,} = {outcome} (training {report['train']:,}, validation {report['val']:,})"


def _speeches(speeches: dict[str, Any]) -> str:
    unused = sum(speeches["not_used"].values())
    learned, context = speeches["learned"], speeches["context"]
    head = f"speeches: {speeches['total']:,} = learned {learned:,} + context {context:,} + not used {unused:,}"
    if not unused:
        return head
    return f"{head}, of these\n" + table((reason, f"{count:,}") for reason, count in speeches["not_used"].items())


def _problems(by_code: dict[str, int], rejections: Sequence[Rejection]) -> str:
    lines = []
    for code, count in by_code.items():
        lines.append(f"rejected {code}: {count:,}")
        for rejection in [one for one in rejections if one.code == code][:_EXAMPLES]:
            place = f"{rejection.file}:{rejection.line} | {rejection.path}"
            lines.append(safe(f"  {place} | {rejection.reason} | {rejection.fix}"))
        if count > _EXAMPLES:
            lines.append(f"  ... and {count - _EXAMPLES:,} more in rejected.jsonl")
    return "\n".join(lines)


def preview(records: Sequence[Record], count: int) -> str:
    """The first `count` records as a person reads a conversation."""
    parts = []
    for number, record in enumerate(records[:count], 1):
        parts.append(f"--- record {number} of {len(records):,}, {safe(str(record.meta['group']))}")
        for message in record.messages:
            words = safe(message["content"]).replace("\n", "\n" + " " * 11)
            parts.append(f"{message['role']:<11}{words}")
    return "\n".join(parts)


def verdict(report: dict[str, Any], max_reject: float) -> str | None:
    """Why the conversion failed, or None when it is good."""
    read, rejected = report["read"], report["rejected"]
    if not report["written"]:
        return f"No record could be used ({read:,} read, {rejected:,} rejected), so no training file was written."
    if rejected > max_reject * read:
        share = f"{rejected:,} of {read:,} records ({100 * rejected / read:.1f} %) were rejected"
        return (
            f"{share}, more than --max-reject {max_reject:g}. Mend what rejected.jsonl names; the others can be used."
        )
    return None


def next_command(report: dict[str, Any], output: Path) -> str:
    """The command that trains on what was written, with nothing of the sample's own settings in force."""
    if report["val"] and output.resolve() == SAMPLE.resolve():
        return "python finetune.py"
    settings = {
        "data.train_file": (output / "train.jsonl").as_posix(),
        "data.validation_file": (output / "val.jsonl").as_posix() if report["val"] else "null",
        "data.settings_file": "null",
        "data.system_prompt": "null",
        "training.output_dir": f"outputs/{output.resolve().name}",
    }
    return " ".join(["python finetune.py", *(_setting(name, value) for name, value in settings.items())])


def _setting(name: str, value: str) -> str:
    text = f"{name}={value}"
    return f'--set "{text}"' if " " in text else f"--set {text}"
