"""The style of three sets of texts beside each other: the author's, the base model's and the tuned model's."""

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from persona.style import describing, progress
from persona.style.counting import Columns, Corpus, Passage, count, features, joined, passages_of, summed, vocabulary
from persona.style.distances import MEASURES, UNITS, Measure, centre, distance, headline, prepare, represent, scales
from persona.style.diversity import diversity
from persona.style.phrases import catch_phrases
from persona.style.results import Comparison, Distance, Estimate, Texts
from persona.style.units import Language, Segmenter, language, segmenter, words

_MOST = 600  # passages of a set; time grows with the square
_PIECE = 1000  # characters of the documents that TF-IDF counts where there are few authors
_MANY = 10  # authors, each of whom is one document then
_LABEL = "style: the mean of the distances that have a weight"

Words = Literal["auto", "jieba", "bigrams"]


def compare(
    author: Sequence[str],
    base: Sequence[str],
    tuned: Sequence[str] | None = None,
    *,
    seed: int,
    reference: Sequence[Sequence[str]] = (),
    segmentation: Words = "auto",
    repeats: int = 200,
) -> Comparison:
    """How far from `base` to `author` the texts of `tuned` have gone; without `tuned`, only the two anchors.

    `reference` are the texts of other authors, one sequence each, for whoever has them: what is usual is then judged
    by them too. The same texts and seed give the same numbers; blank texts are not counted.
    """
    given = {"author": author, "base": base} | ({} if tuned is None else {"tuned": tuned})
    generator = np.random.default_rng(seed)
    notes: list[str] = []
    kept = {name: _passages(name, texts, generator, notes) for name, texts in given.items()}
    spoken = language([passage.text for passages in kept.values() for passage in passages])
    cut, cutter = segmenter(segmentation) if spoken == "zh" else segmenter("bigrams")
    sets, others, columns = _corpora(kept, reference, spoken, cut)
    found, sample, reasons = _progress(sets, others, columns, seed, repeats)
    whole, *distances = (
        _distance(measure, found, reasons)
        for measure in (Measure(progress.HEADLINE, _LABEL, "", "mean", 1, ""), *MEASURES)
    )
    spoken_words = {name: [words(text, cut) for text in texts] for name, texts in given.items()}
    return Comparison(
        score=whole.progress,
        distance=whole,
        distances=tuple(distances),
        levels=describing.levels(sets, spoken, cutter, seed, repeats),
        diversity=diversity(spoken_words, np.random.default_rng(seed)),
        histograms=describing.histograms(sets, columns, spoken),
        phrases=catch_phrases(given, spoken),
        language=spoken,
        words=cutter if spoken == "zh" else "words",
        sample=sample,
        seed=seed,
        author=_texts(sets["author"]),
        base=_texts(sets["base"]),
        tuned=_texts(sets["tuned"]) if "tuned" in sets else None,
        notes=tuple(notes),
    )


def distance_matrix(
    rows: Sequence[Sequence[str]], columns: Sequence[Sequence[str]], reference: Sequence[Sequence[str]] = ()
) -> dict[str, np.ndarray]:
    """Every distance of each set of texts in `rows` from each in `columns`, and the headline's, as (rows, columns).

    What is usual is judged by all of them and `reference`. The sets are taken whole; mind that chance makes short
    texts look far from all others.
    """
    passages = [passages_of(texts) for texts in (*rows, *columns, *reference)]
    spoken = language([passage.text for group in passages for passage in group])
    cut, _ = segmenter("auto") if spoken == "zh" else segmenter("bigrams")
    found = [[features(passage, spoken, cut) for passage in group] for group in passages]
    known = vocabulary(found, spoken)
    counts = [count(group, there, known) for group, there in zip(found, passages, strict=True)]
    piece = math.inf if len(counts) >= _MANY else _PIECE
    one = prepare(joined([summed(part) for part in counts]), scales(counts, counts, known, piece))
    first = np.repeat(np.arange(len(rows)), len(columns))
    second = np.tile(np.arange(len(rows), len(rows) + len(columns)), len(rows))
    values = {}
    for measure in MEASURES:
        every = represent(measure, one, np.eye(len(counts), dtype=np.float32))
        there = np.flatnonzero(~every.empty)
        middle = centre([every.take(np.array([at])) for at in there]).take(np.zeros(len(first), int))
        values[measure.name] = distance(measure, every.take(first), every.take(second), middle)
    values[progress.HEADLINE] = headline(values)
    return {name: value.reshape(len(rows), len(columns)) for name, value in values.items()}


def _passages(name: str, texts: Sequence[str], generator: np.random.Generator, notes: list[str]) -> list[Passage]:
    found = passages_of(texts)
    blank = sum(not text.strip() for text in texts)
    if blank:
        notes.append(f"{name}: {blank} of {len(texts)} texts are blank and were left out")
    parts = sum(passage.opens is None for passage in found)
    if parts:
        notes.append(f"{name}: long texts were cut into passages, {len(found)} in all; intervals are over passages")
    if len(found) > _MOST:
        notes.append(f"{name}: {_MOST} of {len(found)} passages were drawn at random and compared")
        found = [found[at] for at in sorted(generator.permutation(len(found))[:_MOST])]
    return found


def _corpora(
    kept: Mapping[str, list[Passage]], reference: Sequence[Sequence[str]], spoken: Language, cut: Segmenter
) -> tuple[dict[str, Corpus], list[Corpus], Columns]:
    groups = [*kept.values(), *(passages_of(texts) for texts in reference)]
    found = [[features(passage, spoken, cut) for passage in group] for group in groups]
    columns = vocabulary(found, spoken)
    made = [Corpus(group, each, count(each, group, columns)) for group, each in zip(groups, found, strict=True)]
    return dict(zip(kept, made, strict=False)), made[len(kept) :], columns


def _progress(
    sets: Mapping[str, Corpus], others: Sequence[Corpus], columns: Columns, seed: int, repeats: int
) -> tuple[dict[str, progress.Found], int, dict[str, str]]:
    """What was measured, on samples of how many characters, and for which sets not, and why."""
    characters = {name: corpus.counts.characters for name, corpus in sets.items()}
    reasons = {name: reason for name, each in characters.items() if (reason := progress.lack(name, each))}
    if "author" in reasons or "base" in reasons:
        return {}, 0, reasons
    usable = {name: each for name, each in characters.items() if name not in reasons}
    reference = [other.counts for other in others]
    everyone = [sets[name].counts for name in usable]
    usual = scales([sets["base"].counts, *reference], [*everyone, *reference], columns, _PIECE)
    passages = prepare(joined([sets[name].counts for name in usable]), usual)
    return progress.measure(passages, usable, seed, repeats), progress.sample_length(usable), reasons


def _distance(measure: Measure, found: Mapping[str, progress.Found], reasons: Mapping[str, str]) -> Distance:
    why = "; ".join(reasons.values()) or None
    nothing = Estimate(None, reason=why)
    values = found.get(measure.name, progress.Found(nothing, nothing, nothing, nothing))
    tuned, way = (nothing, nothing) if "tuned" in reasons else (values.tuned, values.progress)
    unit = UNITS.get(measure.kind, "mean of its parts")
    return Distance(
        measure.name, measure.label, unit, measure.source, measure.weight, values.ceiling, values.floor, tuned, way
    )


def _texts(corpus: Corpus) -> Texts:
    texts = sum(passage.opens is not None for passage in corpus.passages)
    return Texts(texts, int(corpus.counts.characters.sum()), len(corpus.passages))
