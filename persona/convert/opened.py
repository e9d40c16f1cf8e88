"""One input file opened: its text decoded, its format decided with the reason, its content made into drafts."""

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, replace
from difflib import get_close_matches

from persona.console import excerpt, table
from persona.convert import dialogue, scenes
from persona.convert.detect import Foreign, decode, is_json
from persona.convert.draft import Draft
from persona.convert.formats import EXPECTED, ROW_FORMATS
from persona.convert.json_input import Row, read_rows
from persona.convert.sources import Source
from persona.errors import UsageError
from persona.records import RecordFault

_SHOWN_SPEAKERS = 20


@dataclass(frozen=True)
class Opened:
    """A file whose text could be read: either rows or a script of speeches."""

    source: Source
    layout: str
    encoding: str
    notes: list[str]
    rows: list[Row]
    script: dialogue.Script | None


def open_bytes(source: Source, data: bytes, forced: str | None, characters: Collection[str]) -> Opened:
    """The opened file; a DataError names the place that cannot be read, or what is not known."""
    text, encoding, notice = decode(data, source.name)
    notes = [notice] if notice else []
    if forced in ROW_FORMATS or (forced is None and is_json(text)):
        rows, layout = read_rows(text, source.name)
        return Opened(source, layout, encoding, notes, rows, None)
    lines = text.replace("\r\n", "\n").replace("\r", "\n")
    script = dialogue.parse(lines, characters)
    if not script.speeches or (forced is None and not dialogue.recognise(script, characters)):
        raise Foreign(
            f"{source.name}: no format recognised: it begins with {excerpt(text, 30)!r}. "
            f"Expected {EXPECTED}; --format NAME forces one."
        )
    return Opened(source, script.layout, encoding, notes + script.notes, [], script)


def check_characters(files: Collection[Opened], characters: Collection[str]) -> None:
    """A UsageError with the speakers found unless every name in `characters` is one, where there is raw dialogue."""
    speeches = [speech for file in files if file.script for speech in file.script.speeches]
    if not speeches:
        return
    spellings: dict[str, str] = {}
    for speech in speeches:
        spellings.setdefault(dialogue.fold_name(speech.speaker), speech.speaker)
    counts = Counter(dialogue.fold_name(speech.speaker) for speech in speeches)
    unknown = [name for name in characters if dialogue.fold_name(name) not in counts]
    if characters and not unknown:
        return
    top = counts.most_common(_SHOWN_SPEAKERS)
    listed = table((excerpt(spellings[name], 40), f"{count:,}") for name, count in top)
    more = f"\n  and {len(counts) - len(top):,} more" if len(counts) > len(top) else ""
    if unknown:
        close = _close(dialogue.fold_name(unknown[0]), list(counts))
        say = f'No lines of "{excerpt(unknown[0], 40)}".'
        say += f" Did you mean {' or '.join(_flag(spellings[name]) for name in close)}?" if close else ""
        raise UsageError(f"{say}\nSpeakers found (lines):\n{listed}{more}")
    names = ", ".join(sorted(file.source.name for file in files if file.script))
    head = f"{excerpt(names)}: raw dialogue; --character must say whose lines are learned. Speakers found (lines):"
    raise UsageError(f"{head}\n{listed}{more}\nAdd for example: {_flag(spellings[top[0][0]])}")


def _close(name: str, known: list[str]) -> list[str]:
    containing = [other for other in known if name in other or other in name]
    return list(dict.fromkeys(get_close_matches(name, known, 3) + containing))[:3]


def _flag(name: str) -> str:
    return f'--character "{excerpt(name, 40)}"'


def row_drafts(rows: list[Row], forced: str | None) -> tuple[list[Draft], dict[str, int], list[str]]:
    """A draft for each row, the rows of each format, and the reasons for these formats."""
    drafts: list[Draft] = []
    counts: Counter[str] = Counter()
    reasons: dict[str, None] = {}
    for row in rows:
        name, why = (forced, f"--format {forced}") if forced else _recognise(row)
        try:
            if row.fault:
                raise row.fault
            if not isinstance(row.value, dict):
                raise RecordFault("NOT_AN_OBJECT", "$", f"found {excerpt(repr(row.value), 40)}", f"write {EXPECTED}")
            if name is None:
                keys = excerpt(", ".join(map(str, row.value)), 60) or "(none)"
                lists = [key for key, inner in row.value.items() if isinstance(inner, list)]
                fix = (
                    f'save the list under "{excerpt(lists[0], 40)}" as a file of its own'
                    if lists
                    else f"write {EXPECTED}"
                )
                raise RecordFault("UNKNOWN_FORMAT", "$", f"found the keys {keys}", fix)
            draft = ROW_FORMATS[name].convert(row.value)
        except RecordFault as fault:
            draft = Draft([], fault=fault)
        drafts.append(replace(draft, line=row.line, path=row.path, source_text=row.text))
        counts[name or ("unreadable" if row.fault else "unknown")] += 1
        reasons[why] = None
    return drafts, dict(counts), list(reasons)


def _recognise(row: Row) -> tuple[str | None, str]:
    if row.fault:
        return None, "some rows cannot be read"
    if isinstance(row.value, dict):
        for name, row_format in ROW_FORMATS.items():
            if why := row_format.recognise(row.value):
                return name, why
    return None, "some rows are of no known format"


def script_drafts(
    script: dialogue.Script, characters: Collection[str], context_turns: int, max_exchanges: int
) -> tuple[list[Draft], Counter[str], str]:
    """The drafts of a script, the speeches not used by reason, and in words how it was cut into scenes."""
    drafts, not_used = scenes.conversations(script, characters, context_turns, max_exchanges)
    if script.has_borders:
        return drafts, not_used, "scenes by their heads"
    return drafts, not_used, f"no scene heads, so {scenes.MAX_SILENCE} lines without the character end a scene"
