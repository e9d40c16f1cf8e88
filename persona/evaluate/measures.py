"""Everything about one model, put together: what it writes, how that compares, what it remembers and what it copies."""

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from persona.evaluate.loaded import Loaded, all_prompts, last_prompts, sampled
from persona.evaluate.lore_recall import Recall, questions, recall_of
from persona.evaluate.predictions import Prediction, asked, figures_of, other_speakers
from persona.evaluate.results import (
    Curve,
    DataStatistics,
    Distance,
    Distribution,
    Diversity,
    Estimate,
    Exchange,
    Phrase,
    Replies,
    Sides,
    Span,
    StyleReport,
)
from persona.evaluate.style import compare
from persona.evaluate.style.results import Comparison, Level
from persona.evaluate.style.results import Estimate as Measured
from persona.evaluate.style.words import language
from persona.evaluate.subject import Subject
from persona.files import ADAPTER_WEIGHTS, file_sha256
from persona.model.folders import fingerprint
from persona.model.render import Message
from persona.records import Record, rank, read_records
from persona.speak.batches import greedy
from persona.train.history import read_history
from persona.train.run_folder import LIBRARIES

# --- likeness ---------------------------------------------------------------------------------------------------------
# A comparison of styles as the report shows it.


Side = Literal["author", "base", "tuned"]
_VARIETY = {"distinct_1": "distinct_1", "distinct_2": "distinct_2", "mattr": "moving_ttr", "self_bleu": "self_bleu"}


def likeness(author: Sequence[str], texts: Sides[list[str]], seed: int) -> StyleReport:
    """How near to `author` both sides of `texts` write; without a base there are distances but no headline."""
    if texts.base is None:
        return _report(compare(author, texts.tuned, seed=seed), "base", texts)
    return _report(compare(author, texts.base, texts.tuned, seed=seed), "tuned", texts)


def _report(found: Comparison, measured: Side, texts: Sides[list[str]]) -> StyleReport:
    """The figures of `found`, where `measured` is called what here is the tuned side."""
    has_base = measured == "tuned"
    return StyleReport(
        headline=_estimate(found.score) if has_base else None,
        words=found.words,
        texts=len(texts.tuned),
        distances=_distances(found, has_base),
        distributions=_distributions(found, measured, has_base),
        phrases=_phrases(found, measured, has_base),
        diversity=Sides(_diversity(found, measured), _diversity(found, "base") if has_base else None),
        author_diversity=_diversity(found, "author"),
        notes=(*found.notes, *_reasons(found, has_base)),
    )


def _distances(found: Comparison, has_base: bool) -> tuple[Distance, ...]:
    made = []
    for far in found.distances:
        author = _estimate(far.ceiling)
        tuned = far.tuned.value if has_base else far.floor.value
        if author is not None and tuned is not None:
            made.append(Distance(far.label, author, Sides(tuned, far.floor.value if has_base else None)))
    return tuple(made)


def _distributions(found: Comparison, measured: Side, has_base: bool) -> tuple[Distribution, ...]:
    made = []
    for one in found.histograms:
        tuned = getattr(one, measured)
        if one.author is not None and tuned is not None:
            made.append(Distribution(one.label, one.bins, one.author, Sides(tuned, one.base if has_base else None)))
    return tuple(made)


def _phrases(found: Comparison, measured: Side, has_base: bool) -> tuple[Phrase, ...]:
    made = []
    for phrase in found.phrases:
        tuned = getattr(phrase, measured)
        if tuned is not None:
            made.append(Phrase(phrase.text, phrase.author, Sides(tuned, phrase.base if has_base else None)))
    return tuple(made)


def _reasons(found: Comparison, has_base: bool) -> list[str]:
    """Why something was not measured, each reason once."""
    said: list[str] = []
    for far in (found.distance, *found.distances):
        estimates = [far.ceiling, far.floor, far.tuned] if has_base else [far.ceiling, far.floor]
        said += [f"not measured: {estimate.reason}" for estimate in estimates if estimate.reason is not None]
    return list(dict.fromkeys(said))


def _estimate(found: Measured) -> Estimate | None:
    return None if found.value is None else Estimate(found.value, found.low, found.high)


def _diversity(found: Comparison, side: Side) -> Diversity:
    levels: dict[str, Level] = {level.name: level for level in found.diversity}
    values = {name: getattr(levels[theirs], side).value for name, theirs in _VARIETY.items()}
    if values["self_bleu"] is not None:
        values["self_bleu"] *= 100
    return Diversity(**values)


@dataclass(frozen=True)
class Written:
    """What was written to the held-out prompts."""

    predictions: Sides[list[Prediction]]
    ended: Sides[list[bool]] | None
    """Whether each reply ended by itself; None where nobody knows."""


def predict(loaded: Loaded) -> Written:
    """Greedy replies of both sides to the last turn of every held-out conversation, in the file's order."""
    held_out = loaded.subject.held_out
    prompts = last_prompts(held_out.records, held_out.system)
    limit = loaded.subject.config.generation.max_new_tokens
    found = loaded.writer.sides(prompts, greedy(limit), "predictions")
    wanted = asked(held_out.records)

    def filled(replies: Sequence[str]) -> list[Prediction]:
        pairs = zip(wanted, replies, strict=True)
        return [Prediction(one.input, reply, one.target) for one, reply in pairs]

    texts = found.each(lambda side: filled([reply.text for reply in side]))
    return Written(texts, found.each(lambda side: [reply.ended for reply in side]))


def given(subject: Subject) -> Written:
    """The texts of a subject that has no model."""
    return Written(Sides(subject.texts or [], subject.base_texts), None)


def reply_figures(subject: Subject, written: Written) -> Sides[Replies] | None:
    """The figures of the predictions; None where they have no targets to be compared with."""
    if not any(prediction.target for prediction in written.predictions.tuned):
        return None
    others = other_speakers([*subject.held_out.records, *subject.trained])
    spoken = spoken_language(subject)
    base, ended = written.predictions.base, written.ended
    tuned = figures_of(written.predictions.tuned, spoken, others, ended and ended.tuned)
    if base is None or not any(prediction.target for prediction in base):
        return Sides(tuned)
    return Sides(tuned, figures_of(base, spoken, others, ended and ended.base))


def spoken_language(subject: Subject) -> str:
    """`zh` or `en`, by the held-out replies."""
    return language(all_replies(subject.held_out.records))


def all_replies(records: Sequence[Record]) -> list[str]:
    """The replies of all `records`, in their order."""
    return [reply for record in records for reply in record.replies]


def chosen(records: Sequence[Record], limit: int | None, seed: int) -> list[Record]:
    """All of `records`, or `limit` of them drawn by the seed, in their order."""
    if limit is None or limit >= len(records):
        return list(records)
    ranked = sorted(range(len(records)), key=lambda number: rank(seed, records[number].encoded().decode("utf-8")))
    return [records[number] for number in sorted(ranked[:limit])]


# --- style and copying -----------------------------------------------------------------------------------------------


def samples(loaded: Loaded, limit: int | None) -> Sides[list[str]]:
    """What both sides say in every held-out context, sampled as in chat by the same seeds."""
    held_out, config = loaded.subject.held_out, loaded.subject.config
    prompts, _ = all_prompts(chosen(held_out.records, limit, config.seed), held_out.system)
    found = loaded.writer.sides(prompts, sampled(config.generation, config.seed), "samples for style")
    return found.each(lambda side: [reply.text for reply in side])


def style_of(subject: Subject, texts: Sides[list[str]]) -> StyleReport:
    """How near to the author's held-out text both sides write."""
    return likeness(all_replies(subject.held_out.records), texts, subject.config.seed)


def exchanges(written: Written, spans: Sequence[tuple[Span, ...]] | None) -> tuple[Exchange, ...]:
    """The predictions side by side, copied spans marked in the tuned ones."""
    base = written.predictions.base
    return tuple(
        Exchange(
            one.input,
            one.target,
            Sides(one.predict, base[number].predict if base is not None and number < len(base) else None),
            spans[number] if spans is not None else (),
        )
        for number, one in enumerate(written.predictions.tuned)
    )


# --- memory of the lore ----------------------------------------------------------------------------------------------


def remembered(loaded: Loaded, limit: int | None) -> Recall | None:
    """The questions about the lore, asked with the system prompt and without it; None where there are none."""
    subject = loaded.subject
    held_out, seed = subject.held_out, subject.config.seed
    records = [(record, False) for record in held_out.records] + [(record, True) for record in subject.trained]
    found = questions(records, all_replies([record for record, _ in records]))
    found = sorted(found, key=lambda one: rank(seed, one.question))[:limit] if limit is not None else found
    if not found:
        return None
    decoding = greedy(_room(loaded, [one.reference for one in found]))

    def ask(system: str | None, step: str) -> Sides[list[str]]:
        said: list[Message] = [{"role": "system", "content": system}] if system else []
        prompts = [[*said, {"role": "user", "content": one.question}] for one in found]
        return loaded.writer.sides(prompts, decoding, step).each(lambda side: [reply.text for reply in side])

    with_system = ask(held_out.system, "lore, with the system prompt")
    return recall_of(found, with_system, ask(None, "lore, without it"), seed)


def _room(loaded: Loaded, references: Sequence[str]) -> int:
    """Tokens for an answer: twice the longest reference, so that a side that rambles does not take all the time."""
    tokenizer = loaded.speaker.fmt.tokenizer
    longest = max(len(tokenizer.encode(text, add_special_tokens=False)) for text in references)
    return min(2 * longest, loaded.subject.config.generation.max_new_tokens)


# --- what it rests on ------------------------------------------------------------------------------------------------


def curve_of(run: Path | None) -> Curve | None:
    """The losses that the run measured; None without a history."""
    if run is None or not (run / "metrics.jsonl").is_file():
        return None
    history = read_history(run)
    train, held_out = (
        tuple((step, loss) for step, loss in points if loss == loss and abs(loss) != float("inf"))
        for points in (history.train, history.evaluations)
    )
    return Curve(train, held_out, history.best[0] if history.best is not None else None)


def data_of(subject: Subject) -> tuple[DataStatistics, ...]:
    """What was learned from and measured on, file by file."""
    data = subject.config.data
    names = [name for name in (data.train_file, data.lore_file) if name is not None and Path(name).is_file()]
    files = [(Path(name), read_records(Path(name))) for name in names]
    return tuple(_statistics(*file) for file in [*files, (subject.held_out.path, subject.held_out.records)])


def _statistics(path: Path, records: Sequence[Record]) -> DataStatistics:
    replies = list(map(len, all_replies(records)))
    types = Counter(str(record.meta.get("type", "dialogue")) for record in records)
    median = round(statistics.median(replies))
    return DataStatistics(path.name, file_sha256(path), len(records), len(replies), sum(replies), median, dict(types))


def versions() -> dict[str, str]:
    """The libraries that the figures depend on."""
    return {name: version(name) for name in (*LIBRARIES, "sacrebleu")}


def hashes(subject: Subject) -> dict[str, str]:
    """SHA-256 of what was measured."""
    found = {} if subject.base is None else {"base": fingerprint(subject.base)}
    if subject.adapter is not None:
        found["adapter"] = file_sha256(subject.adapter / ADAPTER_WEIGHTS)
    return found | {one.file: one.sha256 for one in data_of(subject)}
