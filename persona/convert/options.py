"""What a person can choose, checked before any file is opened."""

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

from persona.convert.clean import clean_text
from persona.convert.detect import decode
from persona.errors import UsageError
from persona.records import RecordFault


@dataclass(frozen=True)
class Options:
    """The choices of a conversion; the command line takes its defaults from here."""

    characters: tuple[str, ...] = ()  # names of one character; the first is the one that records carry
    system: str | None = None
    format: str | None = None
    val_ratio: float = 0.1
    seed: int = 0
    context_turns: int = 4
    max_exchanges: int = 8
    max_reject: float = 0.05


def checked(options: Options) -> Options:
    """The options with the system prompt read, filled in and cleaned; a UsageError names what is out of bounds."""
    if not 0 <= options.val_ratio < 1:
        raise UsageError(f"--val-ratio {options.val_ratio:g}: give a share of at least 0 and less than 1, as 0.1.")
    if not 0 <= options.max_reject <= 1:
        raise UsageError(f"--max-reject {options.max_reject:g}: give a share from 0 to 1, as 0.05.")
    for flag, value in (("--context-turns", options.context_turns), ("--max-exchanges", options.max_exchanges)):
        if value < 1:
            raise UsageError(f"{flag} {value}: give a number of at least 1.")
    for name in options.characters:
        if not name.strip():
            raise UsageError("--character is empty. Give the name as it stands in the file.")
    return replace(options, system=_system_prompt(options)) if options.system is not None else options


def _system_prompt(options: Options) -> str:
    text = options.system or ""
    if text.startswith("@"):
        path = Path(text[1:]).expanduser()
        if not path.is_file():
            raise UsageError(f"--system {text}: {path} does not exist. Name a text file, or give the text itself.")
        text = decode(path.read_bytes(), str(path))[0]
    if "{character}" in text:
        if not options.characters:
            raise UsageError("--system holds {character}: add --character NAME to fill it in.")
        text = text.replace("{character}", options.characters[0])
    try:
        text = clean_text(text, "--system", Counter())
    except RecordFault as fault:
        raise UsageError(f"--system: {fault.reason}. {fault.fix}.") from None
    if not text:
        raise UsageError("--system is empty. Give the text, or leave the flag out.")
    return text
