"""The conversion in words: the account of every record and speech, the problems found, the advice, what to do next."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from persona.console import excerpt, safe, table
from persona.convert.cleaning import conversation_key, fold_conversation, replies_of
from persona.convert.draft import Rejection
from persona.convert.formats.scenes import NO_CONTEXT
from persona.convert.inputs import find_sources
from persona.convert.options import Options
from persona.convert.split import fingerprint
from persona.convert.statistics import measure
from persona.errors import DataError
from persona.records import SHOWN_FAULTS, Record, control_token, read_records

# --- advice -----------------------------------------------------------------------------------------------------------
# Advice in words: what in these records will hurt training, and what to do about it.


FEW_RECORDS = 20
SAME_PROMPT_SHARE = 0.3
SAME_PROMPT_RECORDS = 10  # below that a share says nothing
LONG = 2048  # tokens; data.max_length as it stands in config/default.json's class

_TRAITS = {
    "placeholders": "The model would say them literally: replace them; --character and --user-name fill in {{char}} "
    "and {{user}}.",
    "characters lost (U+FFFD)": "Characters were lost before. Export the text again as UTF-8.",
    "garbled": "UTF-8 was read in another encoding before: --fix-text mends what can be mended.",
    "very short replies": "They teach little: --min-chars N leaves them out.",
    "replies that copy the prompt": "They teach the model to repeat the question: delete them.",
    "names or roles left before the words": "The model would say them too: --strip-speaker removes names.",
    "replies that speak as an AI": "They will be learned as the character's own words: delete them.",
    "thinking blocks": "They will be learned as spoken words: delete them, unless that is wanted.",
    "code, HTML or encoded data": "Is that how the character speaks? Else delete it.",
    "one character over and over": "It will be learned: shorten it.",
    "media or links instead of words": "They are no speech: delete them.",
}


def about_speeches(speeches: dict[str, Any] | None) -> str | None:
    """What to do when more of the character's lines stand alone than are learned; None otherwise."""
    alone = speeches["not_used"].get(NO_CONTEXT, 0) if speeches else 0
    if speeches is None or alone <= speeches["learned"]:
        return None
    return (
        f"{alone:,} lines of the character have no line before them, so only {speeches['learned']:,} are learned: "
        "--leading-assistant keep learns them too; in a chat --max-gap MINUTES allows longer pauses."
    )


def warnings_of(report: dict[str, Any], sample: Sequence[dict[str, Any]]) -> list[str]:
    """What a person should know before training on these records."""
    if not report["written"]:
        return []
    found = []
    written, statistics = report["written"], report["statistics"]
    if written < FEW_RECORDS:
        found.append(f"Only {written} records: the model will hardly change, or learn them by heart. Add more.")
    if report["val_ratio"] and not report["val"]:
        found.append(
            "All records belong to one group, so there is no validation part. Conversations that share a scene, a "
            "title or the words of a reply are one group."
        )
    alone = about_speeches(report["speeches"])
    return found + ([alone] if alone else []) + _same_prompts(sample) + _about_persona(report) + _traits(statistics)


def _same_prompts(sample: Sequence[dict[str, Any]]) -> list[str]:
    prompts: dict[str, int] = {}
    for record in sample:
        prompt = next(message["content"] for message in record["messages"] if message["role"] == "user")
        prompts[prompt] = prompts.get(prompt, 0) + 1
    if len(sample) < SAME_PROMPT_RECORDS:
        return []
    prompt, count = max(prompts.items(), key=lambda item: item[1])
    if count <= SAME_PROMPT_SHARE * len(sample):
        return []
    shown = prompt if len(prompt) <= 40 else prompt[:39] + "…"
    return [
        f"{count:,} of {len(sample):,} records begin with the same prompt ({shown!r}). A model that is asked one thing "
        "only learns to answer beside the question: add what was said before each reply (--context-turns where the "
        "file has other speakers), and lore."
    ]


def _about_persona(report: dict[str, Any]) -> list[str]:
    """What a character needs besides its lines."""
    found = []
    kinds, statistics = report["kinds"], report["statistics"]
    spoken = report["speeches"] is not None or report["characters"]
    if (
        spoken
        and not report["lore_beside"]
        and not any(kind.startswith("lore") for kind in kinds)
        and report["written"] >= FEW_RECORDS
    ):
        found.append(
            "There is no lore (questions and answers about the character's life and world), so facts will be "
            "invented: a lore.jsonl beside the lines helps more than many more lines."
        )
    lengths = statistics["record_tokens"]
    if lengths and lengths["longest"] > LONG:
        long = sum(count for bound, count in lengths["histogram"] if bound is None or bound > LONG)
        found.append(
            f"{long:,} of {statistics['measured']:,} records are longer than {LONG} tokens "
            f"({statistics['tokens_by']}): raise data.max_length, or earlier turns are not seen and replies that are "
            "too long are left out."
        )
    shares = statistics["languages"]
    if len(shares) > 1 and 0.02 < min(shares.values()) / statistics["measured"] < 0.1:
        odd = min(shares, key=lambda name: shares[name])
        found.append(f"{shares[odd]:,} of {statistics['measured']:,} records answer in another language ({odd}).")
    return found


def _traits(statistics: dict[str, Any]) -> list[str]:
    found = []
    for name, count in statistics["traits"].items():
        if name in _TRAITS:
            shown = f" ({', '.join(statistics['placeholders'])})" if name == "placeholders" else ""
            found.append(f"{count:,} of {statistics['measured']:,} records hold {name}{shown}. {_TRAITS[name]}")
    if statistics["personal_data"]:
        listed = ", ".join(f"{kind} {count:,}" for kind, count in statistics["personal_data"].items())
        found.append(f"Personal data was found ({listed}); the model may say it again: --redact masks it.")
    if statistics["near_duplicates"]:
        found.append(
            f"Records that differ from another one only in case or punctuation: {statistics['near_duplicates']:,}; "
            "they are kept and learned twice."
        )
    if statistics["repeated_ids"]:
        found.append(f"{statistics['repeated_ids']:,} records have an id that another one has too; both are kept.")
    return found


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
    if report["lore"]:
        parts += f", lore {report['lore']:,}"
    lines = [f"records: read {report['read']:,} = {outcome} ({parts})"]
    if len(report["kinds"]) > 1:
        kinds = ", ".join(f"{name} {count:,}" for name, count in report["kinds"].items())
        lines.append(f"kinds: {kinds}")
    if report["lore_weight"] and not report["lore"]:
        lines.append(f"each lore record is {report['lore_weight']:g} times in the training part (--lore-weight)")
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
        "data.lore_file": (output / "lore.jsonl").as_posix() if report["lore"] else "null",
        "data.system_prompt": "null",
        "training.output_dir": f"outputs/{output.resolve().name}",
    }
    if report["lore"] and report["lore_weight"]:
        settings["data.lore_weight"] = f"{report['lore_weight']:g}"
    return " ".join(["python finetune.py", *(_setting(name, value) for name, value in settings.items())])


def _setting(name: str, value: str) -> str:
    text = f"{name}={value}"
    return f'--set "{text}"' if " " in text else f"--set {text}"


# --- check ------------------------------------------------------------------------------------------------------------
# --check: the data report on files that are converted already, and whether anything is on both sides of the split.


def describe_check(inputs: Sequence[str], options: Options) -> str:
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
        "lore_beside": True,
        "statistics": measure(sample, len(sample), options.tokenizer if options.tokenizer_is_local else None),
    }
    found = warnings_of(shown, sample)
    if tokens:
        found.append(f"{tokens:,} records hold control tokens; convert the file to have them refused by name.")
    repeated = len(keys) - len(set(keys))
    listed = ", ".join(f"{name} {count:,}" for name, count in sorted(kinds.items()))
    head = f"{path}: {len(records):,} records ({listed}), {repeated:,} of them repetitions"
    return "\n".join([head, *(f"  {line}" for line in measures(shown)), *(f"  warning: {safe(w)}" for w in found)])


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
