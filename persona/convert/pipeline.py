"""The way from files to records: read, clean, drop duplicates, split by group, order by the seed.

The order of the output depends on the seed and each conversation alone: converting the output again changes nothing.
Records go through one at a time; memory grows by some thirty bytes a record.
"""

from collections import Counter
from collections.abc import Collection, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from tempfile import TemporaryDirectory

from persona.console import excerpt, table
from persona.convert.draft import Rejection
from persona.convert.formats.format import TextFormat
from persona.convert.formats.recognise import TEXT_FORMATS
from persona.convert.formats.scenes import fold_name
from persona.convert.inputs import Foreign, Source, find_sources
from persona.convert.ledger import LORE, REJECTED, TRAIN, VALIDATION, Counts, Ledger
from persona.convert.options import Options
from persona.convert.output import Staged, explain_disk
from persona.convert.reading import Opened, open_source, read_together
from persona.convert.report import Report, readable, warnings_of
from persona.convert.statistics import advice, measure
from persona.errors import DataError, UsageError
from persona.files import check_folder
from persona.records import SHOWN_FAULTS, Record

# In the order in which they get their names: the data before the reports
REPORT, PAGE = "report.json", "report.html"
OUTPUTS = (
    *(TRAIN, VALIDATION, LORE),
    *(name for one in TEXT_FORMATS for name in (*one.names.values(), one.statistics) if name),
    *(REJECTED, REPORT, PAGE),
)
_SPEAKERS_SHOWN = 20
_SPEAKERS_SAVED = 50


def _speakers(opened: Sequence[Opened], options: Options) -> tuple[Counter[str], Options]:
    """How often each person speaks; and the options with the character that all files name, if they name none."""
    files = [file for file in opened if file.contents.speakers]
    speakers = sum((file.contents.speakers for file in files), Counter[str]())
    named = {file.contents.character for file in files}
    if not options.characters and len(named) == 1 and None not in named:
        options = options.model_copy(update={"characters": tuple(named)})
    check_characters(speakers, {file.source.name for file in files}, options.characters)
    return speakers, options.filled_in()


def check_characters(speakers: Counter[str], files: Collection[str], characters: Collection[str]) -> None:
    """A UsageError that lists the speakers, unless there are none, or `characters` names some and all of them speak."""
    spellings: dict[str, str] = {}
    counts: Counter[str] = Counter()
    for name, count in speakers.items():
        spellings.setdefault(fold_name(name), name)
        counts[fold_name(name)] += count
    unknown = [name for name in characters if fold_name(name) not in counts]
    if not counts or (characters and not unknown):
        return
    top = counts.most_common(_SPEAKERS_SHOWN)
    listed = table((excerpt(spellings[name], 40), f"{count:,}") for name, count in top)
    listed += f"\n  and {len(counts) - len(top):,} more" if len(counts) > len(top) else ""
    if not unknown:
        raise UsageError(
            f"{excerpt(', '.join(sorted(files)))}: several people speak; --character must say whose lines are learned. "
            f"Speakers found (lines):\n{listed}\nAdd for example: {_flag(spellings[top[0][0]])}"
        )
    missing = fold_name(unknown[0])
    close = get_close_matches(missing, counts, 3) + [name for name in counts if missing in name or name in missing]
    flags = " or ".join(_flag(spellings[name]) for name in list(dict.fromkeys(close))[:3])
    hint = f" Did you mean {flags}?" if flags else ""
    raise UsageError(f'No lines of "{excerpt(unknown[0], 40)}".{hint}\nSpeakers found (lines):\n{listed}')


def _flag(name: str) -> str:
    return f'--character "{excerpt(name, 40)}"'


@dataclass(frozen=True)
class Conversion:
    """The report, with records and rejections to show."""

    report: Report
    records: list[Record]  # the first, in the order of the input
    rejections: dict[str, list[Rejection]]  # some of each code
    written: list[str]  # names of files


def convert(
    inputs: Sequence[str], options: Options, output: Path | None, keep: int = 0, names: Collection[str] = ()
) -> Conversion:
    """Convert all inputs and write `output`, all files or none; without `output`, write nothing.

    The first `keep` records are kept, to be shown. With `names`, files of other names are left out. One DataError names
    all files that cannot be read.
    """
    sources, skipped = find_sources(inputs)
    if names:
        others = [source for source in sources if source.name not in names]
        skipped += [f"{source.path}: not a part of the conversion that is repeated" for source in others]
        sources = [source for source in sources if source.name in names]
    if output:
        check_output(output, sources)
    opened, faults = _survey(sources, options, skipped)
    speakers, chosen = _speakers(opened, options)
    with ExitStack() as stack:
        folder = output or Path(stack.enter_context(TemporaryDirectory()))
        stack.enter_context(explain_disk(folder))
        staged = stack.enter_context(Staged(folder))
        scratch = stack.enter_context(TemporaryDirectory(prefix=".convert-", dir=folder))
        ledger = stack.enter_context(closing(Ledger(chosen, staged, Path(scratch), keep)))
        tallies = read_together(opened, chosen)
        for file in opened:
            try:
                for number, draft in enumerate(file.drafts(chosen), 1):
                    ledger.settle(draft, file.source, number, file.counts)
            except DataError as fault:
                faults.append(str(fault))
        _stop_at(faults)
        counts = sum((file.counts for file in opened), Counts())
        counts.check()
        formats = {file.format for file in opened}
        only = formats.pop() if len(formats) == 1 else None
        renamed = dict(only.names) if isinstance(only, TextFormat) else {}
        lines, sample = ledger.finish(renamed)
        if options.val_ratio and counts.written and not lines[VALIDATION]:
            records = "1 record" if counts.written == 1 else f"{counts.written:,} records"
            raise DataError(
                f"--val-ratio {options.val_ratio:g}: {records} in one group, so none can be held out. "
                "Use --val-ratio 0, or give more. Nothing was written."
            )
        statistics = measure(sample, counts.written, options.load_tokenizer if options.tokenizer else None)
        report = Report(
            counts=counts,
            train=lines[TRAIN],
            val=lines[VALIDATION],
            lore=lines[LORE],
            characters=chosen.characters,
            system_prompt=chosen.system or counts.system_prompt,
            files=opened,
            skipped=skipped,
            speakers=dict(speakers.most_common(_SPEAKERS_SAVED)),
            names={"train": renamed.get(TRAIN, TRAIN), "val": renamed.get(VALIDATION, VALIDATION)},
            statistics=statistics,
            warnings=warnings_of(counts, lines[VALIDATION], chosen, folder) + advice(sample, statistics),
            inputs=list(inputs),
            options=options,
            tallies=tallies,
        )
        for one in tallies:
            staged.write_line(one.statistics, readable(report.tally(one)))
        staged.write_line(REPORT, readable(report.to_json()))
        staged.write_line(PAGE, report.to_page(sample).encode("utf-8", "backslashreplace"))
        stale = (report.names["val"],) if counts.written else ()  # an earlier conversion may have left it
        return Conversion(report, ledger.first, ledger.shown, staged.publish(OUTPUTS, stale) if output else [])


def check_output(output: Path, sources: Sequence[Source]) -> None:
    """A UsageError if `output` cannot be a folder, or writing to it would destroy an input."""
    check_folder(output, "--output")
    files = {source.path.resolve() for source in sources}
    for name in OUTPUTS:
        if (output / name).resolve() in files:
            raise UsageError(f"{output / name} is an input and would be overwritten. Choose another --output.")


def _survey(sources: Sequence[Source], options: Options, skipped: list[str]) -> tuple[list[Opened], list[str]]:
    """The files opened, and the faults of those that cannot be; foreign files of a folder are added to `skipped`."""
    opened: list[Opened] = []
    faults: list[str] = []
    for source in sources:
        try:
            opened.append(open_source(source, options))
        except DataError as fault:
            passed_over = source.from_folder and isinstance(fault, Foreign)
            (skipped if passed_over else faults).append(str(fault))
    if not opened:
        _stop_at(faults)
        raise DataError("\n".join(["No file of a known format was found.", *skipped]))
    return opened, faults


def _stop_at(faults: list[str]) -> None:
    if faults:
        more = [f"... and {len(faults) - SHOWN_FAULTS} more files"] if len(faults) > SHOWN_FAULTS else []
        raise DataError("\n".join([*faults[:SHOWN_FAULTS], *more, "Nothing was written."]))
