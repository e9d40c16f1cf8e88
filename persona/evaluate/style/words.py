"""Texts cut into sentences, passages, words and characters, to be counted.

Chinese is cut into words by jieba if that package is installed, else into pairs of neighbouring characters; every other
script by its letters. Word counts of the two ways cannot be compared, so a report names the way it used.
"""

import re
from collections.abc import Callable, Sequence
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from typing import Literal

from persona.records import CHARACTER, UNSPACED, WORD, is_chinese

Language = Literal["zh", "en"]
Segmenter = Callable[[str], list[str]]

_UNIT = re.compile(f"{CHARACTER.pattern}|{WORD.pattern}")
_PIECE = re.compile(f"[{UNSPACED}]+|{WORD.pattern}")
# A full stop between two digits or letters (3.14, e.g) ends nothing. Closing quotes belong to the sentence they close.
_SENTENCE = re.compile(r".*?(?:(?:[。！？!?…；;～~]|\.(?![^\W_]))+[”’」』）)\"']*|[\n\r]+| {2,}|\u3000+|$)", re.DOTALL)
_PASSAGE = 500  # characters; a chapter told in one piece becomes passages, so that halves can be drawn


def language(texts: Sequence[str]) -> Language:
    """`zh`, or `en` for all other languages."""
    return "zh" if is_chinese(*texts) else "en"


def units(text: str) -> list[tuple[int, int]]:
    """The start and end of each word, or of each character in a script without spaces."""
    return [found.span() for found in _UNIT.finditer(text)]


def sentences(text: str) -> list[str]:
    """Sentences with their delimiters; a new line or a double space ends one too, for authors without punctuation."""
    return [found for found in _SENTENCE.findall(text) if found.strip()]


def passages(text: str) -> list[str]:
    """`text`, or its sentences gathered into passages of up to 500 characters if it has more than twice as many."""
    if len(text) <= 2 * _PASSAGE:
        return [text]
    found = [""]
    for sentence in _SENTENCE.findall(text):
        for start in range(0, len(sentence), _PASSAGE):
            piece = sentence[start : start + _PASSAGE]
            if found[-1] and len(found[-1]) + len(piece) > _PASSAGE:
                found.append("")
            found[-1] += piece
    return [passage for passage in found if passage.strip()]


def words(text: str, cut: Segmenter) -> list[str]:
    """Lower-case words in the text's order, unspaced scripts cut by `cut`."""
    found = []
    for piece in _PIECE.findall(text.casefold().replace("’", "'")):
        found += cut(piece) if CHARACTER.match(piece) else [piece]
    return found


def segmenter(language: Language) -> tuple[Segmenter, str]:
    """The function that cuts unspaced scripts into words, and its name for the report."""
    if language == "en":
        return bigrams, "words"
    if find_spec("jieba") is None:
        return bigrams, "character bigrams"
    return _jieba(), f"jieba {metadata.version('jieba')}"


def bigrams(piece: str) -> list[str]:
    """Pairs of neighbouring characters in place of words."""
    return [piece[i : i + 2] for i in range(len(piece) - 1)] or [piece]


@cache
def _jieba() -> Segmenter:
    import logging

    import jieba  # pyright: ignore[reportMissingImports]

    jieba.setLogLevel(logging.WARNING)
    tokenizer = jieba.Tokenizer()  # its own, as a program's additions to the shared dictionary would change the counts
    return tokenizer.lcut


# --- lexicon ----------------------------------------------------------------------------------------------------------
# Words and marks that belong to the language and not to a subject: their rates distinguish writers.

# Pronouns, articles, auxiliaries, prepositions, conjunctions and particles of English; the closed classes of Quirk et
# al. 1985, A Comprehensive Grammar of the English Language, with the older forms that novels and plays use.
_ENGLISH = """
    a an the this that these those i me my mine myself we us our ours ourselves you your yours yourself he him his
    himself she her hers herself it its itself they them their theirs themselves thou thee thy thine ye who whom whose
    which what whatever whoever someone something anyone anything everyone everything nobody nothing none one another
    each every either neither both all any some few many much more most other such no not nor and or but yet so if then
    than because since though although unless until till while when where why how whether as at by for from in into of
    off on onto out over per through to toward towards under up upon with within without about above across after
    against along among around before behind below beneath beside between beyond down during except near like am is are
    was were be been being have has had having do does did done doing will would shall should can could may might must
    ought need dare here there now again ever never always often only even too very just still already also perhaps
    quite rather almost well hath doth art wilt shalt tis twas don't can't won't isn't i'm i'll i've i'd you're he's
    it's that's there's let let's oh o ah
"""
ENGLISH = frozenset(_ENGLISH.split())
# Particles, pronouns, prepositions, conjunctions, adverbs and auxiliaries of Chinese that are one character, after the
# function words of Zhu Dexi 1982, 语法讲义, with the literary ones.
CHINESE = frozenset(
    "的地得了着过吗呢吧啊呀嘛哦哎唉嗯么罢啦哪那这我你您他她它们咱谁何在从向往对于把被给让跟和与及或而且但却虽若如则因所以为"
    "之其乃者也矣焉乎哉不没无未别莫非很太更最极都全只就才又再还已曾正将要会能可应该须肯敢是有来去上下里中外前后个些每各某几多少"
    "怎甚到并即便连比像似等"
)
# The 28 words of the stop-word ratio in older reports
_STOP_WORDS = "的 了 在 是 我 有 和 就 不 人 都 一 一个 上 也 很 到 说 要 去 你 会 着 没有 看 好 自己 这"
STOP_WORDS = tuple(_STOP_WORDS.split())
STOP_WORD = re.compile("|".join(sorted(STOP_WORDS, key=len, reverse=True)))

_EMOJI = "\u2600-\u27bf\u2b00-\u2bff\u3299\u3297\U0001f000-\U0001faff"
_MARK = re.compile(
    r"(?P<latin>[A-Za-z\u00c0-\u024f])|(?P<digit>\d)|(?P<blank> {2,}|[\n\r]+)"
    rf"|(?P<emoji>[{_EMOJI}])|(?P<mark>[^\w\s])"
)
NAMED = {"latin": "Latin letters", "digit": "digits", "emoji": "emoji", "blank": "new lines and double spaces"}
REST = "other characters"


def marks(text: str) -> list[str]:
    """Every character's class: a punctuation mark is its own, emoji, digits and Latin letters are one each.

    A run of new lines or spaces counts once, as does a character with its accents.
    """
    found = [NAMED.get(str(match.lastgroup), match[0]) for match in _MARK.finditer(text)]
    return found + [REST] * max(len(text) - len(found), 0)
