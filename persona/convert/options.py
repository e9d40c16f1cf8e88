"""What a person can choose, checked before any file is opened."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

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
    # lines and lore
    lore_apart: bool = False
    lore_weight: float = 5.0
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
