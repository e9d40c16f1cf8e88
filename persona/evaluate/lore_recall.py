"""Whether a model remembers the lore: which key facts are in its answers to questions about its world."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from persona.evaluate.intervals import mean
from persona.evaluate.results import Answer, Estimate, Question, Recall, Sides
from persona.evaluate.style.words import UNSPACED, language, segmenter, words
from persona.records import Record

QUESTION = "lore_qa"
FACTS = 3  # taken from a reference where no keywords are given
OFTEN = 0.2  # share of the texts from which on a name, such as in a catch-phrase, is no fact; a quarter of it for words
_UNSPACED = re.compile(f"[{UNSPACED}]+")
_NAME = re.compile(r"(?<![.!?…”\"'’])(?<=[^.!?…\"“\s])[ ,]+((?:(?!I['’])[A-Z][\w'’-]+)(?: [A-Z][\w'’-]+)*)")


@dataclass(frozen=True)
class Asked:
    """A question about the lore, what was answered in the data, and which facts a good answer names."""

    question: str
    reference: str
    facts: tuple[str, ...]
    trained: bool
    given: bool
    """Whether the facts are keywords of the record's own."""


def questions(records: Iterable[tuple[Record, bool]], texts: Sequence[str]) -> list[Asked]:
    """The questions among `records`, each with whether it was trained on; every question once, in their order.

    `texts` are all replies of the data, from which `Terms` learns what a fact is where no keywords are given.
    """
    terms = Terms(texts)
    found: dict[str, Asked] = {}
    for record, trained in records:
        if record.meta.get("type") != QUESTION:
            continue
        question, reference = record.turns[0]["content"], record.turns[1]["content"]
        keywords = record.meta.get("keywords")
        given = isinstance(keywords, list) and bool(keywords) and all(isinstance(word, str) for word in keywords)
        facts = tuple(keywords) if given and keywords else terms.facts(question, reference)
        if facts:
            found.setdefault(question, Asked(question, reference, facts, trained, given))
    return list(found.values())


class Terms:
    """Which words of an answer are facts, judged by all `texts` of the persona: what comes back in some of them belongs
    to its world; what is in many of them is its way of speaking."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = [text.casefold() for text in texts]
        self.cut, _ = segmenter("bigrams")  # the same facts with jieba and without
        self.have = Counter(word for text in texts for word in set(words(text, self.cut)))

    def facts(self, question: str, reference: str) -> tuple[str, ...]:
        """Up to three distinctive terms of `reference` that `question` does not name: names, then what comes first."""
        if language([reference]) == "zh":
            return self._strings(question, reference)
        asked = set(words(question, self.cut))
        names = [
            name
            for name in dict.fromkeys(re.sub("['’]s$", "", found) for found in _NAME.findall(reference))
            if not asked & set(words(name, self.cut)) and self._seldom(self._number(name), OFTEN)
        ]
        covered = asked | {word for name in names for word in words(name, self.cut)}
        rest = [
            word
            for word in dict.fromkeys(words(reference, self.cut))
            if word not in covered and _is_content(word) and self._seldom(self.have[word], OFTEN / 4)
        ]
        rest.sort(key=lambda word: self.have[word] < 2)  # stable: those that come back, then the others
        return tuple([*names, *rest][:FACTS])

    def _strings(self, question: str, reference: str) -> tuple[str, ...]:
        """Without spaces between words, what stands in other texts too is a word: the longest such strings."""
        found: list[str] = []
        for run in _UNSPACED.finditer(reference):
            start = 0
            while start < len(run[0]) - 1:
                pieces = [run[0][start:end] for end in range(start + 2, min(start + 8, len(run[0])) + 1)]
                counts = {piece: sum(piece in text for text in self.texts) for piece in pieces}
                seldom = {piece for piece, count in counts.items() if self._seldom(count, OFTEN / 4)}
                fits = [piece for piece in pieces if counts[piece] > 1 and piece in seldom and piece not in question]
                phrase = [piece for piece in pieces if len(piece) > 2 and piece not in seldom]
                longest = max(phrase or fits, key=len, default="")
                if longest and not phrase:
                    found.append(longest)
                start += max(len(longest), 1)
        return tuple(sorted(dict.fromkeys(found), key=lambda piece: -len(piece)))[:FACTS]

    def _number(self, term: str) -> int:
        return min((self.have[word] for word in words(term, self.cut)), default=0)

    def _seldom(self, count: int, share: float) -> bool:
        return count <= max(2, share * len(self.texts))


def _is_content(word: str) -> bool:
    return word.isdigit() or (len(word) > 3 and "'" not in word)  # he's, i'll


def found_in(reply: str, facts: Sequence[str]) -> tuple[str, ...]:
    """Those of `facts` that `reply` names; a word of Latin letters or a number as a whole word, in any case."""
    folded = reply.casefold().replace("’", "'")
    letter = rf"(?![{UNSPACED}])\w"  # 1984 in 1984年 is a whole number

    def stands(fact: str) -> bool:
        wanted = fact.casefold().replace("’", "'").strip()
        left = rf"(?<!{letter})" if wanted[:1].isascii() else ""
        right = rf"(?!{letter})" if wanted[-1:].isascii() else ""
        return bool(wanted) and re.search(left + re.escape(wanted) + right, folded) is not None

    return tuple(fact for fact in facts if stands(fact))


def recall_of(asked: Sequence[Asked], with_system: Sides[list[str]], without: Sides[list[str]], seed: int) -> Recall:
    """The share of the facts in the answers of each side, asked with the system prompt and without it."""

    def answers(side: Sequence[str]) -> list[Answer]:
        return [Answer(text, found_in(text, one.facts)) for one, text in zip(asked, side, strict=True)]

    def share(side: Sequence[Answer]) -> Estimate:
        pairs = zip(side, asked, strict=True)
        return mean([len(answer.found) / len(one.facts) for answer, one in pairs], seed)

    prompted, plain = with_system.each(answers), without.each(answers)
    entries = []
    for number, one in enumerate(asked):
        with_it, without_it = (sides.each(lambda side, at=number: side[at]) for sides in (prompted, plain))
        entries.append(Question(one.question, one.reference, one.facts, with_it, without_it, one.trained))
    return Recall(prompted.each(share), plain.each(share), tuple(entries), all(one.given for one in asked))
