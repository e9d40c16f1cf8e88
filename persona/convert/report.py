"""The report of a conversion: report.json, report.html, and what the terminal says."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from persona.console import excerpt, safe, table
from persona.convert.cleaning import conversation_key, fold_conversation, replies_of
from persona.convert.draft import Rejection
from persona.convert.formats.format import Tally, TextFormat
from persona.convert.formats.scenes import NO_CONTEXT
from persona.convert.inputs import find_sources
from persona.convert.ledger import LORE, Counts
from persona.convert.options import Options
from persona.convert.reading import Opened
from persona.convert.split import fingerprint
from persona.convert.statistics import FEW_RECORDS, Statistics, advice, measure
from persona.errors import DataError
from persona.files import JsonObject
from persona.pages import page
from persona.records import SHOWN_FAULTS, Record, control_token, read_records

SAMPLES = {  # the data of the settings files that need no GPU
    Path("data/tamsin"): "python finetune.py",
    Path("data/moyanqiu"): "python finetune.py --config config/chinese.json",
}
_EXAMPLES = 5  # records on the page
_LONGEST = 600  # characters of an example's message


@dataclass
class Report:
    """The outcome of a conversion, and the inputs and options that led to it."""

    counts: Counts
    train: int  # lines of each file
    val: int
    lore: int
    characters: tuple[str, ...]
    system_prompt: str | None
    files: list[Opened]
    skipped: list[str]
    speakers: dict[str, int]
    names: dict[str, str]  # "train" and "val": the names of these files
    statistics: Statistics
    warnings: list[str]
    inputs: list[str]
    options: Options
    tallies: Mapping[TextFormat, Tally]

    @property
    def lore_weight(self) -> float | None:
        """How many times each lore record is learned; None without lore."""
        return self.options.lore_weight if has_lore(self.counts) else None

    def tally(self, one: TextFormat) -> JsonObject:
        """The statistics of the files of one format."""
        return self.tallies[one].to_json(self.counts.written, self.train, self.val)

    def to_json(self) -> JsonObject:
        """The content of report.json."""
        values = {name: value for name, value in vars(self).items() if name not in ("counts", "tallies")}
        return self.counts.to_json() | values | {one.name: self.tally(one) for one in self.tallies} | {
            "val_ratio": self.options.ratio,
            "lore_weight": self.lore_weight,
            "files": [file.to_json() for file in self.files],
            "statistics": asdict(self.statistics),
            "options": self.options.model_dump(mode="json"),
        }  # fmt: skip

    def to_page(self, examples: Sequence[Record]) -> str:
        """The content of report.html, with some records as examples."""
        others = ("prompts_with_several_answers", "near_duplicates", "repeated_ids", "without_system")
        counts = {name.replace("_", " "): getattr(self.statistics, name) for name in others}
        noticed = self.statistics.traits | {name: count for name, count in counts.items() if count}
        shown = examples[:_EXAMPLES]
        return page("data_report.html", report=self, noticed=noticed, examples=shown, longest=_LONGEST)


def readable(value: JsonObject) -> bytes:
    """JSON for people to read."""
    return json.dumps(value, ensure_ascii=False, indent=2).encode("utf-8", "backslashreplace")


def has_lore(counts: Counts) -> bool:
    """Whether some of the records are lore."""
    return any(kind.startswith("lore") for kind in counts.kinds)


def warnings_of(counts: Counts, held_out: int, options: Options, folder: Path) -> list[str]:
    """Advice about the conversion as a whole; `folder` may hold lore already."""
    lines = []
    if counts.written and options.ratio and not held_out:
        lines.append(
            "All records belong to one group, so there is no validation part. Conversations that share a scene, a "
            "title or the words of a reply are one group."
        )
    if counts.written and (alone := about_speeches(counts)):
        lines.append(alone)
    needs_lore = (counts.speeches or options.characters) and counts.written >= FEW_RECORDS
    if needs_lore and not has_lore(counts) and not (folder / LORE).exists():
        lines.append(
            "There is no lore (questions and answers about the character's life and world), so the model will invent "
            "facts: a lore.jsonl beside the lines helps more than many more lines."
        )
    return lines


def about_speeches(counts: Counts) -> str | None:
    """Advice if more of the character's lines have no line before them than are learned; None otherwise."""
    alone = counts.not_used[NO_CONTEXT]
    if alone <= counts.learned or not counts.speeches:
        return None
    return (
        f"{alone:,} lines of the character have no line before them, so only {counts.learned:,} are learned: "
        "--leading-assistant keep learns them too; in a chat --max-gap MINUTES allows longer pauses."
    )


def describe(report: Report, shown: Mapping[str, Sequence[Rejection]]) -> str:
    """The whole report in words; `shown` holds some rejections of each code."""
    counts = report.counts
    parts = [_files(report.files), *(f"skipped: {safe(line)}" for line in report.skipped), _outcome(report)]
    if counts.speeches:
        parts.append(_speeches(counts))
    parts += _measures(report.statistics)
    if counts.repairs:
        parts.append(f"repaired\n{_table(dict(sorted(counts.repairs.items())))}")
    parts += _rejections(counts.rejected_by_code, shown)
    if counts.unknown_roles:
        parts.append(f"unknown roles: {safe(_listed(counts.unknown_roles))}; --role-map says who they are")
    return "\n".join([*parts, *(f"warning: {safe(line)}" for line in report.warnings)])


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())


def _table(counts: Mapping[str, int]) -> str:
    return table((name, f"{count:,}") for name, count in counts.items())


def _files(files: Sequence[Opened]) -> str:
    lines = []
    for file in files[:SHOWN_FAULTS]:
        formats = " + ".join(f"{name} ({count:,})" for name, count in file.counts.formats.items())
        encoding = "" if file.probed.label == "utf-8" else f" [{file.probed.label}]"
        lines.append(f"{safe(file.source.name)}{encoding}: {formats}: {safe(file.reason)}")
        lines += [f"  note: {safe(note)}" for note in file.notes]
    if (more := len(files) - SHOWN_FAULTS) > 0:
        lines.append(f"... and {more:,} more files, all in report.json")
    return "\n".join(lines)


def _outcome(report: Report) -> str:
    counts, lore = report.counts, f", lore {report.lore:,}" if report.lore else ""
    lines = [
        f"records: read {counts.read:,} = written {counts.written:,} + rejected {counts.rejected:,} + duplicates "
        f"{counts.duplicates:,} (training {report.train:,}, validation {report.val:,}{lore})"
    ]
    if len(counts.kinds) > 1:
        lines.append(f"kinds: {_listed(dict(sorted(counts.kinds.items())))}")
    if report.lore_weight and not report.lore:
        lines.append(f"each lore record is {report.lore_weight:g} times in the training part (--lore-weight)")
    return "\n".join([*lines, *(tally.summary() for tally in report.tallies.values())])


def _speeches(counts: Counts) -> str:
    unused = counts.not_used.total()
    parts = f"learned {counts.learned:,} + context {counts.context:,} + not used {unused:,}"
    return f"speeches: {counts.speeches:,} = {parts}" + (f", of these\n{_table(+counts.not_used)}" if unused else "")


def _measures(statistics: Statistics) -> list[str]:
    records, replies = statistics.record_tokens, statistics.reply_tokens
    if records is None or replies is None:
        return []
    sampled = "" if statistics.measured == statistics.of else f" in a sample of {statistics.measured:,}"
    return [
        f"tokens ({statistics.tokens_by}){sampled}: records median {records.median:,}, longest "
        f"{records.longest:,}; replies median {replies.median:,}, longest {replies.longest:,}",
        f"languages of the replies: {_listed(statistics.languages)}",
    ]


def _rejections(by_code: Mapping[str, int], shown: Mapping[str, Sequence[Rejection]]) -> list[str]:
    lines = []
    left = SHOWN_FAULTS
    for code, count in sorted(by_code.items()):
        lines.append(f"rejected {code}: {count:,}")
        listed = shown[code][:left]
        left -= len(listed)
        for rejection in listed:
            place = f"{rejection.file}:{rejection.line} | {rejection.path}"
            lines.append(safe(f"  {place} | {rejection.reason} | {rejection.fix}"))
        if count > len(listed):
            lines.append(f"  ... and {count - len(listed):,} more in rejected.jsonl")
    return lines


def preview(records: Sequence[Record], total: int) -> str:
    """The records, of `total` ones, as a person reads a conversation."""
    parts = []
    for number, record in enumerate(records, 1):
        parts.append(f"--- record {number} of {total:,}, {safe(str(record.meta['group']))}")
        for message in record.messages:
            words = safe(message["content"]).replace("\n", "\n" + " " * 11)
            parts.append(f"{message['role']:<11}{words}")
    return "\n".join(parts)


def verdict(counts: Counts, max_reject: float) -> str | None:
    """Why the conversion failed, or None if it is good."""
    read, rejected = f"{counts.read:,}", f"{counts.rejected:,}"
    if not counts.written:
        line = f"No record could be used ({read} read, {rejected} rejected), so no training file was written."
        return "\n".join(filter(None, (line, about_speeches(counts))))
    if counts.rejected <= max_reject * counts.read:
        return None
    return (
        f"{rejected} of {read} records ({100 * counts.rejected / counts.read:.1f} %) were rejected, more than "
        f"--max-reject {max_reject:g}. Fix the lines that rejected.jsonl names; the others can be used."
    )


def next_steps(report: Report, output: Path) -> str:
    """The system prompt that chat will use, if the data has one, and the command that trains on the new files."""
    prompt = f"system prompt in chat, from the data: {excerpt(report.system_prompt)}\n" if report.system_prompt else ""
    validation = report.names["val"] if report.val else None
    weight = report.lore_weight if report.lore else None
    return f"{prompt}next:\n  {next_command(output, report.names['train'], validation, weight)}"


def next_command(output: Path, train: str, validation: str | None, lore_weight: float | None) -> str:
    """The command that trains on the files in `output`, and on nothing of the sample."""
    for sample, command in SAMPLES.items():
        if validation and output.resolve() == sample.resolve():
            return command
    settings = {
        "data.train_file": (output / train).as_posix(),
        "data.validation_file": (output / validation).as_posix() if validation else "null",
        "data.lore_file": (output / LORE).as_posix() if lore_weight else "null",
        "data.system_prompt": "null",
        "training.output_dir": f"outputs/{output.resolve().name}",
    }
    if lore_weight:
        settings["data.lore_weight"] = f"{lore_weight:g}"
    pairs = [f"{name}={value}" for name, value in settings.items()]
    return " ".join(["python finetune.py", *(f'--set "{pair}"' if " " in pair else f"--set {pair}" for pair in pairs)])


def describe_check(inputs: Sequence[str], options: Options) -> str:
    """The data report on files that are converted already; a DataError if training and validation overlap."""
    sources, _ = find_sources(inputs)
    files = {source.path: read_records(source.path) for source in sources if source.path.suffix == ".jsonl"}
    if not files:
        raise DataError(f"No .jsonl file in {', '.join(inputs)}. --check reads files that this tool has written.")
    lines = [_checked(path, records, options) for path, records in files.items()]
    if overlaps := list(_overlaps(files)):
        raise DataError("\n".join([*lines, *overlaps, "Convert the raw files again: the split is made anew."]))
    return "\n".join([*lines, "no group, conversation or reply is both in training and in validation"])


def _checked(path: Path, records: list[Record], options: Options) -> str:
    keys = {conversation_key(fold_conversation(record.messages)) for record in records}
    kinds = Counter(sorted(str(record.meta.get("type", "dialogue")) for record in records))
    statistics = measure(records, len(records), options.load_tokenizer if options.tokenizer else None)
    warnings = advice(records, statistics)
    if tokens := sum(any(control_token(m["content"]) for m in record.messages) for record in records):
        warnings.append(f"{tokens:,} records hold control tokens; convert the file to have them refused by name.")
    head = f"{path}: {len(records):,} records ({_listed(kinds)}), {len(records) - len(keys):,} of them repetitions"
    return "\n".join([head, *(f"  {s}" for s in _measures(statistics)), *(f"  warning: {safe(w)}" for w in warnings)])


def _overlaps(files: dict[Path, list[Record]]) -> Iterator[str]:
    """Sentences about what training and validation share; files whose name says val, dev or test are validation."""
    held = {path for path in files if any(part in path.stem.lower() for part in ("val", "dev", "test"))}
    if not held or len(held) == len(files):
        return
    train, validation = (
        _contents(record for path in files if (path in held) == side for record in files[path])
        for side in (False, True)
    )
    for kind in train:
        if common := train[kind] & validation[kind]:
            yield f"{len(common):,} {kind} are both in training and in validation"


def _contents(records: Iterable[Record]) -> dict[str, set[str | int]]:
    contents: dict[str, set[str | int]] = {"conversations": set(), "groups": set(), "replies": set()}
    for record in records:
        folded = fold_conversation(record.messages)
        contents["conversations"].add(conversation_key(folded))
        contents["replies"] |= set(map(fingerprint, replies_of(folded)))
        if "group" in record.meta:
            contents["groups"].add(str(record.meta["group"]))
    return contents
