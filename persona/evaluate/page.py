"""report.html: an evaluation as one page that opens from disk, asks nothing of the network and runs no script.

The template quotes every number from evaluation.json with its place there:
`<data value="20.284519" data-at="scores.0.score.tuned.perplexity.value">20.3</data>` shows a rounded number to a person
and the exact one to a program, and lets a test compare every number on the page with the file.
"""

import json
import math
import re
from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

from persona.evaluate.results import Distribution, Estimate, Evaluation, Recall, Sides, Span, StyleReport
from persona.pages import page
from persona.train.curves import DARK, LIGHT, picture
from persona.train.history import History

_KINDS = {"adapter": "adapter", "model": "model", "texts": "texts from a file"}
_TUNED = {"adapter": "tuned", "model": "model", "texts": "these texts"}
_SMOOTHING = 0.9  # of the training loss, as in loss.png
_RANKED = 16  # classes of a distribution that are drawn, the author's most frequent

Place = tuple[str | int, ...]
"""The place of a figure in the evaluation: attributes, keys and positions."""


@dataclass(frozen=True)
class Column:
    """A column of a table: its name, the colour of its side, and the part of a figure's place that leads to it."""

    name: str
    kind: str
    path: Place


@dataclass(frozen=True)
class Row:
    """A row of a table: its name, a hint below it, the form of its numbers, and the place of each (None: empty)."""

    name: str
    hint: str
    form: str
    cells: tuple[Place | None, ...]


@dataclass(frozen=True)
class Table:
    """Figures with a column for each side; a group is a title, perhaps empty, and its rows."""

    corner: str
    columns: tuple[Column, ...]
    groups: tuple[tuple[str, tuple[Row, ...]], ...]


def report_page(evaluation: Evaluation) -> str:
    """The page of `evaluation` as text."""
    names = {"author": "author", "base": "base", "tuned": _TUNED[evaluation.kind]}
    style, curve = evaluation.style, evaluation.curve
    files = {data.sha256 for data in evaluation.data}
    return page(
        "report.html",
        title=f"Report: {evaluation.name}",
        evaluation=evaluation,
        kind=_KINDS[evaluation.kind],
        names=names,
        value=lambda place: look_up(evaluation, place),
        figure=lambda form, *place: quoted(evaluation, form, place),
        written=json.dumps,
        marked=marked,
        way=_way(evaluation),
        numbers=_numbers(evaluation, names),
        pictures=_pictures(evaluation),
        best=None if curve is None else next((i for i, p in enumerate(curve.held_out) if p[0] == curve.best), None),
        tables=[] if style is None else _style_tables(style, names),
        charts=[] if style is None else [_chart(each, i, names) for i, each in enumerate(style.distributions)],
        recall=None if evaluation.recall is None else _recall(evaluation.recall, names),
        missing=_missing(evaluation),
        data=_data(evaluation),
        settings=_flat(evaluation.settings or {}),
        hashes=[(name, digest) for name, digest in (evaluation.hashes or {}).items() if digest not in files],
    )


# --- numbers ----------------------------------------------------------------------------------------------------------


def decimal(value: float) -> str:
    """Three significant digits, without an exponent: `0.123`, `20.3`, `1,234`."""
    size = abs(value)
    digits = 0 if size >= 100 or size == 0 else 1 if size >= 10 else 2 if size >= 1 else 3
    return f"{value:,.{digits}f}"


def percent(value: float) -> str:
    """A share as `62 %`, with one decimal place below ten."""
    size = abs(100 * value)
    return f"{100 * value:.{0 if size >= 10 or size == 0 else 1}f} %"


FORMS = {
    "whole": "{:,.0f}".format,
    "decimal": decimal,
    "hundredths": "{:,.2f}".format,
    "small": lambda value: f"{value:.8f}".rstrip("0").rstrip("."),
    "percent": percent,
}


def look_up(evaluation: Evaluation, place: Sequence[str | int]) -> Any:
    """The value at a place of the evaluation; None if a part of it was not measured."""
    value: Any = evaluation
    for part in place:
        if value is None:
            return None
        if isinstance(value, Mapping):
            value = value.get(part)
        else:
            value = value[part] if isinstance(part, int) else getattr(value, part)
    return value


def quoted(evaluation: Evaluation, form: str, place: Sequence[str | int]) -> Markup:
    """The number at a place, or a figure with its interval in small print; a dash if it was not measured."""
    value = look_up(evaluation, place)
    if isinstance(value, Estimate):
        number = quoted(evaluation, form, (*place, "value"))
        if value.low is None or value.high is None:
            return number
        ends = (quoted(evaluation, form, (*place, end)) for end in ("low", "high"))
        return number + Markup('<span class="interval">{} to {}</span>').format(*ends)
    if value is None:
        return Markup('<span class="none">–</span>')
    shown = FORMS[form](value)
    return Markup('<data value="{}" data-at="{}">{}</data>').format(json.dumps(value), ".".join(map(str, place)), shown)


def marked(text: str, spans: Sequence[Span]) -> Markup:
    """`text` with its spans marked; of two that overlap the earlier one keeps the part that both cover."""
    html, done = Markup(), 0
    for span in sorted(spans, key=lambda span: (span.start, -span.end)):
        start, end = max(done, span.start), min(span.end, len(text))
        if start < end:
            mark = Markup('<mark title="{}">{}</mark>').format(span.source, text[start:end])
            html, done = html + text[done:start] + mark, end
    return html + escape(text[done:])


# --- tables -----------------------------------------------------------------------------------------------------------


def _sides(measured: Iterable[Sides[Any]], names: Mapping[str, str]) -> tuple[Column, ...]:
    kinds = ("base", "tuned") if any(sides.base is not None for sides in measured) else ("tuned",)
    return tuple(Column(names[kind], kind, (kind,)) for kind in kinds)


def _with_author(author: str, field: str, sides: Sequence[Column]) -> tuple[Column, ...]:
    return (Column(author, "author", ("author",)), *(Column(c.name, c.kind, (field, *c.path)) for c in sides))


def _row(columns: Sequence[Column], name: str, hint: str, form: str, before: Place, after: Place = ()) -> Row:
    return Row(name, hint, form, tuple((*before, *column.path, *after) for column in columns))


def _numbers(evaluation: Evaluation, names: Mapping[str, str]) -> Table | None:
    """The figures of the scores, the replies and the copies; None if there are none."""
    copying = evaluation.copying.side if evaluation.copying is not None else None
    measured = [*(one.score for one in evaluation.scores), *filter(None, (evaluation.replies, copying))]
    if not measured:
        return None
    columns = _sides(measured, names)
    groups = []
    for i, one in enumerate(evaluation.scores):
        at = ("scores", i, "score")
        hint = "the same, comparable between models"
        rows = [
            _row(columns, "perplexity", "lower is better", "decimal", at, ("perplexity",)),
            _row(columns, "bits per character", hint, "hundredths", at, ("bits_per_character",)),
        ]
        if one.ratio is not None:
            hint = "below 1 is better" if one.role == "held_out" else "above 1 has forgotten"
            cells = (*[None] * (len(columns) - 1), ("scores", i, "ratio"))
            rows.append(Row("perplexity, tuned to base", hint, "hundredths", cells))
        groups.append((_score_title(evaluation, i), tuple(rows)))
    if evaluation.replies is not None:
        rows = [_row(columns, name, hint, form, ("replies",), (field,)) for name, hint, form, field in _REPLIES]
        groups.append(("Replies to the held-out prompts", tuple(rows)))
    if copying is not None:
        hint, at = "share of the reply’s tokens, in copied runs of 8 or more", ("copying", "side")
        copied = _row(columns, "copied", hint, "percent", at, ("share",))
        longest = _row(columns, "longest run", "tokens", "whole", at, ("longest",))
        groups.append(("Copying from the training data", (copied, longest)))
    return Table("", columns, tuple(groups))


def _score_title(evaluation: Evaluation, at: int) -> Markup:
    one = evaluation.scores[at]
    title = "Held-out replies" if one.role == "held_out" else "Control, which should not get worse"
    counts = (quoted(evaluation, "whole", ("scores", at, field)) for field in ("replies", "conversations", "tokens"))
    # training measures in its own precision, so that its perplexity may differ in the third digit
    computed = Markup(", computed in <code>{}</code>").format(one.precision) if one.precision else ""
    return Markup('{}: <code>{}</code> <span class="hint">{} replies in {} conversations, {} tokens{}</span>').format(
        title, one.file, *counts, computed
    )


_REPLIES = (
    ("replies", "", "whole", "count"),
    ("stop by themselves", "before the limit", "percent", "stops"),
    ("length", "1 is as long as the author’s", "hundredths", "length_ratio"),
    ("break character", "speak as a machine or as somebody else", "percent", "breaks_character"),
    ("chrF", "0 to 100, likeness to the author’s reply", "decimal", "chrf"),
    ("BLEU", "0 to 100", "decimal", "bleu"),
    ("ROUGE-L", "0 to 100", "decimal", "rouge_l"),
)


def _recall(recall: Recall, names: Mapping[str, str]) -> Table:
    columns = _sides([recall.with_system], names)
    rows = [("with the system prompt", "with_system"), ("without it", "without_system")]
    found = tuple(_row(columns, name, "", "percent", ("recall", field)) for name, field in rows)
    return Table("key facts in the answers", columns, (("", found),))


def _style_tables(style: StyleReport, names: Mapping[str, str]) -> list[tuple[str, Table]]:
    """The tables of the style section, each with its heading."""
    author = names["author"]
    distances = _with_author(f"{author}’s halves", "distance", _sides([one.distance for one in style.distances], names))
    rates = _with_author(author, "rate", _sides([one.rate for one in style.phrases], names))
    tables = [("", "distance from the author", distances, "distances", [(d.name, d.unit) for d in style.distances])]
    tables.append(
        ("Catch-phrases", "times in a thousand words", rates, "phrases", [(p.text, "") for p in style.phrases])
    )
    for title, corner, field in (
        ("Each text by itself", "mean or rate", "levels"),
        ("Variety", "at equal length", "diversity"),
    ):
        levels = getattr(style, field)
        sides = _with_author(author, "side", _sides([level.side for level in levels], names))
        tables.append((title, corner, sides, field, [(level.name, level.unit) for level in levels]))
    return [
        (title, Table(corner, columns, (("", _style_rows(columns, field, entries)),)))
        for title, corner, columns, field, entries in tables
        if entries
    ]


def _style_rows(columns: Sequence[Column], field: str, entries: Sequence[tuple[str, str]]) -> tuple[Row, ...]:
    return tuple(_row(columns, name, unit, "decimal", ("style", field, i)) for i, (name, unit) in enumerate(entries))


def _data(evaluation: Evaluation) -> Table:
    columns = tuple(Column(Path(data.file).name, "", (i,)) for i, data in enumerate(evaluation.data))
    fields = ("conversations", "replies", "characters", "median_reply")
    kinds = dict.fromkeys(kind for data in evaluation.data for kind in data.types)
    rows = [_row(columns, field.replace("_", " "), "", "whole", ("data",), (field,)) for field in fields]
    rows += [_row(columns, kind, "", "whole", ("data",), ("types", kind)) for kind in kinds]
    return Table("", columns, (("", tuple(rows)),))


# --- charts -----------------------------------------------------------------------------------------------------------

_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 390, 14, 206  # of a drawing of 400 by 240: a phone's width, so type keeps its size


@dataclass(frozen=True)
class Histogram:
    """The drawing of a histogram: the first distribution filled, the others as outlines over it."""

    ticks: list[tuple[float, str]]
    outlines: list[str]
    """For each column the points of its line."""
    labels: list[tuple[float, str]]
    bins: list[tuple[float, float, int]]
    """Left edge, width and position of each class that is shown."""


@dataclass(frozen=True)
class Chart:
    """The distributions of all sides over the same classes, as a histogram or as rows of dots."""

    found: Distribution
    columns: tuple[Column, ...]
    places: list[Place]
    """The place of each column's distribution."""
    histogram: Histogram | None
    ranked: list[int]
    """The classes that are drawn as rows of dots."""
    largest: float


def _chart(found: Distribution, at: int, names: Mapping[str, str]) -> Chart:
    columns = _with_author(names["author"], "side", _sides([found.side], names))
    sides = [found.author, *([] if found.side.base is None else [found.side.base]), found.side.tuned]
    places: list[Place] = [("style", "distributions", at, *column.path) for column in columns]
    if found.labels and all(re.search(r"\d", label) for label in found.labels):  # lengths, which have an order
        return Chart(found, columns, places, histogram(found.labels, sides), [], 1)
    ranked = sorted(range(len(found.labels)), key=lambda i: -found.author[i])[:_RANKED]
    largest = max((values[i] for values in sides for i in ranked), default=1) or 1
    return Chart(found, columns, places, None, ranked, largest)


def histogram(labels: Sequence[str], sides: Sequence[Sequence[float]]) -> Histogram:
    """Distributions over the same bins, to scale, without the bins at both ends that are empty on all sides."""
    used = [i for i in range(len(labels)) if any(values[i] for values in sides)] or [0]
    shown = range(used[0], used[-1] + 1)
    ticks = nice_ticks(max((value for values in sides for value in values), default=0) or 1)
    width = (_RIGHT - _LEFT) / len(shown)

    def x(at: float) -> float:
        return round(_LEFT + (at - shown.start) * width, 1)

    def y(value: float) -> float:
        return round(_BOTTOM - value / ticks[-1] * (_BOTTOM - _TOP), 1)

    outlines = []
    for values in sides:
        corners = [(x(i + end), y(values[i])) for i in shown for end in (0, 1)]
        around = [(x(shown.start), y(0)), *corners, (x(shown.stop), y(0))]
        outlines.append(" ".join(f"{a:.1f},{b:.1f}" for a, b in around))
    every = math.ceil(len(shown) * max(map(len, labels), default=1) / 44)
    return Histogram(
        [(y(tick), f"{tick:g}") for tick in ticks],
        outlines,
        [(x(i + 0.5), labels[i]) for i in shown if (i - shown.start) % every == 0],
        [(x(i), round(width, 1), i) for i in shown],
    )


def nice_ticks(highest: float) -> list[float]:
    """About five numbers from 0 to `highest` or beyond, at steps of 1, 2 or 5 times a power of ten (Heckbert 1990)."""
    rough = highest / 4
    power = 10 ** math.floor(math.log10(rough))
    step = power * next(factor for factor in (1, 2, 5, 10) if rough <= factor * power * (1 + 1e-9))
    return [round(i * step, 12) for i in range(math.ceil(highest / step - 1e-9) + 1)]


def _pictures(evaluation: Evaluation) -> dict[str, str] | None:
    """The loss curve for light and for dark, as data URIs; None without a curve."""
    curve = evaluation.curve
    if curve is None or not (curve.train or curve.held_out):
        return None
    history = History(evaluation.name, list(curve.train), list(curve.held_out), [])
    themes = {"light": LIGHT, "dark": DARK}
    drawn = {name: b64encode(picture(history, _SMOOTHING, theme)).decode("ascii") for name, theme in themes.items()}
    return {name: f"data:image/png;base64,{text}" for name, text in drawn.items()}


# --- the rest ---------------------------------------------------------------------------------------------------------


def _way(evaluation: Evaluation) -> str:
    """Advice on how to have the headline."""
    measured = evaluation.style.diversity if evaluation.style is not None else ()
    if evaluation.kind == "texts" and all(level.side.base is None for level in measured):
        return "Give the base model’s texts too, with --base-texts FILE."
    if evaluation.kind == "model":
        return "A merged model has no base beside it: measure its adapter, or its texts with --base-texts FILE."
    return "It takes a held-out file with enough text; the notes under Style say how much there is."


def _missing(evaluation: Evaluation) -> list[tuple[str, str]]:
    """The figures that are not on the page, each with what to do to have it."""
    roles = {score.role for score in evaluation.scores}
    held_out = "Give conversations that were not trained on, with --data FILE."
    control = "Give neutral text, or another author’s, as conversations with --control FILE."
    lore = "Give records of the type lore_qa."
    targets = held_out
    if evaluation.kind == "texts":
        held_out = control = lore = "A file of texts has no model to ask: measure a run or a merged model."
        targets = "The texts need the true replies beside them."
    of_a_run = "It is kept in the folder of a run: measure outputs/NAME."
    style = evaluation.style
    figures = {
        "Perplexity": ("held_out" in roles, held_out),
        "Forgetting": ("control" in roles, control),
        "Replies": (evaluation.replies, targets),
        "Style": (style, "Give conversations that were not trained on, with --data FILE."),
        "The way from base to author": (style and style.headline.value is not None, _way(evaluation)),
        "Memory of the lore": (evaluation.recall, lore),
        "Copying": (evaluation.copying, "Put the files of data.train_file and data.lore_file back where they were."),
        "Curves": (evaluation.curve, of_a_run),
        "Data": (evaluation.data, "Put the data files back where they were."),
        "Settings": (evaluation.settings, of_a_run),
    }
    return [(name, how) for name, (value, how) in figures.items() if not value]


def _flat(settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    pairs = []
    for name, value in settings.items():
        inner = value.items() if isinstance(value, Mapping) else [("", value)]
        pairs += [(f"{name}.{key}".rstrip("."), json.dumps(one, ensure_ascii=False)) for key, one in inner]
    return pairs
