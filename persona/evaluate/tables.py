"""The figures of an evaluation as a person reads them on the terminal."""

from collections.abc import Callable, Sequence

from persona.console import columns, excerpt, safe
from persona.evaluate.results import Copying, Estimate, FileScore, Matrix, Recall, Replies, Sides, StyleReport

Row = tuple[str, ...]


def number(estimate: Estimate, form: str = ".2f") -> str:
    """A figure with its interval, if it has one; a dash if it was not measured."""
    if estimate.value is None:
        return "-"
    if estimate.low is None or estimate.high is None:
        return format(estimate.value, form)
    return f"{estimate.value:{form}} ({estimate.low:{form}} to {estimate.high:{form}})"


def scores(found: Sequence[FileScore]) -> str:
    """Perplexity and bits per character on each file."""
    has_base = any(one.score.base is not None for one in found)
    rows: list[Row] = [("", "base", "tuned", "tuned/base") if has_base else ("", "model")]
    for one in found:
        sides = [one.score.base, one.score.tuned] if has_base else [one.score.tuned]
        name = f"{safe(one.file)}{'' if one.role == 'held_out' else ' (control)'}"
        ratio = [number(one.ratio)] if one.ratio is not None else []
        rows.append((f"perplexity on {name}", *(number(side.perplexity) for side in sides if side), *ratio))
        bits = [number(side.bits_per_character, ".3f") for side in sides if side]
        rows.append(("  bits per character", *bits, *([""] if has_base else [])))
        computed = f", in {one.precision}" if one.precision else ""
        size = f"  {one.conversations} conversations, {one.replies} replies, {one.tokens:,} tokens{computed}"
        rows.append((size, *[""] * (len(rows[0]) - 1)))
    notes = [f"  left out of {safe(one.file)}: {excerpt(line, 140)}" for one in found for line in one.left_out[:5]]
    return "\n".join([columns(rows), "  in brackets: 95 % interval over conversations", *notes])


def matrix(found: Matrix) -> str:
    """A row per file, a column per model; the lowest figure of each row is marked."""
    rows: list[Row] = [("perplexity on", *map(safe, found.models))]
    for file, values in zip(found.files, found.perplexity, strict=True):
        least = min(values)
        rows.append((safe(file), *(f"{value:.2f}{'*' if value == least else ' '}" for value in values)))
    right = sum(
        own == found.models[values.index(min(values))]
        for own, values in zip(found.own, found.perplexity, strict=True)
        if own is not None
    )
    owned = sum(own is not None for own in found.own)
    return f"{columns(rows)}\n  * lowest. {right} of {owned} held-out files are predicted best by their own model."


def replies(found: Sides[Replies]) -> str:
    """The figures of the predictions."""
    figures: list[tuple[str, Callable[[Replies], str]]] = [
        ("chrF", lambda one: f"{one.chrf:.1f}"),
        ("BLEU", lambda one: f"{one.bleu:.1f}"),
        ("ROUGE-L", lambda one: f"{one.rouge_l:.1f}"),
        ("stops by itself", lambda one: "-" if one.stops is None else f"{one.stops:.0%}"),
        ("length, reply/reference", lambda one: f"{one.length_ratio:.2f}"),
        ("breaks character", lambda one: f"{one.breaks_character:.0%}"),
    ]
    return _sides(found, figures)


def copying(found: Copying) -> str:
    """The share that is pasted from the training data, and the longest span of it."""
    text = _sides(
        found.side,
        [
            ("copied from training", lambda one: number(one.share, ".1%")),
            ("longest copied span, tokens", lambda one: str(one.longest)),
        ],
    )
    longest = found.side.tuned
    return f"{text}\n  {excerpt(longest.source, 40)}: {excerpt(longest.text, 100)}" if longest.longest else text


def recall(found: Recall) -> str:
    """The share of the key facts, with the system prompt and without."""
    shares = {"with the system prompt": found.with_system, "without it": found.without_system}
    has_base = found.with_system.base is not None
    rows: list[Row] = [("key facts in the answers", *(("base", "tuned") if has_base else ("model",)))]
    for name, sides in shares.items():
        values = [sides.base, sides.tuned] if has_base else [sides.tuned]
        rows.append((name, *(number(value, ".0%") for value in values if value is not None)))
    given = "" if found.facts_given else ", facts taken from the references"
    return f"{columns(rows)}\n  {len(found.questions)} questions{given}"


def style(found: StyleReport) -> str:
    """The way from base to author, and every distance beside its two anchors."""
    head = number(found.headline, ".0%") if found.headline.value is not None else "not measured"
    rows: list[Row] = [("distance from the author", "base", "tuned", "author, other half")]
    for one in found.distances:
        base = "-" if one.distance.base is None else _plain(one.distance.base, ".3f")
        rows.append((one.name, base, _plain(one.distance.tuned, ".3f"), number(one.author, ".3f")))
    levels: list[Row] = [("text by itself", "author", "base", "tuned")]
    for one in (*found.levels, *found.diversity):
        base = "-" if one.side.base is None else _plain(one.side.base, ".2f")
        levels.append((f"{one.name}, {one.unit}", _plain(one.author, ".2f"), base, _plain(one.side.tuned, ".2f")))
    lines = [f"  of the way from base to author: {head}", columns(rows), columns(levels)]
    if found.phrases:
        phrases: list[Row] = [("catch-phrases, in 1,000 words", "author", "base", "tuned")]
        for phrase in found.phrases[:8]:
            base = "-" if phrase.rate.base is None else f"{phrase.rate.base:.1f}"
            phrases.append((excerpt(phrase.text, 40), f"{phrase.author:.1f}", base, f"{phrase.rate.tuned:.1f}"))
        lines.append(columns(phrases))
    return "\n".join([*lines, *(f"  note: {safe(note)}" for note in found.notes)])


def _plain(estimate: Estimate, form: str) -> str:
    return "-" if estimate.value is None else format(estimate.value, form)


def _sides(found: Sides, figures: Sequence[tuple[str, Callable]]) -> str:
    has_base = found.base is not None
    rows: list[Row] = [("", *(("base", "tuned") if has_base else ("model",)))]
    sides = [found.base, found.tuned] if has_base else [found.tuned]
    rows += [(name, *(form(side) for side in sides)) for name, form in figures]
    return columns(rows)
