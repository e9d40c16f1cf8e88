"""Style on the report page: how far each side is from the author by each measure, and what their texts are made of."""

import re
from collections.abc import Sequence
from html import escape

from persona.evaluation.charts import Line, dots, histogram, legend
from persona.evaluation.figures import Distance, Distribution, Sides, StyleReport
from persona.evaluation.numerals import decimal, estimate, hundredths, number, percent, whole

_ROWS = 16  # classes of one distribution that are drawn, the author's most frequent


def style(report: StyleReport, names: dict[str, str]) -> str:
    """The distances, the distributions drawn over each other, and the catch-phrases."""
    about = (
        f'<p class="quiet">From {number(report.texts, "style.texts", whole)} texts of each (words: '
        f"<q>{escape(report.words)}</q>). A distance is judged beside two others: the author’s own halves from each "
        "other, than which nothing can be nearer, and the base.</p>"
    )
    drawn = "".join(
        _distribution(found, f"style.distributions.{i}", names) for i, found in enumerate(report.distributions)
    )
    return (
        _notes(report.notes)
        + about
        + _distances(report.distances, names)
        + (f'<h3>What the texts are made of</h3><div class="charts">{drawn}</div>' if drawn else "")
        + _phrases(report, names)
        + _diversity(report, names)
    )


def _notes(notes: Sequence[str]) -> str:
    lines = [f'<p class="words">{escape(note)}</p>' for note in notes]
    more = f"<details><summary>{len(lines) - 1} more</summary>{''.join(lines[1:])}</details>" if len(lines) > 1 else ""
    return f'<div class="warn">{lines[0]}{more}</div>' if lines else ""


def _sides(found: Sequence[Sides[float]]) -> list[str]:
    return ["base", "tuned"] if any(sides.base is not None for sides in found) else ["tuned"]


def _distances(found: Sequence[Distance], names: dict[str, str]) -> str:
    if not found:
        return ""
    sides = _sides([distance.distance for distance in found])
    head = f'<th class="n">{escape(names["author"])}’s halves</th>'
    head += "".join(f'<th class="n">{escape(names[side])}</th>' for side in sides)
    rows = []
    for i, distance in enumerate(found):
        at = f"style.distances.{i}"
        cells = "".join(
            f'<td class="n">{number(getattr(distance.distance, side), f"{at}.distance.{side}")}</td>' for side in sides
        )
        values = [value for side in sides if (value := getattr(distance.distance, side)) is not None]
        largest = max(distance.author.value, *values)
        marks = [(names["author"], "author", distance.author.value, f"{at}.author.value")]
        marks += [(names[side], side, getattr(distance.distance, side), f"{at}.distance.{side}") for side in sides]
        rows.append(
            f'<tr><th class="words">{escape(distance.name)}</th>'
            f'<td class="n">{estimate(distance.author, f"{at}.author", decimal)}</td>{cells}'
            f'<td class="strip">{dots("", marks, largest)}</td></tr>'
        )
    return (
        f'<div class="wide-table"><table class="distances"><tr><th>distance from the author</th>{head}'
        f'<th class="strip"></th></tr>{"".join(rows)}</table></div>{_key(names, sides)}'
    )


def _key(names: dict[str, str], sides: Sequence[str]) -> str:
    return legend([(names[side], side) for side in ("author", *sides)])


def _distribution(found: Distribution, at: str, names: dict[str, str]) -> str:
    series = [("author", found.author, f"{at}.author"), ("tuned", found.side.tuned, f"{at}.side.tuned")]
    if found.side.base is not None:
        series.insert(1, ("base", found.side.base, f"{at}.side.base"))
    if found.labels and all(re.search(r"\d", label) for label in found.labels):  # lengths, which have an order
        lines = [Line(names[kind], kind, tuple(enumerate(values)), place) for kind, values, place in series]
        return histogram(found.labels, lines, found.name)
    ranked = sorted(range(len(found.labels)), key=lambda i: -found.author[i])[:_ROWS]
    largest = max((values[i] for _, values, _ in series for i in ranked), default=1)
    rows = "".join(
        dots(
            found.labels[i], [(names[kind], kind, values[i], f"{place}.{i}") for kind, values, place in series], largest
        )
        for i in ranked
    )
    of = f", the author’s {len(ranked)} most frequent of {len(found.labels)}" * (len(ranked) < len(found.labels))
    key = legend([(names[kind], kind) for kind, _, _ in series])
    return f'<figure class="chart"><figcaption>{escape(found.name)}{of}</figcaption>{rows}{key}</figure>'


def _phrases(report: StyleReport, names: dict[str, str]) -> str:
    if not report.phrases:
        return ""
    sides = _sides([phrase.rate for phrase in report.phrases])
    head = "".join(f'<th class="n">{escape(names[side])}</th>' for side in ("author", *sides))
    rows = "".join(
        f"<tr><td><q>{escape(phrase.text)}</q></td>"
        f'<td class="n">{number(phrase.author, f"style.phrases.{i}.author")}</td>'
        + "".join(
            f'<td class="n">{number(getattr(phrase.rate, side), f"style.phrases.{i}.rate.{side}")}</td>'
            for side in sides
        )
        + "</tr>"
        for i, phrase in enumerate(report.phrases)
    )
    return (
        '<h3>Catch-phrases</h3><div class="wide-table">'
        f"<table><tr><th>the author’s own</th>{head}</tr>{rows}</table></div>"
        '<p class="quiet">Times in a thousand words (characters for Chinese).</p>'
    )


def _diversity(report: StyleReport, names: dict[str, str]) -> str:
    sides = {"author": (report.author_diversity, "style.author_diversity")}
    if report.diversity.base is not None:
        sides["base"] = report.diversity.base, "style.diversity.base"
    sides["tuned"] = report.diversity.tuned, "style.diversity.tuned"
    head = "".join(f'<th class="n">{escape(names[side])}</th>' for side in sides)
    rows = []
    for label, hint, name, form in (
        ("distinct-1", "different words among all words", "distinct_1", hundredths),
        ("distinct-2", "different pairs of words", "distinct_2", hundredths),
        ("moving type-token ratio", "different words in a window", "mattr", hundredths),
        ("self-BLEU", "how alike the replies are, to 100", "self_bleu", decimal),
    ):
        cells = "".join(
            f'<td class="n">{number(getattr(found, name), f"{at}.{name}", form)}</td>' for found, at in sides.values()
        )
        rows.append(f'<tr><th>{label}<span class="hint">{hint}</span></th>{cells}</tr>')
    return (
        '<h3>Variety</h3><div class="wide-table">'
        f"<table><tr><th>at equal length</th>{head}</tr>{''.join(rows)}</table></div>"
    )


def headline(report: StyleReport) -> str:
    """How much of the way from base to author the tuned model has come, as words and as a scale."""
    found = report.headline
    if found is None:
        return ""
    low = found.value if found.low is None else found.low
    high = found.value if found.high is None else found.high
    start, end = min(0.0, low) - 0.06, max(1.0, high) + 0.06

    def place(value: float) -> str:
        return f"{100 * (value - start) / (end - start):.2f}%"

    band = f'<i class="band" style="left:{place(low)};right:calc(100% - {place(high)})"></i>' if low < high else ""
    sure = ""
    if found.low is not None and found.high is not None:
        ends = [number(end, f"style.headline.{at}", percent) for end, at in ((found.low, "low"), (found.high, "high"))]
        sure = f'<p class="quiet">95 % interval {ends[0]} to {ends[1]}</p>'
    return (
        f'<section class="headline"><p><b>{number(found.value, "style.headline.value", percent)}</b> '
        f"of the way from the base model to the author, by style</p>"
        f'<div class="scale"><span class="end" style="left:{place(0)}">base</span>'
        f'<span class="end" style="left:{place(1)}">author</span><span class="rail"></span>{band}'
        f'<i class="at" style="left:{place(found.value)}"></i></div>{sure}</section>'
    )
