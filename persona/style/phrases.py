"""Catch-phrases: the turns of speech that tell the author from the base, and how often each of the three uses them."""

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from persona.style.results import Phrase
from persona.style.units import units

Gram = tuple[str, ...]
Runs = list[list[str]]  # the words between two marks; no phrase runs across a mark

_LONGEST = {"en": 5, "zh": 8}  # words or characters of a phrase
_SHORTEST = {"en": 1, "zh": 2}  # one character is seldom a word
_TIMES = 3  # that the author says it, in as many different texts: what stands in one text is its subject
_SURE = 1.96  # the z-score beyond which the log-odds differ from zero at 95 %
_PHRASES = 20
_MARK = re.compile(r"[^\w\s']+|[\r\n]+")
_PRIOR = 500.0  # words that the prior weighs; Monroe et al. take the size of a text, which would drift with its length


def log_odds(first: Counter[Gram], second: Counter[Gram]) -> dict[Gram, float]:
    """The z-score of each feature's log-odds in `first` against `second`, with the informative Dirichlet prior.

    Monroe, Colaresi and Quinn 2008, Fightin' Words, equations 16, 19, 22; the prior has the shape of both together.
    """
    both = first + second
    words = both.total()
    sides = ((first, first.total(), 1), (second, second.total(), -1))
    found = {}
    for name, count in both.items():
        share = _PRIOR * count / words
        odds = variance = 0.0
        for counts, total, sign in sides:
            inside = counts[name] + share
            odds += sign * math.log(inside / (total + _PRIOR - inside))
            variance += 1 / inside
        found[name] = odds / math.sqrt(variance)
    return found


def catch_phrases(sets: Mapping[str, Sequence[str]], language: str) -> tuple[Phrase, ...]:
    """The author's phrases by z-score, each with its rate per 1,000 words, or characters of Chinese, in each set.

    A phrase that is hardly ever said but as part of a longer one is left out.
    """
    runs = {name: [_runs(text) for text in texts] for name, texts in sets.items()}
    counted = {name: Counter(gram for text in texts for gram in _grams(text, language)) for name, texts in runs.items()}
    spread = Counter(gram for text in runs["author"] for gram in set(_grams(text, language)))
    author, base = counted["author"], counted["base"]
    scores: dict[Gram, float] = {}
    for length in range(_SHORTEST[language], _LONGEST[language] + 1):
        mine, theirs = (Counter({g: k for g, k in counts.items() if len(g) == length}) for counts in (author, base))
        scores |= {gram: z for gram, z in log_odds(mine, theirs).items() if z > _SURE and spread[gram] >= _TIMES}
    chosen: list[Gram] = []
    for gram in sorted(scores, key=lambda gram: (-len(gram), -scores[gram], gram)):
        within = sum(author[other] for other in chosen if _contains(other, gram))
        if author[gram] > 1.25 * within:
            chosen.append(gram)
    words = {name: sum(len(run) for text in texts for run in text) for name, texts in runs.items()}
    best = sorted(chosen, key=lambda gram: (-scores[gram], gram))[:_PHRASES]
    return tuple(
        Phrase(
            ("" if language == "zh" else " ").join(gram),
            scores[gram],
            1000 * author[gram] / words["author"],
            *(1000 * counted[name][gram] / words[name] if words.get(name) else None for name in ("base", "tuned")),
        )
        for gram in best
    )


def _runs(text: str) -> Runs:
    found = []
    for part in _MARK.split(text.casefold().replace("’", "'")):
        run = [part[start:end] for start, end in units(part)]
        found += [run] if run else []
    return found


def _grams(runs: Runs, language: str) -> Iterator[Gram]:
    for length in range(_SHORTEST[language], _LONGEST[language] + 1):
        for run in runs:
            yield from (tuple(run[start : start + length]) for start in range(len(run) - length + 1))


def _contains(longer: Gram, gram: Gram) -> bool:
    return any(longer[start : start + len(gram)] == gram for start in range(len(longer) - len(gram) + 1))
