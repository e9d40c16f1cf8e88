"""A text cut into chunks of so many tokens, at the best border there is; joined again they are the text.

Borders are taken in this order: paragraphs, sentences, double spaces and line ends, commas, and between any two tokens.
"""

import re
from bisect import bisect_left

from persona.convert.options import Tokenize

_CLOSE = r"[”」』’\"')）】》]*"
_LEVELS = (
    re.compile(r"\n\s*\n"),
    re.compile(rf"[。！？；…]+{_CLOSE}\s*|[.!?;]+{_CLOSE}(?:\s+|$)"),
    re.compile(r"[ \u3000]{2,}|\u3000|\n"),
    re.compile(r"[，、,：:]\s*"),
)
_SLACK = 8  # tokens; a chunk by itself may be cut into a few tokens more or fewer than in its text


def cut(text: str, tokenize: Tokenize, low: int, high: int) -> list[str]:
    """The chunks of `text`, of `low` to `high` tokens each; a text that is shorter is one chunk."""
    starts = [start for start, _ in tokenize(text)]
    slack = _SLACK if high - low > 6 * _SLACK else 0
    low, high = low + slack, high - slack
    borders = [[match.end() for match in level.finditer(text)] for level in _LEVELS]
    chunks: list[str] = []
    position = 0
    while (left := len(starts) - _token(starts, position)) > high:
        first = _token(starts, position)
        most = min(high, left - low) if left - low >= low else high  # so that the last chunk is long enough
        end = _border(starts, borders, first, min(low, most), most)
        chunks.append(text[position:end])
        position = end
    if position < len(text) or not chunks:
        chunks.append(text[position:])
    return chunks


def _token(starts: list[int], position: int) -> int:
    return bisect_left(starts, position)


def _border(starts: list[int], borders: list[list[int]], first: int, low: int, high: int) -> int:
    """The place to cut: of the best kind of border in the window the one nearest to its middle."""
    earliest, latest = starts[first + low], starts[first + high]
    middle = starts[first + (low + high) // 2]
    for level in borders:
        inside = level[bisect_left(level, earliest) : bisect_left(level, latest + 1)]
        if inside:
            return min(inside, key=lambda place: abs(place - middle))
    return max(middle, starts[first] + 1)


def halves(text: str) -> tuple[str, str]:
    """The text cut near its middle, at the best border within its middle third."""
    third, middle = len(text) // 3, len(text) // 2
    for level in _LEVELS:
        inside = [match.end() for match in level.finditer(text) if third <= match.end() <= len(text) - third]
        if inside:
            place = min(inside, key=lambda end: abs(end - middle))
            return text[:place], text[place:]
    return text[:middle], text[middle:]


def sentences(text: str) -> list[str]:
    """The sentences of a text, without outer white space."""
    ends = [match.end() for match in _LEVELS[1].finditer(text)]
    parts = [text[start:end] for start, end in zip([0, *ends], [*ends, len(text)], strict=True)]
    return [line.strip() for part in parts for line in part.split("\n") if line.strip()]
