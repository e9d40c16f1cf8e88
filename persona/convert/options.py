"""What a person can choose for a conversion: each option says its type, bounds, default, meaning and flag once, here.

The command line is generated from it, and report.json holds it, so that a conversion can be repeated.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from persona.config import Section

Tokenize = Callable[[str], list[tuple[int, int]]]  # a text to the places (from, to) of its tokens
Tokenizer = Callable[[], tuple[str, Tokenize]]  # a model's name and its tokenizer

TEMPLATES = ("continue", "expand", "rewrite")
LINE_KINDS = ("thoughts", "notes", "silence", "marks")
ROLES = ("system", "user", "assistant", "tool")
DEFAULT_RATIO = 0.1


@dataclass(frozen=True)
class Flag:
    """How an option is written on the command line, if that does not follow from its name and type."""

    metavar: str | None = None
    name: str | None = None
    default: str | None = None  # its words in the help


def _name(text: str) -> str:
    if not text.strip():
        raise ValueError("the name as in the file; it is empty")
    return text


def _role_map(value: Any) -> dict[str, str]:
    try:
        roles = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        roles = None
    if not isinstance(roles, dict) or not all(role in ROLES for role in roles.values()):
        raise ValueError(f"""JSON, for example '{{"甄嬛": "assistant"}}'; the roles are {", ".join(ROLES)}""")
    return {key.strip().casefold(): role for key, role in roles.items()}


def _templates(value: Any) -> dict[str, float]:
    """continue=1,expand=0.5 as weights of the templates; those not named are off."""
    try:
        if isinstance(value, str):
            parts = (part.strip().partition("=") for part in value.split(","))
            value = {name: float(weight or 1) for name, _, weight in parts}
        weights: dict[str, float] = dict.fromkeys(TEMPLATES, 0.0) | value
        if len(weights) == len(TEMPLATES) and all(0 <= weight <= 1 for weight in weights.values()):
            return weights
    except (TypeError, ValueError):
        pass
    raise ValueError("for example continue=1,expand=0.5,rewrite=0 (weights from 0 to 1)")


def _range(value: Any) -> tuple[int, int]:
    """300-800 as two numbers."""
    try:
        low, high = map(int, value.split("-") if isinstance(value, str) else value)
    except (TypeError, ValueError):
        low = high = 0
    if not 20 <= low < high < 10**9:
        raise ValueError("two numbers of at least 20, the smaller first, for example 300-800")
    return low, high


def _line_kinds(value: Any) -> tuple[str, ...]:
    """notes,silence as names of kinds of lines; none for none."""
    parts = value.split(",") if isinstance(value, str) else value
    names = [str(part).strip() for part in parts] if isinstance(parts, list | tuple) else [""]
    if not {*names} <= {*LINE_KINDS, "none", ""}:
        raise ValueError(f"some of {', '.join(LINE_KINDS)} with commas between them, or none")
    return tuple(name for name in names if name not in ("none", ""))


Name = Annotated[str, AfterValidator(_name)]
Several = Field(default=(), strict=False)  # a list in report.json


class Speakers(Section):
    """named speakers: dialogues, plays, chats, character lines"""

    characters: Annotated[tuple[Name, ...], Flag("NAME", "--character")] = Several
    """Name of the character, whose lines are learned. Repeat the flag for its other names in the files."""
    user_name: Annotated[Name | None, Flag("NAME")] = None
    """Name that replaces {{user}}. For a WeChat export: your own name."""
    context_turns: int = Field(default=4, ge=1, le=1000)
    """Most lines that are kept before a reply as its context."""
    max_exchanges: int = Field(default=8, ge=1, le=100_000)
    """Most exchanges in a record; a longer scene becomes several records."""
    leading_assistant: Literal["drop", "keep"] = "drop"
    """Replies that no other line precedes, such as a greeting: dropped, or learned."""
    narration: Literal["drop", "system", "brackets"] = "drop"
    """Lines of a narrator: dropped, put into the system prompt, or put in brackets before the next line."""
    max_gap: Annotated[float, Flag("MINUTES")] = Field(default=60, ge=0.001, le=1e9)
    """Pause in a chat after which a new conversation begins, in minutes."""
    flat: bool = False
    """Give each reply only the line before it, instead of its scene."""
    keep_quotes: bool = False
    """Keep the quotation marks 「」 or “” around a whole speech."""
    strip_speaker: bool = False
    """Remove a speaker's name (NAME:) from the beginning of a message."""


class General(Section):
    """reading and splitting"""

    system: Annotated[str | None, Flag("TEXT|@FILE")] = None
    """System prompt of every record that has none: text, or @FILE. {character} becomes the name."""
    val_ratio: Annotated[float | None, Flag("SHARE", default=str(DEFAULT_RATIO))] = Field(default=None, ge=0, lt=1)
    """Share of the records held out for validation."""
    seed: int = 0
    """Seed for the train/validation split and the shuffle."""
    format: Annotated[str | None, Flag("NAME", default="detected by content")] = None
    """Format of all inputs."""
    encoding: Annotated[str | None, Flag("NAME", default="detected")] = None
    """Encoding of all inputs, e.g. gb18030 or big5."""


class Lore(Section):
    """lore: what a character knows, from character files and cards"""

    lore_apart: Annotated[bool, Flag(name="--lore")] = False
    """Write lore into lore.jsonl, instead of mixing it into the training file."""
    lore_weight: float = Field(default=5.0, ge=1, le=100)
    """Copies of each lore record in the training file, e.g. 5 or 2.5."""
    background: Annotated[tuple[str, ...], Flag("TITLE")] = Several
    """Title in a character file whose text is background, besides 角色故事1, 更多描述, 角色详细, 神之眼. Repeatable."""
    drop_lines: Annotated[tuple[str, ...], BeforeValidator(_line_kinds), Flag("KINDS")] = ("notes", "silence", "marks")
    """Kinds of lines to leave out of character files, with commas between: thoughts, notes, silence, marks; or none."""


class Tables(Section):
    """tables"""

    prompt_col: Annotated[str | None, Flag("NAME", default="detected")] = None
    """Column that holds the prompt."""
    response_col: Annotated[str | None, Flag("NAME", default="detected")] = None
    """Column that holds the response."""
    context_col: Annotated[str | None, Flag("NAME")] = None
    """Column that holds a text to put before the prompt."""
    split: Annotated[str | None, Flag("NAME")] = None
    """Split to read, e.g. train, if the rows name one. Rows of the other splits are left out."""


class Repairs(Section):
    """what to mend, drop or refuse"""

    lenient: bool = False
    """Read broken JSON (comments, trailing commas, single quotes) and join turns of one role; list each repair."""
    redact: bool = False
    """Mask phone, identity and card numbers, e-mail addresses and keys."""
    fix_text: bool = False
    """Mend mojibake: UTF-8 that was read in another encoding (Ã©, 鈥)."""
    merge_consecutive: bool = False
    """Join consecutive turns of one role, instead of refusing the record."""
    allow_empty_user: bool = False
    """Fill in empty user turns, instead of refusing the record."""
    tools: Literal["reject", "drop"] = "reject"
    """Records with tool calls: refused, or kept without these exchanges."""
    role_map: Annotated[dict[str, str], BeforeValidator(_role_map), Flag("JSON")] = {}
    """Roles of other speakers in ShareGPT and messages, as JSON, e.g. '{"甄嬛": "assistant"}'."""
    max_chars: int = Field(default=100_000, ge=100, le=10**9)
    """Longest turn in characters."""
    too_long: Literal["reject", "truncate", "split"] = "reject"
    """Records with a turn longer than --max-chars: refused, cut before that turn, or split around it."""
    min_chars: int = Field(default=0, ge=0, le=10**6)
    """Shortest reply in characters. A shorter one is left out of a dialogue; elsewhere its record is refused."""
    keep_dups: bool = False
    """Keep exact duplicates."""
    max_reject: Annotated[float, Flag("SHARE")] = Field(default=0.05, ge=0, le=1)
    """Share of rejected records above which the command fails, with exit code 3; good records are still written."""
    max_record: float = Field(default=32, ge=0.001, le=1000)
    """Longest record of a file in millions of characters."""


class Articles(Section):
    """articles"""

    templates: Annotated[dict[str, float], BeforeValidator(_templates), Flag("LIST")] = dict.fromkeys(TEMPLATES, 1.0)
    """Prompt templates, each with the share of the chunks that get it."""
    author_prompt: Annotated[str, Flag("TEXT")] = "你是该公众号作者，保持其叙述节奏与转折。"
    """System prompt of records from articles."""
    chunk_tokens: Annotated[tuple[int, int], BeforeValidator(_range), Flag("N-M", default="300-800")] = (300, 800)
    """Shortest and longest chunk in tokens."""
    tokenizer: Annotated[str | None, Flag("MODEL", default="the model of config/default.json")] = None
    """Model whose tokens are counted."""


class Options(Speakers, General, Lore, Tables, Repairs, Articles):
    """All choices of a conversion."""

    load_tokenizer: Tokenizer | None = Field(default=None, exclude=True)
    """Loads the tokenizer when the first text is to be counted; a part of the program, so never a flag or saved."""

    @property
    def ratio(self) -> float:
        """The share that is held out."""
        return DEFAULT_RATIO if self.val_ratio is None else self.val_ratio

    @property
    def limit(self) -> int:
        """The longest record in characters."""
        return int(self.max_record * 1_000_000)


GROUPS = (Speakers, General, Lore, Tables, Repairs, Articles)  # as --help shows them
