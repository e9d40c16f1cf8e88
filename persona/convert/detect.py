"""What a text means to be: JSON, well-formed or not, or an article; by content, never by the file's ending."""

import re
from pathlib import Path

# What may follow an opening bracket of JSON, broken JSON included; `[Enter HAMLET]` and `[12:30]` are text.
_JSON_START = re.compile(
    r"""(?:\s*+(?>//[^\n]*|/\*.*?\*/|\.{3,}|…+))*+\s*+(?:\[\s*+(?:[{\["'\]/.…]|$)|\{\s*+(?:["'}/“”.…]|$))""", re.DOTALL
)
# Texts that look like prose or dialogue and are neither.
_FOREIGN = (
    (
        re.compile(r"\d\d:\d\d[,.]\d{3} --> (?:\d\d:)?\d\d:\d\d[,.]\d{3}|\A\[Script Info\]"),
        "subtitles, which rarely say who speaks",
        "write the lines as NAME: words",
    ),
    (
        re.compile(r"^label \w+(?:\(.*\))?:\s*$", re.MULTILINE),
        "a Ren'Py script",
        "Extract Dialogue in the Ren'Py launcher writes dialogue.tab, which can be read here",
    ),
    (re.compile(r"\A\s*<(?:!doctype html|html|\?xml)", re.IGNORECASE), "a web page", "save it as plain text"),
)
_HEADING = re.compile(r"#{1,6} \S|\[[^\]\n]+\]\([^)\n]+\)|!\[")
_SENTENCE = re.compile(r"[。！？!?.…](?=\s|$|[”」』\"])|[。！？]")
_ARTICLE = 300  # characters; shorter texts are notes


def is_json(text: str) -> bool:
    """Whether the text means to be JSON, well-formed or not."""
    return _JSON_START.match(text[:10_000]) is not None


def foreign(head: str) -> tuple[str, str] | None:
    """What a text is that cannot be read here, and what to do about it; None for all others."""
    return next(((what, fix) for pattern, what, fix in _FOREIGN if pattern.search(head)), None)


def article(path: Path, head: str) -> str | None:
    """Why a text is an article, or None: prose of some length, or Markdown, or with a meta.json beside it."""
    if len(head.strip()) < 20:
        return None
    if (path.parent / "meta.json").is_file():
        return "a text with meta.json beside it"
    if len(head) >= _ARTICLE and _HEADING.search(head):
        return "Markdown of some length"
    return "prose of some length" if len(head) >= _ARTICLE and len(_SENTENCE.findall(head)) >= 3 else None
