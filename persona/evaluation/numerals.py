"""Numbers as the report page quotes them: each with its place in evaluation.json and its full value beside it.

`<data value="20.284519" data-at="scores.0.score.tuned.perplexity.value">20.3</data>` shows a rounded number to a
person and the exact one to a program, and lets a test compare every number on the page with the file.
"""

import json
from collections.abc import Callable
from html import escape

from persona.evaluation.figures import Estimate

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
