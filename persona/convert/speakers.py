"""Whose lines are learned: the names on the command line held against the speakers of the files."""

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import replace
from difflib import get_close_matches

from persona.console import excerpt, table
from persona.convert.dialogue import fold_name
from persona.convert.options import Options
from persona.errors import UsageError

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
