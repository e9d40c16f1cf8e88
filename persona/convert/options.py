"""The choices of a conversion: each option says its type, bounds, default, meaning and flag once, here.

The command line is generated from it, and report.json holds it, so that a conversion can be repeated.
"""

import json
import re
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
_RANGE = re.compile(r"([0-9]{1,9})-([0-9]{1,9})")


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
        numbers = all(type(weight) in (int, float) and 0 <= weight <= 1 for weight in weights.values())
        if numbers and len(weights) == len(TEMPLATES):
            return weights
    except (TypeError, ValueError):
        pass
    raise ValueError("for example continue=1,expand=0.5,rewrite=0 (weights from 0 to 1)")


def _range(value: Any) -> tuple[int, int]:
    """300-800 as two numbers."""
    match = _RANGE.fullmatch(value) if isinstance(value, str) else None
    bounds: Any = list(map(int, match.groups())) if match else value
    if isinstance(bounds, list | tuple) and len(bounds) == 2 and all(type(bound) is int for bound in bounds):
        low, high = bounds
        if 20 <= low < high < 10**9:
            return low, high
    raise ValueError("two whole numbers of at least 20, the smaller first, for example 300-800")


def _line_kinds(value: Any) -> tuple[str, ...]:
    """notes,silence as names of kinds of lines; none for none."""
    parts = value.split(",") if isinstance(value, str) else value
    names = [str(part).strip() for part in parts] if isinstance(parts, list | tuple) else [str(parts)]
    if not {*names} <= {*LINE_KINDS, "none", ""}:
        raise ValueError(f"some of {', '.join(LINE_KINDS)} with commas between them, or none")
    return tuple(name for name in names if name not in ("none", ""))


Name = Annotated[str, AfterValidator(_name)]
Several = Field(default=(), strict=False)  # a list in report.json


class Speakers(Section):
    """named speakers: dialogues, plays, chats, character lines"""

    characters: Annotated[tuple[Name, ...], Flag("NAME", "--character")] = Several
    """Name of the character whose lines are learned; may be repeated for its other names. The first is {character}."""
    user_name: Annotated[Name | None, Flag("NAME")] = None
    """Name to put in place of {{user}} in cards and chats. In a WeChat export: the name that you have there."""
    context_turns: int = Field(default=4, ge=1, le=1000)
    """Most lines of others kept between two replies; earlier ones are not used."""
    max_exchanges: int = Field(default=8, ge=1, le=100_000)
    """Most exchanges (lines of others and the reply to them) in a record; a longer scene becomes several."""
    leading_assistant: Literal["drop", "keep"] = "drop"
    """Replies at the beginning of a conversation, such as a greeting: drop them, or keep them behind a placeholder."""
    narration: Literal["drop", "system", "brackets"] = "drop"
    """Lines of a narrator: drop them, add them to the system prompt, or put them in brackets before the next line."""
    max_gap: Annotated[float, Flag("MINUTES")] = Field(default=60, ge=0.001, le=1e9)
    """Pause in a chat after which a new conversation begins."""
    flat: bool = False
    """Make a record of each reply and the one line before it, instead of whole scenes."""
    keep_quotes: bool = False
    """Keep the quotation marks around a whole speech, which are removed otherwise."""
    strip_speaker: bool = False
    """Remove a name and colon (NAME:) from the beginning of a message."""


class General(Section):
    """reading and splitting"""

    system: Annotated[str | None, Flag("TEXT|@FILE")] = None
    """System prompt of records that have none: TEXT, or the text in FILE. {character} becomes the first --character."""
    val_ratio: Annotated[float | None, Flag("SHARE", default=str(DEFAULT_RATIO))] = Field(default=None, ge=0, lt=1)
    """Share of the records held out for validation, from 0 to 1."""
    seed: int = 0
    """Seed for the train/validation split and the shuffle."""
    format: Annotated[str | None, Flag("NAME", default="detected by content")] = None
    """Format of all inputs; data/examples/ has an example of each."""
    encoding: Annotated[str | None, Flag("NAME", default="detected")] = None
    """Encoding of all inputs, e.g. gb18030 or big5."""


class Lore(Section):
    """lore: what a character knows, from cards and character files (rows with speaker, text and input)"""

    lore_apart: Annotated[bool, Flag(name="--lore")] = False
    """Write the lore to a file of its own, lore.jsonl, and none of it to train.jsonl."""
    lore_weight: float = Field(default=5.0, ge=1, le=100)
    """Copies of each lore record in train.jsonl; with 2.5, half of them are there twice and half three times."""
    background: Annotated[tuple[str, ...], Flag("TITLE")] = Several
    """Title (its `input`) of a row in a character file that becomes lore, besides 角色故事1, 更多描述, 角色详细 and
    神之眼; may be repeated."""
    drop_lines: Annotated[tuple[str, ...], BeforeValidator(_line_kinds), Flag("KINDS")] = ("notes", "silence", "marks")
    """Kinds of rows to leave out of a character file: thoughts (in brackets), notes (of the script), silence (dots
    only), marks (symbols only); with commas between, instead of the default. none leaves all of them in."""


class Tables(Section):
    """tables"""

    prompt_col: Annotated[str | None, Flag("NAME", default="detected")] = None
    """Column that holds the prompt."""
    response_col: Annotated[str | None, Flag("NAME", default="detected")] = None
    """Column that holds the response."""
    context_col: Annotated[str | None, Flag("NAME")] = None
    """Column whose text goes before the prompt."""
    split: Annotated[str | None, Flag("NAME")] = None
    """Read only the rows whose `split` is NAME, e.g. train."""


class Repairs(Section):
    """repairs and limits"""

    lenient: bool = False
    """Read broken JSON (comments, trailing commas, single quotes) and join turns as --merge-consecutive does. The
    report counts each repair."""
    redact: bool = False
    """Mask phone, identity and bank card numbers, e-mail addresses and API keys."""
    fix_text: bool = False
    """Mend mojibake: UTF-8 that was read in another encoding (Ã©, 鈥)."""
    merge_consecutive: bool = False
    """Join several turns of one role in a row, instead of refusing the record."""
    allow_empty_user: bool = False
    """Put (The conversation begins.) into empty user turns, instead of refusing the record."""
    tools: Literal["reject", "drop"] = "reject"
    """Records with tool calls: refuse them, or drop only the exchanges with tools."""
    role_map: Annotated[dict[str, str], BeforeValidator(_role_map), Flag("JSON")] = {}
    """Roles (system, user, assistant, tool) of speakers with other names in ShareGPT and messages, e.g. '{"甄嬛":
    "assistant"}'."""
    max_chars: int = Field(default=100_000, ge=100, le=10**9)
    """Longest turn in characters; see --too-long."""
    too_long: Literal["reject", "truncate", "split"] = "reject"
    """Records with a turn longer than --max-chars: refuse them, end them before that turn, or make two of them without
    it."""
    min_chars: int = Field(default=0, ge=0, le=10**6)
    """Shortest reply in characters. A shorter one is left out of a dialogue; elsewhere its record is refused."""
    keep_dups: bool = False
    """Keep records that are exactly alike, of which one is kept otherwise."""
    max_reject: Annotated[float, Flag("SHARE")] = Field(default=0.05, ge=0, le=1)
    """Share of rejected records above which the command fails (exit code 3); the good records are written all the
    same."""
    max_record: float = Field(default=32, ge=0.001, le=1000)
    """Longest record that is read, in millions of characters; a file with a longer one is refused."""


class Articles(Section):
    """articles"""

    templates: Annotated[dict[str, float], BeforeValidator(_templates), Flag("LIST")] = dict.fromkeys(TEMPLATES, 1.0)
    """Tasks made of an article: continue its text, expand on a subject, rewrite plain text. Each with the share of the
    pieces that get it, 0 to 1 (they need not add up to 1); a task that is not named is off."""
    author_prompt: Annotated[str, Flag("TEXT")] = "你是该公众号作者，保持其叙述节奏与转折。"
    """System prompt of records from articles, if there is no --system."""
    chunk_tokens: Annotated[tuple[int, int], BeforeValidator(_range), Flag("N-M", default="300-800")] = (300, 800)
    """Shortest and longest piece of an article in tokens."""
    tokenizer: Annotated[str | None, Flag("MODEL", default="the model of config/default.json")] = None
    """Model (name or folder) that counts the tokens."""


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

    def filled_in(self) -> "Options":
        """The options with the character's name in the system prompt, which is saved without it."""
        if not self.system or not self.characters:
            return self
        return self.model_copy(update={"system": self.system.replace("{character}", self.characters[0]).strip()})


GROUPS = (Speakers, General, Lore, Tables, Repairs, Articles)  # as --help shows them
