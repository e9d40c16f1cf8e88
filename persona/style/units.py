"""Texts cut into what is counted: sentences, passages, words, characters.

Chinese is cut into words by jieba where that package is installed, else into pairs of neighbouring characters; every
other script by its letters. Word counts of two such ways cannot be compared, so a result says which it used.
"""

import re
from collections.abc import Callable, Sequence
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from typing import Literal

Language = Literal["zh", "en"]
Segmenter = Callable[[str], list[str]]

# Han with its extensions, and kana: scripts that are written without spaces
UNSPACED = "\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_CHARACTER = re.compile(f"[{UNSPACED}]")
_WORD = re.compile(f"(?:(?![{UNSPACED}])[^\\W_])+(?:['’](?:(?![{UNSPACED}])[^\\W_])+)*")
_UNIT = re.compile(f"{_CHARACTER.pattern}|{_WORD.pattern}")
_PIECE = re.compile(f"[{UNSPACED}]+|{_WORD.pattern}")
# A full stop between two digits or letters (3.14, e.g) ends nothing. Closing quotes belong to the sentence they close.
_SENTENCE = re.compile(r".*?(?:(?:[。！？!?…；;～~]|\.(?![^\W_]))+[”’」』）)\"']*|[\n\r]+| {2,}|\u3000+|$)", re.DOTALL)
_PASSAGE = 500  # characters; a chapter told in one piece becomes passages, so that halves can be drawn


def language(texts: Sequence[str]) -> Language:
    """Chinese where characters written without spaces outnumber a fifth of the words; "en" stands for all others."""
    characters = sum(len(_CHARACTER.findall(text)) for text in texts)
    return "zh" if characters * 5 > sum(len(_WORD.findall(text)) for text in texts) else "en"


def units(text: str) -> list[tuple[int, int]]:
    """Where each word begins and ends; of a script without spaces, each character."""
    return [found.span() for found in _UNIT.finditer(text)]


def sentences(text: str) -> list[str]:
    """Sentences with their delimiters; a new line or a double space ends one too, for authors without punctuation."""
    return [found for found in _SENTENCE.findall(text) if found.strip()]


def passages(text: str, longest: int = _PASSAGE) -> list[str]:
    """`text`, or its sentences gathered into passages of up to `longest` characters where it is twice that long."""
    if len(text) <= 2 * longest:
        return [text]
    found = [""]
    for sentence in _SENTENCE.findall(text):
        for start in range(0, len(sentence), longest):
            piece = sentence[start : start + longest]
            if found[-1] and len(found[-1]) + len(piece) > longest:
                found.append("")
            found[-1] += piece
    return [passage for passage in found if passage.strip()]


def words(text: str, cut: Segmenter) -> list[str]:
    """Lower-case words in the text's order, unspaced scripts cut by `cut`."""
    found = []
    for piece in _PIECE.findall(text.casefold().replace("’", "'")):
        found += cut(piece) if _CHARACTER.match(piece) else [piece]
    return found


def segmenter(choice: Literal["auto", "jieba", "bigrams"] = "auto") -> tuple[Segmenter, str]:
    """What cuts unspaced scripts into words, and its name for the report; "auto" takes jieba where it is installed."""
    if choice == "bigrams" or (choice == "auto" and find_spec("jieba") is None):
        return _bigrams, "character bigrams"
    return _jieba(), f"jieba {metadata.version('jieba')}"


def _bigrams(piece: str) -> list[str]:
    return [piece[i : i + 2] for i in range(len(piece) - 1)] or [piece]


@cache
def _jieba() -> Segmenter:
    import logging

    import jieba  # pyright: ignore[reportMissingImports]

    jieba.setLogLevel(logging.WARNING)
    tokenizer = jieba.Tokenizer()  # its own, as a program's additions to the shared dictionary would change the counts
    return tokenizer.lcut
