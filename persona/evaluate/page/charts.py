"""Charts as inline SVG, drawn in the page's own colours, so that they follow light and dark and need no script.

Every drawn point carries its value (`data-value`) and its place in evaluation.json (`data-at`).
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from persona.evaluate.results import Estimate

_WIDTH, _HEIGHT = 400, 240  # units; about a phone's width, so that type keeps its size there
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 10, 14, 34
_DRAWN = 1000  # points of a line; a screen shows no more
_MARKED = 60  # points up to which a line shows each of them

Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """One line of a chart, named by the CSS class that colours it."""

    name: str
    kind: str
    points: Sequence[Point]
    at: str
    """Its place in evaluation.json, where it stands there as it is drawn; else empty."""
    marked: bool = False
    """Whether its points are shown."""


def curves(lines: Sequence[Line], unit: str, best: Point | None, note: str) -> str:
    """Lines by update, with the best point marked and described by `note`."""
    points = [point for line in lines for point in line.points]
    xs, ys = [x for x, _ in points], [y for _, y in points]
    x = _scale(min(xs), max(xs), _LEFT, _WIDTH - _RIGHT)
    ticks = nice_ticks(min(ys), max(ys))
    y = _scale(ticks[0], ticks[-1], _HEIGHT - _BOTTOM, _TOP)
    parts = [_grid(ticks, y), _steps(min(xs), max(xs), x)]
    if best:
        parts.append(
            f'<line class="best" x1="{x(best[0]):.1f}" x2="{x(best[0]):.1f}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}"/>'
        )
    parts += [_drawn(line, x, y) for line in lines]
    if best:
        side = "end" if best[0] > (min(xs) + max(xs)) / 2 else "start"
        shift = -6 if side == "end" else 6
        parts.append(f'<circle class="best" cx="{x(best[0]):.1f}" cy="{y(best[1]):.1f}" r="5"/>')
        parts.append(
            f'<text class="best" x="{x(best[0]) + shift:.1f}" y="{_TOP + 9}" text-anchor="{side}">{escape(note)}</text>'
        )
    return _chart(parts, f"{unit} by update; {note}", [(line.name, line.kind) for line in lines], unit)


def histogram(labels: Sequence[str], shares: Sequence[Line], unit: str) -> str:
    """Distributions over the same bins, drawn over each other: the first filled, the others as outlines."""
    used = [i for i in range(len(labels)) if any(line.points[i][1] for line in shares)] or [0]
    shown = range(used[0], used[-1] + 1)  # without the bins at both ends that are empty on all sides
    ticks = nice_ticks(0, max((value for line in shares for _, value in line.points), default=0) or 1)
    x = _scale(shown.start, shown.stop, _LEFT, _WIDTH - _RIGHT)
    y = _scale(0, ticks[-1], _HEIGHT - _BOTTOM, _TOP)
    parts = [_grid(ticks, y)]
    for line in shares:
        corners = [(x(i + end), y(line.points[i][1])) for i in shown for end in (0, 1)]
        around = [(x(shown.start), y(0)), *corners, (x(shown.stop), y(0))]
        parts.append(
            f'<polyline class="outline {line.kind}" points="{" ".join(f"{a:.1f},{b:.1f}" for a, b in around)}" '
            f'data-at="{escape(line.at)}" data-value="{_json([value for _, value in line.points])}"/>'
        )
    every = math.ceil(len(shown) * max(map(len, labels), default=1) / 44)
    for i in shown:
        if (i - shown.start) % every == 0:
            parts.append(
                f'<text class="axis" x="{x(i + 0.5):.1f}" y="{_HEIGHT - _BOTTOM + 14}" text-anchor="middle">'
                f"{escape(labels[i])}</text>"
            )
        values = ", ".join(f"{line.name} {line.points[i][1]:.3g}" for line in shares)
        parts.append(  # what the pointer shows over a bin
            f'<rect class="bin" x="{x(i):.1f}" y="{_TOP}" width="{x(i + 1) - x(i):.1f}" '
            f'height="{_HEIGHT - _BOTTOM - _TOP}"><title>{escape(labels[i])}: {escape(values)}</title></rect>'
        )
    return _chart(parts, unit, [(line.name, line.kind) for line in shares], unit)


def dots(label: str, marks: Sequence[tuple[str, str, float | None, str]], largest: float) -> str:
    """A row with one dot a side (its name, colour, value and place) on a common scale from 0 to `largest`."""
    placed = "".join(
        f'<i class="{kind}" style="left:{100 * value / (largest or 1):.2f}%" data-at="{escape(at)}" '
        f'data-value="{_json(value)}" title="{escape(name)}: {value:.4g}"></i>'
        for name, kind, value, at in marks
        if value is not None
    )
    return f'<div class="dots"><span class="label">{escape(label)}</span><span class="track">{placed}</span></div>'


def legend(entries: Sequence[tuple[str, str]]) -> str:
    """What the colours mean."""
    return (
        '<p class="legend">' + "".join(f'<span class="{kind}">{escape(name)}</span>' for name, kind in entries) + "</p>"
    )


def nice_ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Round numbers that enclose `low` to `high`, at steps of 1, 2 or 5 times a power of ten (Heckbert 1990)."""
    if high <= low:
        low, high = (low - 0.5, high + 0.5) if low else (0.0, 1.0)
    rough = (high - low) / about
    power = 10 ** math.floor(math.log10(rough))
    step = power * next(factor for factor in (1, 2, 5, 10) if rough <= factor * power * (1 + 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    span = (high - low) or 1
    return lambda value: start + (value - low) / span * (end - start)


def _grid(ticks: Sequence[float], y: Callable[[float], float]) -> str:
    return "".join(
        f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>'
        f'<text class="axis" x="{_LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>'
        for tick in ticks
    )


def _steps(low: float, high: float, x: Callable[[float], float]) -> str:
    return (
        "".join(
            f'<text class="axis" x="{x(tick):.1f}" y="{_HEIGHT - _BOTTOM + 16}" text-anchor="middle">{tick:g}</text>'
            for tick in nice_ticks(low, high, 5)
            if low <= tick <= high and tick == int(tick)
        )
        + f'<text class="axis" x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 3}" text-anchor="end">update</text>'
    )


def _drawn(line: Line, x: Callable[[float], float], y: Callable[[float], float]) -> str:
    every = max(1, len(line.points) // _DRAWN)
    places = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in line.points[::every])
    source = f' data-at="{escape(line.at)}" data-value="{_json(line.points)}"' if line.at and every == 1 else ""
    drawn = f'<polyline class="line {line.kind}" points="{places}"{source}/>'
    if len(line.points) > 1 and (not line.marked or len(line.points) > _MARKED):
        return drawn
    return drawn + "".join(
        f'<circle class="{line.kind}{" first" * (step == 0)}" cx="{x(step):.1f}" cy="{y(value):.1f}" r="3.5">'
        f"<title>update {step:g}: {value:.4g}</title></circle>"
        for step, value in line.points
    )


def _chart(parts: Sequence[str], described: str, entries: Sequence[tuple[str, str]], unit: str) -> str:
    return (
        f'<figure class="chart"><figcaption>{escape(unit)}</figcaption>'
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(described)}">{"".join(parts)}</svg>'
        f"{legend(entries)}</figure>"
    )


def _json(value: object) -> str:
    return escape(json.dumps(value))


# --- numerals ---------------------------------------------------------------------------------------------------------
# Numbers as the report page quotes them: each with its place in evaluation.json and its full value beside it.
#
# `<data value="20.284519" data-at="scores.0.score.tuned.perplexity.value">20.3</data>` shows a rounded number to a
# person and the exact one to a program, and lets a test compare every number on the page with the file.


Form = Callable[[float], str]


def whole(value: float) -> str:
    """`1,234`."""
    return f"{value:,.0f}"


def decimal(value: float) -> str:
    """Three significant digits, without an exponent: `0.123`, `20.3`, `1,234`."""
    size = abs(value)
    digits = 0 if size >= 100 or size == 0 else 1 if size >= 10 else 2 if size >= 1 else 3
    return f"{value:,.{digits}f}"


def hundredths(value: float) -> str:
    """`20.28`."""
    return f"{value:,.2f}"


def percent(value: float) -> str:
    """A share as `62 %`, with one decimal place below ten."""
    size = abs(100 * value)
    return f"{100 * value:.{0 if size >= 10 or size == 0 else 1}f} %"


def number(value: float | None, at: str, form: Form = decimal) -> str:
    """One number of evaluation.json; a dash where it was not measured."""
    if value is None:
        return '<span class="none">–</span>'
    return f'<data value="{escape(json.dumps(value))}" data-at="{escape(at)}">{form(value)}</data>'


def estimate(found: Estimate | None, at: str, form: Form = decimal) -> str:
    """A figure and, below it, its 95 % interval where there is one."""
    if found is None:
        return number(None, at)
    return number(found.value, f"{at}.value", form) + interval(found, at, form)


def interval(found: Estimate, at: str, form: Form = decimal) -> str:
    """The interval of a figure in small print, or nothing."""
    if found.low is None or found.high is None:
        return ""
    low, high = number(found.low, f"{at}.low", form), number(found.high, f"{at}.high", form)
    return f'<span class="interval">{low} to {high}</span>'
