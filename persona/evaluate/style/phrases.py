"""Catch-phrases: the turns of speech that distinguish the author from the base, with their rate in each set."""

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from persona.evaluate.results import Estimate, Level, Phrase
from persona.evaluate.style.counting import by_side
from persona.evaluate.style.words import units

Gram = tuple[str, ...]
Runs = list[list[str]]  # the words between two marks; no phrase runs across a mark

_LONGEST = {"en": 5, "zh": 8}  # words or characters of a phrase
_SHORTEST = {"en": 1, "zh": 2}  # one character is seldom a word
_TIMES = 3  # different texts of the author that have the phrase: words of one text only are its subject
_SURE = 1.96  # the z-score beyond which the log-odds differ from zero at 95 %
_PHRASES = 20
_MARK = re.compile(r"[^\w\s']+|[\r\n]+")
_PRIOR = 500.0  # words that the prior weighs; Monroe et al. take the size of a text, which would drift with its length


def log_odds(first: Counter[Gram], second: Counter[Gram]) -> dict[Gram, float]:
    """The z-score of the log-odds of each feature in `first` against `second`, with the informative Dirichlet prior.

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
    """The author's phrases by z-score, each with its rate per 1,000 words (characters for Chinese) in each set.

    They are told from the base's, or from the tuned side's if there is no base. A phrase that hardly ever occurs
    outside a longer one is left out.
    """
    runs = {name: [_runs(text) for text in texts] for name, texts in sets.items()}
    counted = {name: Counter(gram for text in texts for gram in _grams(text, language)) for name, texts in runs.items()}
    spread = Counter(gram for text in runs["author"] for gram in set(_grams(text, language)))
    author, other = counted["author"], counted["base" if "base" in counted else "tuned"]
    scores: dict[Gram, float] = {}
    for length in range(_SHORTEST[language], _LONGEST[language] + 1):
        mine, theirs = (Counter({g: k for g, k in counts.items() if len(g) == length}) for counts in (author, other))
        scores |= {gram: z for gram, z in log_odds(mine, theirs).items() if z > _SURE and spread[gram] >= _TIMES}
    chosen: list[Gram] = []
    for gram in sorted(scores, key=lambda gram: (-len(gram), -scores[gram], gram)):
        within = sum(author[longer] for longer in chosen if _contains(longer, gram))
        if author[gram] > 1.25 * within:
            chosen.append(gram)
    words = {name: sum(len(run) for text in texts for run in text) for name, texts in runs.items()}
    space = "" if language == "zh" else " "

    def rates(gram: Gram) -> dict[str, float]:
        return {name: 1000 * counts[gram] / words[name] for name, counts in counted.items() if words[name]}

    best = sorted(chosen, key=lambda gram: (-scores[gram], gram))[:_PHRASES]
    found = [(space.join(gram), rates(gram)) for gram in best]
    return tuple(Phrase(text, each["author"], by_side(each)) for text, each in found if "tuned" in each)


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


# --- diversity --------------------------------------------------------------------------------------------------------
# How much texts vary: each measure over the same number of words, since all of them fall or rise with length.


_WINDOW = 50  # words of the moving average; the shortest for which Covington and McFall give figures
_WORDS = 2000  # compared at most; more changes nothing but the time
_TEXTS = 40  # whose self-BLEU is computed at most; time grows with the square
_DRAWS = 20  # random orders of the texts; the interval is over them

Words = list[str]


def distinct(words: Words, order: int) -> float:
    """Different n-grams among all n-grams: distinct-1 and distinct-2 of Li et al. 2016 (arXiv 1510.03055)."""
    grams = list(zip(*(words[start:] for start in range(order)), strict=False))
    return len(set(grams)) / len(grams)


def moving_type_token_ratio(words: Words, window: int) -> float:
    """The mean of different words among the words of each window (MATTR; Covington and McFall 2010)."""
    within = Counter(words[:window])
    total = len(within)
    for old, new in zip(words, words[window:], strict=False):
        within[new] += 1
        within[old] -= 1
        if not within[old]:
            del within[old]
        total += len(within)
    return total / (max(len(words) - window, 0) + 1) / min(window, len(words))


def self_bleu(texts: Sequence[Words]) -> float:
    """BLEU-4 of every text against all others of its set, over the whole set: 0 = nothing in common, 1 = all alike.

    Self-BLEU is that of Zhu et al. 2018 (arXiv 1802.01886); the counts are those of Papineni et al. 2002, summed over
    the texts as they do, so no smoothing is needed. Without a single 4-gram in common it is 0.
    """
    counts = [[Counter(zip(*(t[i:] for i in range(n)), strict=False)) for n in range(1, 5)] for t in texts]
    tops = [_two_highest([count[n] for count in counts]) for n in range(4)]
    matched, possible = [0] * 4, [0] * 4
    length = closest = 0
    for at, text in enumerate(texts):
        for n in range(4):
            possible[n] += counts[at][n].total()
            for gram, times in counts[at][n].items():
                first, second = tops[n][gram]
                matched[n] += min(times, second if times == first else first)
        length += len(text)
        rest = [len(other) for number, other in enumerate(texts) if number != at]
        closest += min(rest, key=lambda other: (abs(other - len(text)), other))
    if not all(matched):
        return 0.0
    precision = math.exp(sum(math.log(m / p) for m, p in zip(matched, possible, strict=True)) / 4)
    return precision * min(1.0, math.exp(1 - closest / length))


def _two_highest(counts: Sequence[Counter[tuple[str, ...]]]) -> dict[tuple[str, ...], tuple[int, int]]:
    """The two highest counts of an n-gram in one text; for the text with the first, the second is the others' most."""
    found: dict[tuple[str, ...], tuple[int, int]] = {}
    for count in counts:
        for gram, times in count.items():
            first, second = found.get(gram, (0, 0))
            found[gram] = (times, first) if times > first else (first, max(second, times))
    return found


def diversity(sets: Mapping[str, Sequence[Words]], generator: np.random.Generator) -> tuple[Level, ...]:
    """The four measures of each set, over equally many words and equally many texts, in random orders."""
    sets = {name: [text for text in texts if text] for name, texts in sets.items()}
    usable = {name: texts for name, texts in sets.items() if sum(map(len, texts)) >= _WINDOW}
    length = min([_WORDS, *(sum(map(len, texts)) for texts in usable.values())])
    several = {name: texts for name, texts in sets.items() if len(texts) > 1}
    number = min([_TEXTS, *(len(texts) for texts in several.values())])
    found: dict[str, dict[str, Estimate]] = {name: {} for name, _ in _MEASURES}
    for name in sets:
        values: dict[str, list[float]] = {measure: [] for measure, _ in _MEASURES}
        for _ in range(_DRAWS if name in usable else 0):
            words = _first(usable[name], generator, length)
            values["distinct-1"].append(distinct(words, 1))
            values["distinct-2"].append(distinct(words, 2))
            values["moving-average type-token ratio"].append(moving_type_token_ratio(words, _WINDOW))
        for _ in range(_DRAWS // 4 if name in several else 0):
            chosen = generator.permutation(len(several[name]))[:number]
            values["self-BLEU"].append(100 * self_bleu([several[name][at] for at in chosen]))
        for measure, each in values.items():
            found[measure][name] = _mean(each) if each else Estimate(None, reason=f"{name}: too little text")
    return tuple(
        Level(name, unit.format(words=length, texts=number), found[name]["author"], by_side(found[name]))
        for name, unit in _MEASURES
    )


_MEASURES = (
    ("distinct-1", "different words among all words, of {words} words"),
    ("distinct-2", "different pairs of words, of {words} words"),
    ("moving-average type-token ratio", f"different words in {_WINDOW}, of {{words}} words"),
    ("self-BLEU", "0 to 100, likeness of {texts} texts to each other"),
)


def _first(texts: Sequence[Words], generator: np.random.Generator, length: int) -> list[str]:
    words: list[str] = []
    for at in generator.permutation(len(texts)):
        words += texts[at]
        if len(words) >= length:
            break
    return words[:length]


def _mean(values: Sequence[float]) -> Estimate:
    low, high = np.percentile(values, (2.5, 97.5))
    return Estimate(float(np.mean(values)), float(low), float(high))
