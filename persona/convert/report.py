"""The conversion in words: the account of every record and speech, the problems found, the advice, what to do next."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from persona.console import excerpt, safe, table
from persona.convert.advice import about_speeches
from persona.convert.draft import Rejection
from persona.records import SHOWN_FAULTS, Record

SAMPLE = Path("data/tamsin")  # what config/default.json trains on
_EXAMPLES = 3  # rejections shown of each code


def describe(report: dict[str, Any], shown: Mapping[str, Sequence[Rejection]]) -> str:
    """All that is said of a conversion, but for the files written."""
    parts = [_files(report), *(f"skipped: {safe(line)}" for line in report["skipped"]), _account(report)]
    if report["speeches"]:
        parts.append(_speeches(report["speeches"]))
    parts += measures(report)
    if report["repairs"]:
        parts.append("repaired\n" + table((name, f"{count:,}") for name, count in report["repairs"].items()))
    if shown:
        parts.append(_problems(report["rejected_by_code"], shown))
    if report["unknown_roles"]:
        listed = ", ".join(f"{name} ({count:,})" for name, count in report["unknown_roles"].items())
        parts.append(f"roles that are not known: {safe(listed)}; --role-map says who they are")
    return "\n".join([*parts, *(f"warning: {safe(line)}" for line in report["warnings"])])


def _files(report: dict[str, Any]) -> str:
    lines = []
    for entry in report["files"][:SHOWN_FAULTS]:
        formats = " + ".join(f"{name} ({count:,})" for name, count in entry["formats"].items())
        encoding = "" if entry["encoding"] == "utf-8" else f" [{entry['encoding']}]"
        lines.append(f"{safe(entry['file'])}{encoding}: {formats}: {safe(entry['why'])}")
        lines += [f"  note: {safe(note)}" for note in entry["notes"]]
    if (more := len(report["files"]) - SHOWN_FAULTS) > 0:
        lines.append(f"... and {more:,} more files, all in report.json")
    return "\n".join(lines)


def _account(report: dict[str, Any]) -> str:
    outcome = " + ".join(f"{name} {report[name]:,}" for name in ("written", "rejected", "duplicates"))
    parts = f"training {report['train']:,}, validation {report['val']:,}"
    if report["settings"]:
        parts += f", settings {report['settings']:,}"
    lines = [f"records: read {report['read']:,} = {outcome} ({parts})"]
    if len(report["kinds"]) > 1:
        kinds = ", ".join(f"{name} {count:,}" for name, count in report["kinds"].items())
        lines.append(f"kinds: {kinds}")
    if report["settings_weight"] and not report["settings"]:
        lines.append(f"settings stand {report['settings_weight']:g} times in the training part (--settings-weight)")
    if articles := report.get("articles"):
        dropped = "".join(f", {name}: {count:,}" for name, count in articles["dropped"].items())
        outside = f", {articles['chunks_outside']:,} outside {'-'.join(map(str, articles['chunk_tokens']))} tokens"
        lines.append(
            f"articles: {articles['total_articles']:,} in {articles['chunks']:,} chunks{outside}"
            f" (counted by {articles['tokenizer']}){dropped}"
        )
    return "\n".join(lines)


def _speeches(speeches: dict[str, Any]) -> str:
    unused = sum(speeches["not_used"].values())
    learned, context = speeches["learned"], speeches["context"]
    head = f"speeches: {speeches['total']:,} = learned {learned:,} + context {context:,} + not used {unused:,}"
    if not unused:
        return head
    return f"{head}, of these\n" + table((reason, f"{count:,}") for reason, count in speeches["not_used"].items())


def measures(report: dict[str, Any]) -> list[str]:
    """The measures of the records in two lines; report.html has them all."""
    statistics = report["statistics"]
    if not statistics["measured"]:
        return []
    records, replies = statistics["record_tokens"], statistics["reply_tokens"]
    languages = ", ".join(f"{name} {count:,}" for name, count in statistics["languages"].items())
    sampled = "" if statistics["measured"] == statistics["of"] else f" in a sample of {statistics['measured']:,}"
    return [
        f"tokens ({statistics['tokens_by']}){sampled}: records median {records['median']:,}, longest "
        f"{records['longest']:,}; replies median {replies['median']:,}, longest {replies['longest']:,}",
        f"languages of the replies: {languages}",
    ]


def _problems(by_code: dict[str, int], shown: Mapping[str, Sequence[Rejection]]) -> str:
    lines = []
    left = SHOWN_FAULTS
    for code, count in by_code.items():
        lines.append(f"rejected {code}: {count:,}")
        listed = list(shown[code])[: min(_EXAMPLES, left)]
        left -= len(listed)
        for rejection in listed:
            place = f"{rejection.file}:{rejection.line} | {rejection.path}"
            lines.append(safe(f"  {place} | {rejection.reason} | {rejection.fix}"))
        if count > len(listed):
            lines.append(f"  ... and {count - len(listed):,} more in rejected.jsonl")
    return "\n".join(lines)


def preview(records: Sequence[Record], count: int, total: int) -> str:
    """The first `count` records as a person reads a conversation."""
    parts = []
    for number, record in enumerate(records[:count], 1):
        parts.append(f"--- record {number} of {total:,}, {safe(str(record.meta['group']))}")
        for message in record.messages:
            words = safe(message["content"]).replace("\n", "\n" + " " * 11)
            parts.append(f"{message['role']:<11}{words}")
    return "\n".join(parts)


def verdict(report: dict[str, Any], max_reject: float) -> str | None:
    """Why the conversion failed, or None when it is good."""
    read, rejected = report["read"], report["rejected"]
    if not report["written"]:
        said = f"No record could be used ({read:,} read, {rejected:,} rejected), so no training file was written."
        return "\n".join(line for line in (said, about_speeches(report["speeches"])) if line)
    if rejected > max_reject * read:
        share = f"{rejected:,} of {read:,} records ({100 * rejected / read:.1f} %) were rejected"
        return (
            f"{share}, more than --max-reject {max_reject:g}. Mend what rejected.jsonl names; the others can be used."
        )
    return None


def speaks_with(report: dict[str, Any]) -> str | None:
    """The line that names the system prompt which chat will speak with, where the data has one."""
    prompt = report["system_prompt"]
    return (
        f"system prompt of chat (data.system_prompt null takes it from the data): {excerpt(prompt, 100)}"
        if prompt
        else None
    )


def next_command(report: dict[str, Any], output: Path) -> str:
    """The command that trains on what was written, with nothing of the sample's own settings in force."""
    if report["val"] and output.resolve() == SAMPLE.resolve():
        return "python finetune.py"
    settings = {
        "data.train_file": (output / report["names"]["train"]).as_posix(),
        "data.validation_file": (output / report["names"]["val"]).as_posix() if report["val"] else "null",
        "data.settings_file": (output / "settings.jsonl").as_posix() if report["settings"] else "null",
        "data.system_prompt": "null",
        "training.output_dir": f"outputs/{output.resolve().name}",
    }
    if report["settings"] and report["settings_weight"]:
        settings["data.settings_weight"] = f"{report['settings_weight']:g}"
    return " ".join(["python finetune.py", *(_setting(name, value) for name, value in settings.items())])


def _setting(name: str, value: str) -> str:
    text = f"{name}={value}"
    return f'--set "{text}"' if " " in text else f"--set {text}"
