"""The parts of a reply that are word for word in the training replies, since memorised style is not style.

Spans of 8 and more tokens count. A common phrase does not: a turn of speech that the author uses in several different
replies is his style, and learning it was the purpose. The search goes through a sorted index of token 8-grams, as in
Carlini et al. 2023 (arXiv 2202.07646) and Lee et al. 2022 (arXiv 2107.06499). A token is a word, or a character of a
script without spaces; marks and capitals make no difference.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from persona.evaluate.intervals import share
from persona.evaluate.results import Copied, Copying, Estimate, Sides, Span
from persona.evaluate.style.words import units
from persona.evaluate.subject import Subject, all_replies

LEAST = 8  # tokens of a span
COMMON = 3  # a span in so many different training texts is a common phrase
LONGEST_PHRASE = 32  # tokens; longer than any turn of speech, so a span beyond it is copied however often it was seen

_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd: Fibonacci hashing, Knuth, The Art of Computer Programming 3, 6.4
_UNKNOWN = -1
_BETWEEN = -2  # before, between and after the texts, so that no span runs out of one


@dataclass(frozen=True)
class CopiedSpan:
    """A copied part of a reply: its characters `start` to `end`, and the training text that has it."""

    start: int
    end: int
    tokens: int
    source: int  # position in the list of training texts


@dataclass(frozen=True)
class CopiedReply:
    """The copies in one reply."""

    tokens: int
    copied: int
    """Tokens that are in `spans`."""
    spans: tuple[CopiedSpan, ...]


@dataclass(frozen=True)
class TrainingIndex:
    """The places of every 8-gram in the different training texts."""

    ids: dict[str, int]
    stream: np.ndarray  # (all tokens,), the different texts one after the other
    source: np.ndarray  # (all tokens,), position in the list of texts
    hashes: np.ndarray  # (grams,), sorted
    places: np.ndarray  # (grams,), into `stream`
    elsewhere: np.ndarray  # hashes of the 8-grams of other texts


def index_training(texts: Sequence[str], elsewhere: Sequence[str]) -> TrainingIndex:
    """An index of `texts`, the replies trained on; spans that `elsewhere` (the base's replies) has too are common."""
    ids: dict[str, int] = {}
    stream, source = [_BETWEEN], [_BETWEEN]
    seen: set[tuple[int, ...]] = set()
    for number, text in enumerate(texts):
        numbers = tuple(ids.setdefault(word, len(ids)) for word, _, _ in _tokens(text))
        if numbers in seen:  # weighting repeats records, which makes no common phrase of their words
            continue
        seen.add(numbers)
        stream += [*numbers, _BETWEEN]
        source += [number] * len(numbers) + [_BETWEEN]
    known = np.array(stream, np.int64)
    hashes, places = _grams(known)
    order = np.argsort(hashes, kind="stable")
    others = [_grams(_numbers(_tokens(text), ids))[0] for text in elsewhere]
    common = np.unique(np.concatenate([np.zeros(0, np.uint64), *others]))
    return TrainingIndex(ids, known, np.array(source), hashes[order], places[order], common)


def copied_spans(reply: str, index: TrainingIndex) -> CopiedReply:
    """The spans of `reply` that were copied from the training texts of `index`, its common phrases left out."""
    tokens = _tokens(reply)
    numbers = _numbers(tokens, index.ids)
    hashes, starts = _grams(numbers)
    first, last = (np.searchsorted(index.hashes, hashes, side) for side in ("left", "right"))
    phrase = np.zeros(len(tokens), bool)  # tokens that belong to a common phrase
    foreign = np.zeros(len(tokens), bool)  # tokens that other texts have too
    for start, low, high, known in zip(starts, first, last, np.isin(hashes, index.elsewhere), strict=True):
        several = high - low >= COMMON and len(np.unique(index.source[index.places[low:high]])) >= COMMON
        phrase[start : start + LEAST] |= bool(several or known)
        foreign[start : start + LEAST] |= bool(known)
    ranges = dict(zip(starts.tolist(), zip(first.tolist(), last.tolist(), strict=True), strict=True))
    spans: list[CopiedSpan] = []
    covered = np.zeros(len(tokens), bool)
    position = 0
    while position < len(tokens):
        low, high = ranges.get(position, (0, 0))
        match = _longest(index, numbers, position, index.places[low:high])
        position += 1
        if match:
            start, end, place = match
            position = end - LEAST + 1  # the first 8-gram that reaches beyond this match
            if (~phrase[start:end]).sum() >= LEAST or (~foreign[start:end]).sum() > LONGEST_PHRASE:
                covered[start:end] = True
                spans.append(CopiedSpan(tokens[start][1], tokens[end - 1][2], end - start, int(index.source[place])))
    return CopiedReply(len(tokens), int(covered.sum()), tuple(spans))


def _tokens(text: str) -> list[tuple[str, int, int]]:
    """Each token with its characters' start and end."""
    return [(text[start:end].casefold(), start, end) for start, end in units(text)]


def _numbers(tokens: Sequence[tuple[str, int, int]], ids: dict[str, int]) -> np.ndarray:
    return np.array([ids.get(word, _UNKNOWN) for word, _, _ in tokens], np.int64)


def _grams(numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The hashes of the 8-grams whose tokens are all known, and where they begin."""
    count = max(len(numbers) - LEAST + 1, 0)
    hashes = np.zeros(count, np.uint64)
    known = np.ones(count, bool)
    for offset in range(LEAST):
        column = numbers[offset : offset + count]
        hashes = (hashes + column.astype(np.uint64) + np.uint64(1)) * _MULTIPLIER
        hashes ^= hashes >> np.uint64(29)
        known &= column >= 0
    return hashes[known], np.flatnonzero(known)


def _longest(index: TrainingIndex, numbers: np.ndarray, start: int, places: np.ndarray) -> tuple[int, int, int] | None:
    """The longest match through the 8-gram at `start`: first token, end, place in the stream (the earliest)."""
    length = 0
    while len(places) and start + length < len(numbers):
        going_on = places[index.stream[places + length] == numbers[start + length]]
        if not len(going_on):
            break
        places = going_on
        length += 1
    if length < LEAST:
        return None
    place, end = int(places.min()), start + length
    while start and numbers[start - 1] == index.stream[place - 1]:
        start, place = start - 1, place - 1
    return start, end, place


# --- of a whole evaluation --------------------------------------------------------------------------------------------


def copied(subject: Subject, texts: Sides[list[str]]) -> tuple[Copying, list[tuple[Span, ...]]] | None:
    """The copies of both sides, and the spans of each tuned reply; None if the training data is not here."""
    if not subject.trained:
        return None
    sources = [
        (reply, f"{record.meta.get('source', 'training')} {record.meta.get('group', number)}")
        for number, record in enumerate(subject.trained, 1)
        for reply in record.replies
    ]
    index = index_training([text for text, _ in sources], texts.base or [])

    def figures(replies: Sequence[str], copies: Sequence[CopiedReply]) -> Copied:
        spans = [(span, reply) for reply, one in zip(replies, copies, strict=True) for span in one.spans]
        share = _share(copies, subject.config.seed)
        if not spans:
            return Copied(share, 0, "", "")
        longest, reply = max(spans, key=lambda pair: pair[0].tokens)
        return Copied(share, longest.tokens, reply[longest.start : longest.end], sources[longest.source][1])

    copies = texts.each(lambda side: [copied_spans(reply, index) for reply in side])
    own = [copied_spans(reply, index) for reply in all_replies(subject.held_out.records)]
    base = figures(texts.base, copies.base) if texts.base is not None and copies.base is not None else None
    marked = [tuple(Span(span.start, span.end, sources[span.source][1]) for span in one.spans) for one in copies.tuned]
    author = sum(one.copied for one in own) / max(sum(one.tokens for one in own), 1)
    return Copying(author, Sides(figures(texts.tuned, copies.tuned), base)), marked


def _share(copies: Sequence[CopiedReply], seed: int) -> Estimate:
    spoken = [one for one in copies if one.tokens]
    if not spoken:
        return Estimate(0.0)
    return share([one.copied for one in spoken], [one.tokens for one in spoken], seed)
