"""What a person can choose, checked before any file is opened."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from persona.convert.clean import clean_text
from persona.convert.encoding import probe, read_text
from persona.errors import UsageError
from persona.records import RecordFault

Tokenize = Callable[[str], list[tuple[int, int]]]  # a text to the places (from, to) of its tokens
Tokenizer = Callable[[str | None], tuple[str, Tokenize]]  # a model's name to itself and its tokenizer

TEMPLATES = {"continue": 1.0, "expand": 1.0, "rewrite": 1.0}
AUTHOR_PROMPT = "你是该公众号作者，保持其叙述节奏与转折。"
LINE_KINDS = ("thoughts", "notes", "silence", "marks")


@dataclass(frozen=True)
class Options:
    """The choices of a conversion; the command line takes its defaults from here."""

    characters: tuple[str, ...] = ()  # names of one character; the first is the one that records carry
    user_name: str | None = None
    system: str | None = None
    format: str | None = None
    encoding: str | None = None
    val_ratio: float | None = None  # None is DEFAULT_RATIO, or nothing where there is one group only
    seed: int = 0
    max_reject: float = 0.05
    max_record: float = 32  # millions of characters
    # repairs
    lenient: bool = False
    redact: bool = False
    fix_text: bool = False
    merge_consecutive: bool = False
    leading_assistant: str = "drop"
    allow_empty_user: bool = False
    tools: str = "reject"
    role_map: dict[str, str] = field(default_factory=dict)
    too_long: str = "reject"
    max_chars: int = 100_000
    min_chars: int = 0
    keep_dups: bool = False
    # named speakers and chats
    context_turns: int = 4
    max_exchanges: int = 8
    narration: str = "drop"
    keep_quotes: bool = False
    strip_speaker: bool = False
    flat: bool = False
    max_gap: float = 60  # minutes
    # lines and settings
    settings_apart: bool = False
    settings_weight: float = 5.0
    background: tuple[str, ...] = ()
    drop_lines: tuple[str, ...] = ("notes", "silence", "marks")
    # tables
    prompt_col: str | None = None
    response_col: str | None = None
    context_col: str | None = None
    split: str | None = None
    # articles
    templates: dict[str, float] = field(default_factory=lambda: dict(TEMPLATES))
    author_prompt: str = AUTHOR_PROMPT
    chunk_tokens: tuple[int, int] = (300, 800)
    tokenizer: Callable[[], tuple[str, Tokenize]] | None = None  # made when the first text is to be counted
    tokenizer_is_local: bool = False  # so that counting for the report fetches nothing

    DEFAULT_RATIO: ClassVar[float] = 0.1

    @property
    def ratio(self) -> float:
        """The share that is held out."""
        return self.DEFAULT_RATIO if self.val_ratio is None else self.val_ratio

    @property
    def limit(self) -> int:
        """The longest record in characters."""
        return int(self.max_record * 1_000_000)


_BOUNDS: dict[str, tuple[float, float, str]] = {
    "val_ratio": (0, 0.999999, "a share of at least 0 and less than 1, as 0.1"),
    "max_reject": (0, 1, "a share from 0 to 1, as 0.05"),
    "context_turns": (1, 1000, "a number of at least 1"),
    "max_exchanges": (1, 100_000, "a number of at least 1"),
    "max_gap": (0.001, 1e9, "a number of minutes above 0"),
    "max_record": (0.001, 1000, "a number of millions of characters, from 0.001 to 1000"),
    "max_chars": (100, 1e9, "a number of characters of at least 100"),
    "min_chars": (0, 1e6, "a number of characters of at least 0"),
    "settings_weight": (1, 100, "a number from 1 to 100, as 5 or 2.5"),
}


def checked(options: Options) -> Options:
    """The options with the system prompt read, filled in and cleaned; a UsageError names what is out of bounds."""
    for name, (low, high, wanted) in _BOUNDS.items():
        value = getattr(options, name)
        if value is not None and not low <= value <= high:
            raise UsageError(f"{_flag(name)} {value:g}: give {wanted}.")
    for name in (*options.characters, *([options.user_name] if options.user_name is not None else [])):
        if not name.strip():
            raise UsageError("--character or --user-name is empty. Give the name as it stands in the file.")
    low, high = options.chunk_tokens
    if not 20 <= low < high:
        raise UsageError(
            f"--chunk-tokens {low}-{high}: give two numbers of at least 20, the smaller first, as 300-800."
        )
    return replace(options, system=_system_prompt(options)) if options.system is not None else options


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def parse_role_map(text: str) -> dict[str, str]:
    """{"甄嬛": "assistant"} as it stands on the command line; a UsageError for anything else."""
    fix = f"""--role-map {text}: write JSON such as '{{"甄嬛": "assistant", "皇上": "user"}}'."""
    try:
        value: Any = json.loads(text)
    except (ValueError, RecursionError):
        raise UsageError(fix) from None
    if not isinstance(value, dict) or not set(map(str, value.values())) <= {"system", "user", "assistant", "tool"}:
        raise UsageError(f"{fix} The values are system, user, assistant or tool.")
    return {key.strip().casefold(): role for key, role in value.items()}


def parse_templates(text: str) -> dict[str, float]:
    """continue=1,expand=0.5 as weights of the templates of articles; those not named are off."""
    weights = dict.fromkeys(TEMPLATES, 0.0)
    for part in text.split(","):
        name, _, weight = part.strip().partition("=")
        try:
            weights[name] = float(weight or 1)
        except ValueError:
            weights[name] = -1.0
        if name not in TEMPLATES or not 0 <= weights[name] <= 1:
            raise UsageError(f"--templates {text}: write for example continue=1,expand=0.5,rewrite=0 (weights 0 to 1).")
    return weights


def parse_range(text: str) -> tuple[int, int]:
    """300-800 as two numbers."""
    low, _, high = text.partition("-")
    if not (low.isdecimal() and high.isdecimal() and len(text) < 20):
        raise UsageError(f"--chunk-tokens {text}: write two numbers, as 300-800.")
    return int(low), int(high)


def parse_line_kinds(text: str) -> tuple[str, ...]:
    """notes,silence as names of kinds of lines; none for none."""
    names = tuple(part.strip() for part in text.split(",") if part.strip() and part.strip() != "none")
    if unknown := [name for name in names if name not in LINE_KINDS]:
        raise UsageError(f"--drop-lines {text}: {unknown[0]} is not one of {', '.join(LINE_KINDS)}, none.")
    return names


def _system_prompt(options: Options) -> str:
    text = options.system or ""
    if text.startswith("@"):
        path = Path(text[1:]).expanduser()
        if not path.is_file():
            raise UsageError(f"--system {text}: {path} does not exist. Name a text file, or give the text itself.")
        text = read_text(path, str(path), probe(path, str(path)))
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
