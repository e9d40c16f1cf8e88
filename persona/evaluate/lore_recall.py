"""Memory of the lore: the key facts in a model's answers to questions about its character's world."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from persona.evaluate.intervals import share
from persona.evaluate.loaded import Loaded
from persona.evaluate.results import Answer, Estimate, Question, Recall, Sides
from persona.evaluate.style.words import bigrams, words
from persona.evaluate.subject import all_replies
from persona.model.render import Message
from persona.records import UNSPACED, Record, is_chinese, rank
from persona.speak.choices import greedy

QUESTION = "lore_qa"
FACTS = 3  # taken from a reference without keywords
OFTEN = 0.2  # share of the texts from which on a name, such as in a catch-phrase, is no fact; a quarter of it for words
_UNSPACED = re.compile(f"[{UNSPACED}]+")
_NAME = re.compile(r"(?<![.!?…”\"'’])(?<=[^.!?…\"“\s])[ ,]+((?:(?!I['’])[A-Z][\w'’-]+)(?: [A-Z][\w'’-]+)*)")


@dataclass(frozen=True)
class Asked:
    """A question about the lore, its answer in the data, and the facts that a good answer names."""

    question: str
    reference: str
    facts: tuple[str, ...]
    trained: bool
    given: bool
    """Whether the facts are the record's own keywords."""


def questions(records: Iterable[tuple[Record, bool]], texts: Sequence[str]) -> list[Asked]:
    """The questions among `records`, each once and in their order; a record comes with whether it was trained on.

    `texts` are all replies of the data; without keywords, `Terms` finds the facts of a reference by them.
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
    """Finds the facts in an answer, by all `texts` of the persona: words that some of them share belong to its world,
    words that many of them share are its way of speaking."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = [text.casefold() for text in texts]
        # bigrams, so that the facts are the same with jieba and without
        self.have = Counter(word for text in texts for word in set(words(text, bigrams)))

    def facts(self, question: str, reference: str) -> tuple[str, ...]:
        """Up to three distinctive terms of `reference` that `question` does not name: names, then the first words."""
        if is_chinese(reference):
            return self._strings(question, reference)
        asked = set(words(question, bigrams))
        names = [
            name
            for name in dict.fromkeys(re.sub("['’]s$", "", found) for found in _NAME.findall(reference))
            if not asked & set(words(name, bigrams)) and self._seldom(self._number(name), OFTEN)
        ]
        covered = asked | {word for name in names for word in words(name, bigrams)}
        rest = [
            word
            for word in dict.fromkeys(words(reference, bigrams))
            if word not in covered and _is_content(word) and self._seldom(self.have[word], OFTEN / 4)
        ]
        rest.sort(key=lambda word: self.have[word] < 2)  # stable: those that come back, then the others
        return tuple([*names, *rest][:FACTS])

    def _strings(self, question: str, reference: str) -> tuple[str, ...]:
        """The longest strings that other texts have too: without spaces, that is how a word is known."""
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
        return min((self.have[word] for word in words(term, bigrams)), default=0)

    def _seldom(self, count: int, share: float) -> bool:
        return count <= max(2, share * len(self.texts))


def _is_content(word: str) -> bool:
    return word.isdigit() or (len(word) > 3 and "'" not in word)  # he's, i'll


def found_in(reply: str, facts: Sequence[str]) -> tuple[str, ...]:
    """Those of `facts` that `reply` names, in upper or lower case; Latin letters and numbers only as whole words."""
    folded = reply.casefold().replace("’", "'")
    letter = rf"(?![{UNSPACED}])\w"  # 1984 in 1984年 is a whole number

    def named(fact: str) -> bool:
        wanted = fact.casefold().replace("’", "'").strip()
        left = rf"(?<!{letter})" if wanted[:1].isascii() else ""
        right = rf"(?!{letter})" if wanted[-1:].isascii() else ""
        return bool(wanted) and re.search(left + re.escape(wanted) + right, folded) is not None

    return tuple(fact for fact in facts if named(fact))


def remembered(loaded: Loaded, limit: int | None) -> Recall | None:
    """The answers to the questions about the lore, with the system prompt and without it; None without questions."""
    subject = loaded.subject
    held_out, seed = subject.held_out, subject.config.seed
    records = [(record, False) for record in held_out.records] + [(record, True) for record in subject.trained]
    asked = questions(records, all_replies([record for record, _ in records]))
    asked = sorted(asked, key=lambda one: rank(seed, one.question))[:limit] if limit is not None else asked
    if not asked:
        return None
    decoding = greedy(_room(loaded, [one.reference for one in asked]))

    def ask(system: str | None, step: str) -> Sides[list[str]]:
        first: list[Message] = [{"role": "system", "content": system}] if system else []
        prompts = [[*first, {"role": "user", "content": one.question}] for one in asked]
        return loaded.replies(prompts, decoding, step).each(lambda side: [reply.text for reply in side])

    with_system = ask(held_out.system, "lore, with the system prompt")
    return recall_of(asked, with_system, ask(None, "lore, without it"), seed)


def _room(loaded: Loaded, references: Sequence[str]) -> int:
    """Tokens for an answer: twice the longest reference, so that a side that rambles does not take all the time."""
    tokenizer = loaded.speaker.fmt.tokenizer
    longest = max(len(tokenizer.encode(text, add_special_tokens=False)) for text in references)
    return min(2 * longest, loaded.subject.config.generation.max_new_tokens)


def recall_of(asked: Sequence[Asked], with_system: Sides[list[str]], without: Sides[list[str]], seed: int) -> Recall:
    """The share of the facts in each side's answers, with the system prompt and without it."""

    def answers(side: Sequence[str]) -> list[Answer]:
        return [Answer(text, found_in(text, one.facts)) for one, text in zip(asked, side, strict=True)]

    def mean(side: Sequence[Answer]) -> Estimate:
        shares = [len(answer.found) / len(one.facts) for answer, one in zip(side, asked, strict=True)]
        return share(shares, [1.0] * len(shares), seed)

    prompted, plain = with_system.each(answers), without.each(answers)
    entries = []
    for number, one in enumerate(asked):
        with_it, without_it = (sides.each(lambda side, at=number: side[at]) for sides in (prompted, plain))
        entries.append(Question(one.question, one.reference, one.facts, with_it, without_it, one.trained))
    return Recall(prompted.each(mean), plain.each(mean), tuple(entries), all(one.given for one in asked))
