"""Which parts of a reply stand word for word in the training replies, and where: style that is memorised is no style.

Spans of 8 and more tokens count. A common phrase does not: a turn of speech that the author uses in several different
replies is his style, and to say it again is what was to be learned. It is searched through an index of token 8-grams,
as in Carlini et al. 2023 (arXiv 2202.07646) and Lee et al. 2022 (arXiv 2107.06499), sorted by hash.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from persona.evaluate.intervals import share
from persona.evaluate.measures import all_replies
from persona.evaluate.results import Copying, Estimate, Sides, Span
from persona.evaluate.style.words import units
from persona.evaluate.subject import Subject

Tokenize = Callable[[str], Sequence[tuple[int, int]]]

LEAST = 8  # tokens of a span
COMMON = 3  # different training texts that make a span a common phrase
LONGEST_PHRASE = 32  # tokens; longer than any turn of speech, so a span beyond it is copied however often it was seen

_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd: Fibonacci hashing, Knuth, The Art of Computer Programming 3, 6.4
_UNKNOWN = -1
_BETWEEN = -2  # stands before, between and after the texts, so that no span runs out of one


@dataclass(frozen=True)
class CopiedSpan:
    """A copied part of a reply: its characters `start` to `end`, and the training text that has it."""

    start: int
    end: int
    tokens: int
    text: str
    source: int  # position in the list of training texts
    source_start: int
    source_end: int


@dataclass(frozen=True)
class CopiesOfReply:
    """What of one reply is copied: share of its tokens (None: it has none), spans in order, and the longest of them."""

    tokens: int
    copied_tokens: int
    share: float | None
    spans: tuple[CopiedSpan, ...]
    longest: CopiedSpan | None


@dataclass(frozen=True)
class TrainingIndex:
    """Where every 8-gram of the different training texts stands."""

    tokenize: Tokenize
    texts: tuple[str, ...]
    ids: dict[str, int]
    stream: np.ndarray  # (all tokens,), the different texts one after the other
    source: np.ndarray  # (all tokens,), position in the list of texts
    begins: dict[int, int]  # where a text begins in `stream`
    hashes: np.ndarray  # (grams,), sorted
    places: np.ndarray  # (grams,), into `stream`
    elsewhere: np.ndarray  # hashes of the 8-grams of other texts


def index_training(texts: Sequence[str], tokenize: Tokenize = units, elsewhere: Sequence[str] = ()) -> TrainingIndex:
    """An index of `texts`, the replies trained on; what `elsewhere` has too, such as the base's replies, is common.

    `tokenize` gives the characters of each token, as a fast tokenizer's `offset_mapping` does; without it a token is a
    word, or a character of a script without spaces, so that marks and capitals make no difference.
    """
    ids: dict[str, int] = {}
    stream, source = [_BETWEEN], [_BETWEEN]
    begins: dict[int, int] = {}
    seen: set[tuple[int, ...]] = set()
    for number, text in enumerate(texts):
        numbers = tuple(ids.setdefault(word, len(ids)) for word, _, _ in _tokens(text, tokenize))
        if numbers in seen:  # weighting repeats records, which makes no common phrase of their words
            continue
        seen.add(numbers)
        begins[number] = len(stream)
        stream += [*numbers, _BETWEEN]
        source += [number] * len(numbers) + [_BETWEEN]
    known = np.array(stream, np.int64)
    hashes, places = _grams(known)
    order = np.argsort(hashes, kind="stable")
    others = [_grams(_numbers(_tokens(text, tokenize), ids))[0] for text in elsewhere]
    common = np.unique(np.concatenate([np.zeros(0, np.uint64), *others]))
    return TrainingIndex(
        tokenize, tuple(texts), ids, known, np.array(source), begins, hashes[order], places[order], common
    )


def copied_spans(reply: str, index: TrainingIndex) -> CopiesOfReply:
    """The spans of `reply` that were copied from the training texts of `index`, its common phrases left out."""
    tokens = _tokens(reply, index.tokenize)
    numbers = _numbers(tokens, index.ids)
    hashes, starts = _grams(numbers)
    first, last = (np.searchsorted(index.hashes, hashes, side) for side in ("left", "right"))
    phrase = np.zeros(len(tokens), bool)  # tokens that belong to a common phrase
    foreign = np.zeros(len(tokens), bool)  # tokens that stand elsewhere too
    for start, low, high, known in zip(starts, first, last, np.isin(hashes, index.elsewhere), strict=True):
        several = high - low >= COMMON and len(np.unique(index.source[index.places[low:high]])) >= COMMON
        phrase[start : start + LEAST] |= bool(several or known)
        foreign[start : start + LEAST] |= bool(known)
    found = dict(zip(starts.tolist(), zip(first.tolist(), last.tolist(), strict=True), strict=True))
    spans: list[CopiedSpan] = []
    covered = np.zeros(len(tokens), bool)
    position = 0
    while position < len(tokens):
        low, high = found.get(position, (0, 0))
        match = _longest(index, numbers, position, index.places[low:high])
        position += 1
        if match:
            start, end, place = match
            position = end - LEAST + 1  # the first 8-gram that reaches beyond this match
            if (~phrase[start:end]).sum() >= LEAST or (~foreign[start:end]).sum() > LONGEST_PHRASE:
                covered[start:end] = True
                spans.append(_span(reply, tokens, index, start, end, place))
    copied = int(covered.sum())
    share = copied / len(tokens) if tokens else None
    return CopiesOfReply(
        len(tokens), copied, share, tuple(spans), max(spans, key=lambda span: span.tokens, default=None)
    )


def _tokens(text: str, tokenize: Tokenize) -> list[tuple[str, int, int]]:
    """Each token's text and characters; tokens of the bytes of one character count once, empty ones not at all."""
    found = []
    reached = 0
    for start, end in tokenize(text):
        word = text[start:end].strip().casefold()
        if word and start >= reached:
            found.append((word, start, end))
            reached = end
    return found


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


def _span(
    reply: str, tokens: Sequence[tuple[str, int, int]], index: TrainingIndex, start: int, end: int, place: int
) -> CopiedSpan:
    source = int(index.source[place])
    at = place - index.begins[source]
    original = _tokens(index.texts[source], index.tokenize)[at : at + end - start]
    first, last = tokens[start][1], tokens[end - 1][2]
    return CopiedSpan(first, last, end - start, reply[first:last], source, original[0][1], original[-1][2])


@dataclass(frozen=True)
class Copied:
    """What was copied, and where in each reply."""

    figures: Sides[Copying]
    spans: list[tuple[Span, ...]]
    """Of the tuned side's replies."""
    share: Estimate
    """Of the tuned side's tokens, with its interval over replies."""
    by_author: float
    """The same of the author's own held-out replies: what he repeats himself is his style."""


def copied(subject: Subject, texts: Sides[list[str]]) -> Copied | None:
    """What of the replies stands in the training data; None where that is not here."""
    if not subject.trained:
        return None
    sources = [
        (reply, f"{record.meta.get('source', 'training')} {record.meta.get('group', number)}")
        for number, record in enumerate(subject.trained, 1)
        for reply in record.replies
    ]
    index = index_training([text for text, _ in sources], elsewhere=texts.base or [])
    found = texts.each(lambda side: [copied_spans(reply, index) for reply in side])
    own = [copied_spans(reply, index) for reply in all_replies(subject.held_out.records)]
    marked = [tuple(Span(s.start, s.end, sources[s.source][1]) for s in one.spans) for one in found.tuned]
    said = [one for one in found.tuned if one.tokens]
    parts, wholes = ([getattr(one, name) for one in said] for name in ("copied_tokens", "tokens"))
    of_all = share(parts, wholes, subject.config.seed) if said else Estimate(0.0)
    return Copied(found.each(lambda side: _copying(side, sources)), marked, of_all, _share(own))


def _share(found: Sequence[CopiesOfReply]) -> float:
    return sum(one.copied_tokens for one in found) / max(sum(one.tokens for one in found), 1)


def _copying(found: Sequence[CopiesOfReply], sources: Sequence[tuple[str, str]]) -> Copying:
    spans = [one.longest for one in found if one.longest is not None]
    longest = max(spans, key=lambda span: span.tokens, default=None)
    if longest is None:
        return Copying(_share(found), 0, "", "")
    return Copying(_share(found), longest.tokens, longest.text, sources[longest.source][1])
