"""report.html: an evaluation as one page that opens from disk, asks nothing of the network and runs no script.

Every number on it is quoted from evaluation.json, with its place there (see `numerals`).
"""

import json
import math
from html import escape
from pathlib import Path
from typing import Any

from markupsafe import Markup

from persona.evaluate.page import sections as numbers_section
from persona.evaluate.page import sections as passages
from persona.evaluate.page import sections as style_section
from persona.evaluate.page.charts import Line, curves, decimal, number, whole
from persona.evaluate.results import Curve, DataStatistics, Evaluation, Finding
from persona.files import write_text
from persona.pages import page
from persona.train.history import smooth

_SMOOTHING = 0.9  # of the training loss, as in loss.png
_KINDS = {"adapter": "adapter", "model": "model", "texts": "texts from a file"}


def write_report_page(evaluation: Evaluation, path: Path) -> None:
    """Write the page of `evaluation`, whole or not at all."""
    write_text(path, report_page(evaluation))


def report_page(evaluation: Evaluation) -> str:
    """The page as text."""
    tuned = {"adapter": "tuned", "model": "model", "texts": "these texts"}[evaluation.kind]
    names = {"author": "author", "base": "base", "tuned": tuned}
    sections = [
        ("Verdict", _verdict(evaluation.verdict)),
        ("Numbers", numbers_section.numbers(evaluation, names)),
        ("While it trained", _curve(evaluation.curve) if evaluation.curve else ""),
        ("Style", style_section.style(evaluation.style, names) if evaluation.style else ""),
        ("Replies side by side", passages.exchanges(evaluation.exchanges, names, evaluation.language)),
        (
            "What it remembers of the lore",
            passages.recall(evaluation.recall, names, evaluation.language) if evaluation.recall else "",
        ),
        ("Not measured", _missing(evaluation)),
        ("Data", _data(evaluation.data)),
        ("Configuration", _configuration(evaluation.settings)),
        ("Versions and hashes", _pairs(evaluation.versions) + _hashes(evaluation)),
    ]
    body = "".join(f"<section><h2>{title}</h2>{inner}</section>" for title, inner in sections if inner)
    return page(
        "report.html", title=f"Report: {evaluation.name}", body=Markup(f"<main>{_head(evaluation)}{body}</main>")
    )


def _head(evaluation: Evaluation) -> str:
    about = f"{_KINDS[evaluation.kind]}, {escape(evaluation.language)}, seed {number(evaluation.seed, 'seed', whole)}"
    headline = style_section.headline(evaluation.style) if evaluation.style else ""
    if not headline:
        headline = f'<p class="warn">How far it has come from base to author was not measured. {_way(evaluation)}</p>'
    return f'<h1><span class="name">{escape(evaluation.name)}</span></h1><p class="quiet">{about}</p>{headline}'


def _way(evaluation: Evaluation) -> str:
    """What to do to have the headline."""
    if evaluation.kind == "texts" and not (evaluation.style and evaluation.style.diversity.base):
        return "Give the base model’s texts too, with --base-texts FILE."
    if evaluation.kind == "model":
        return "A merged model has no base beside it: measure its adapter, or its texts with --base-texts FILE."
    return "It takes a held-out file with enough text; the notes under Style say how much was there."


def _verdict(findings: tuple[Finding, ...]) -> str:
    lines = []
    for finding in findings:
        setting = (
            f' <span class="quiet">Setting: <code>{escape(finding.setting)}</code></span>' if finding.setting else ""
        )
        lines.append(
            f'<li data-code="{escape(finding.code)}"><span class="words">{escape(finding.text)}</span>{setting}</li>'
        )
    return f'<ul class="verdict">{"".join(lines)}</ul>' if lines else ""


def _curve(curve: Curve) -> str:
    best = next((point for point in curve.held_out if point[0] == curve.best), None)
    train = [loss for _, loss in curve.train]
    smoothed = list(zip((step for step, _ in curve.train), smooth(train, _SMOOTHING), strict=True))
    loss = [
        Line("training", "train raw", curve.train, "curve.train"),
        Line("training, smoothed", "train", smoothed, ""),
        Line("held out", "tuned", curve.held_out, "curve.held_out", marked=True),
    ]
    perplexity = [(step, math.exp(value)) for step, value in curve.held_out if value < 700]
    charts = []
    if shown := [line for line in loss if line.points]:
        note = f"best {best[1]:.4g} at update {best[0]}" if best else ""
        charts.append(curves(shown, "loss (nats per token)", best, note))
    if perplexity:
        top = (best[0], math.exp(best[1])) if best and best[1] < 700 else None
        note = f"best {top[1]:.4g} at update {top[0]}" if top else ""
        charts.append(curves([Line("held out", "tuned", perplexity, "", marked=True)], "perplexity", top, note))
    words = ""
    if best:
        at = f"curve.held_out.{curve.held_out.index(best)}.1"
        words = (
            f"<p>The lowest held-out loss, {number(best[1], at, decimal)}, "
            f"came at update {number(curve.best, 'curve.best', whole)}.</p>"
        )
    return f'{words}<div class="charts">{"".join(charts)}</div>' if charts else ""


def _data(found: tuple[DataStatistics, ...]) -> str:
    if not found:
        return ""
    head = "".join(f'<th class="n">{escape(Path(data.file).name)}</th>' for data in found)
    rows = [
        (
            name.replace("_", " "),
            [number(getattr(data, name), f"data.{i}.{name}", whole) for i, data in enumerate(found)],
        )
        for name in ("conversations", "replies", "characters", "median_reply")
    ]
    for kind in dict.fromkeys(kind for data in found for kind in data.types):
        cells = [number(data.types.get(kind), f"data.{i}.types.{kind}", whole) for i, data in enumerate(found)]
        rows.append((f"<code>{escape(kind)}</code>", cells))
    body = "".join(f"<tr><th>{name}</th>{''.join(f'<td class=n>{c}</td>' for c in cells)}</tr>" for name, cells in rows)
    hashes = _pairs({data.file: data.sha256 for data in found})
    return (
        f'<div class="wide-table"><table><tr><th></th>{head}</tr>{body}</table></div>'
        f'<p class="quiet">Characters are those of the replies. SHA-256 of the files:</p>{hashes}'
    )


def _configuration(settings: dict[str, Any] | None) -> str:
    if not settings:
        return ""
    flat: dict[str, str] = {}
    for name, value in settings.items():
        inner = value.items() if isinstance(value, dict) else [("", value)]
        flat |= {f"{name}.{key}" if key else name: json.dumps(one, ensure_ascii=False) for key, one in inner}
    return f"<details><summary>All settings of the run</summary>{_pairs(flat)}</details>"


def _pairs(found: dict[str, str] | None) -> str:
    rows = "".join(
        f"<tr><th>{escape(name)}</th><td><code>{escape(str(value))}</code></td></tr>"
        for name, value in (found or {}).items()
    )
    return f'<table class="pairs">{rows}</table>' if rows else ""


def _hashes(evaluation: Evaluation) -> str:
    """SHA-256 of what was measured, but for the files, which stand under Data."""
    files = {data.sha256 for data in evaluation.data}
    return _pairs({name: digest for name, digest in (evaluation.hashes or {}).items() if digest not in files})


def _missing(evaluation: Evaluation) -> str:
    """What is not on the page, and what to do to have it there."""
    texts = evaluation.kind == "texts"
    roles = {score.role for score in evaluation.scores}
    held_out = "Give conversations that were not learned, with --data FILE."
    asked = "A file of texts has no model that could be asked: measure a run or a merged model."
    control = "Give neutral text, or another author’s, as conversations with --control FILE."
    of_a_run = "It is kept in the folder of a run: measure outputs/NAME."
    found = {
        "Perplexity": ("held_out" in roles, asked if texts else held_out),
        "Forgetting": ("control" in roles, asked if texts else control),
        "Replies": (evaluation.replies, "The texts need what was really said beside them." if texts else held_out),
        "Style": (evaluation.style, held_out),
        "The way from base to author": (evaluation.style and evaluation.style.headline, _way(evaluation)),
        "Memory of the lore": (evaluation.recall, asked if texts else "Give records of the type lore_qa."),
        "Copying": (
            evaluation.copying,
            "The files of data.train_file and data.lore_file have to be where they were.",
        ),
        "Curves": (evaluation.curve, of_a_run),
        "Data": (evaluation.data, "The files have to be where they were."),
        "Configuration": (evaluation.settings, of_a_run),
    }
    rows = "".join(f"<tr><th>{name}</th><td>{how}</td></tr>" for name, (value, how) in found.items() if not value)
    return f'<table class="pairs missing">{rows}</table>' if rows else ""
