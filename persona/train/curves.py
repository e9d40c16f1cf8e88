"""The loss curve of one run, or of several over each other, as PNG.

It avoids pyplot, which keeps global state and may ask for a display.
"""

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps, font_manager
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

from persona.console import display_width, excerpt
from persona.errors import UsageError
from persona.train.history import History, Points, smooth

Entry = tuple[Line2D, str]  # a line of a legend


@dataclass(frozen=True)
class Theme:
    """The colours of a picture, and its width in inches."""

    paper: str
    ink: str
    quiet: str
    grid: str
    train: str
    evaluation: str
    width: float


FILE = Theme("#ffffff", "#333333", "#6f6f6f", "#e6e6e6", "#2f6db3", "#d9602b", 10)
# for pages, where a phone shows 360 units of it: the colours of page.css and report.css
LIGHT = Theme("#fdfcfa", "#23211e", "#6b665f", "#e2ddd5", "#77716a", "#2f6690", 5.6)
DARK = Theme("#191a1c", "#e6e3de", "#a09a91", "#3a3c40", "#a9a39a", "#7fb4dc", 5.6)
# Paul Tol's bright scheme without its grey, in an order that keeps neighbours apart for colour-blind eyes too.
_PALETTE = ("#4477aa", "#ee6677", "#228833", "#aa3377", "#ccbb44", "#66ccee")
_MARKERS_UP_TO = 40  # with fewer points every one is worth seeing; with more they merge into a band
# A collection (.ttc) goes by the name of its first face: Debian's Noto CJK is "JP", and has the Chinese characters too.
_CJK_FONTS = """Noto Sans CJK SC,Noto Sans SC,Noto Sans CJK JP,Source Han Sans SC,Source Han Sans CN,Microsoft YaHei,
PingFang SC,PingFang HK,Hiragino Sans GB,DengXian,SimHei,SimSun,Heiti TC,STHeiti,WenQuanYi Micro Hei,WenQuanYi Zen Hei,
Droid Sans Fallback,Arial Unicode MS,Microsoft JhengHei,Yu Gothic,MS Gothic,Malgun Gothic""".replace("\n", "").split(
    ","
)


def drawable(name: str) -> str:
    """`name` as the picture shows it: characters that no installed font has as ASCII escapes, and a long name cut."""
    shown = (c if c.isascii() or has_glyph(c) else c.encode("ascii", "backslashreplace").decode() for c in name)
    return excerpt("".join(shown), 60)


def draw(histories: Sequence[History], save_path: Path, smoothing: float) -> Path:
    """Draw one run in detail or several in comparison, and write the picture to `save_path`, creating its folders."""
    figure, axes = _empty(FILE)
    if save_path.suffix.lower().removeprefix(".") not in figure.canvas.get_supported_filetypes():
        raise UsageError(f"{save_path}: give a picture's file name that ends in .png, for example loss.png.")
    if len(histories) == 1:
        _draw_one(axes, histories[0], smoothing, FILE)
        _title(axes, drawable(histories[0].name))
    else:
        _draw_several(axes, histories, smoothing)
    try:
        save_path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(save_path)
    except OSError as error:
        reason = error.strerror or error
        raise UsageError(f"{save_path}: cannot be written: {reason}. Choose another place with --save_path.") from error
    return save_path


def picture(history: History, smoothing: float, theme: Theme) -> bytes:
    """One run's curve as the bytes of a PNG for a page, with the perplexity beside the loss."""
    figure, axes = _empty(theme)
    _draw_one(axes, history, smoothing, theme)
    if axes.get_ylim()[1] < 20:  # beyond, a perplexity is no number to read
        right = axes.secondary_yaxis("right", functions=(np.exp, _log))
        right.set_ylabel("perplexity", color=theme.quiet, fontsize=12)
        right.tick_params(length=0, labelcolor=theme.quiet, labelsize=11)
        right.spines["right"].set_visible(False)
    content = BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()


def _log(values: ArrayLike) -> ArrayLike:
    return np.log(np.maximum(values, 1e-9))  # matplotlib asks for 0 too


def _empty(theme: Theme) -> tuple[Figure, Axes]:
    layout = ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.1)
    figure = Figure(figsize=(theme.width, 0.6 * theme.width), dpi=150, facecolor=theme.paper, layout=layout)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(facecolor=theme.paper)
    axes.set_xlabel("step (weight updates)", color=theme.ink, fontsize=12)
    axes.set_ylabel("loss (nats per token)", color=theme.ink, fontsize=12)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(color=theme.grid, linewidth=0.8)
    axes.margins(x=0.02, y=0.08)
    _quiet(axes, theme)
    return figure, axes


def _quiet(axes: Axes, theme: Theme) -> None:
    """Hide the box and the tick marks."""
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(theme.quiet)
    axes.tick_params(length=0, labelcolor=theme.quiet, labelsize=11)


def _draw_one(axes: Axes, history: History, smoothing: float, theme: Theme) -> None:
    handles: list[Entry] = []
    if history.train:
        steps, losses = _columns(history.train)
        raw = axes.plot(steps, losses, color=theme.train, linewidth=1, marker=_marker(losses), markersize=4)[0]
        raw.set_alpha(0.35 if smoothing else 1)
        handles.append((raw, "train"))
        if smoothing:
            strong = axes.plot(steps, smooth(losses, smoothing), color=theme.train, linewidth=2.4)
            handles.append((strong[0], f"train, smoothed {smoothing:g}"))
    if history.evaluations:
        handles += _draw_evaluations(axes, history, theme.evaluation, theme)
    if history.best:
        _mark_best(axes, history.best, theme)
    if history.learning_rate:
        handles.append((_draw_learning_rate(axes, history.learning_rate, theme), "learning rate"))
    _legend(axes, handles, theme)


def _draw_evaluations(axes: Axes, history: History, colour: str, theme: Theme) -> list[Entry]:
    """The evaluation curve with a marker at each point; the base model's, at step 0, is hollow."""
    steps, losses = _columns(history.evaluations)
    line = axes.plot(steps, losses, color=colour, linewidth=1.8, marker="o", markersize=6, zorder=4)[0]
    if steps[0] != 0:
        return [(line, "evaluation")]
    base = axes.plot(0, losses[0], color=colour, marker="o", markersize=7, linestyle="none")[0]
    base.set(zorder=5, markeredgewidth=1.6, markerfacecolor=theme.paper)
    return [(line, "evaluation"), (base, "base model")]


def _mark_best(axes: Axes, best: tuple[int, float], theme: Theme) -> None:
    step, loss = best
    axes.axvline(step, color=theme.evaluation, linewidth=1.2, linestyle=(0, (2, 3)), alpha=0.8)
    axes.plot(step, loss, color=theme.evaluation, marker="o", markersize=10, zorder=6, markeredgecolor=theme.paper)
    bottom, top = axes.get_ylim()
    axes.set_ylim(bottom, top + 0.06 * (top - bottom))  # room for the words above the curves
    low, high = axes.get_xlim()
    on_the_right = step > (low + high) / 2
    axes.annotate(
        f"best evaluation {loss:.4g}\nat step {step}",
        (step, 1),
        xycoords=("data", "axes fraction"),
        xytext=(-8 if on_the_right else 8, -4),
        textcoords="offset points",
        horizontalalignment="right" if on_the_right else "left",
        verticalalignment="top",
        color=theme.evaluation,
        fontsize=11,
        bbox={"facecolor": theme.paper, "edgecolor": "none", "alpha": 0.8, "pad": 1.5},
        zorder=7,
    )


def _draw_learning_rate(axes: Axes, learning_rate: Points, theme: Theme) -> Line2D:
    right = axes.twinx()
    steps, rates = _columns(learning_rate)
    line = right.plot(steps, rates, color=theme.quiet, linewidth=1.1, linestyle="--")[0]
    line.set_marker(_marker(rates, single=True))
    right.set_ylim(bottom=0)
    right.set_ylabel("learning rate", color=theme.quiet, fontsize=12)
    right.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=True)
    right.yaxis.get_offset_text().set_color(theme.quiet)
    _quiet(right, theme)
    axes.set_zorder(right.get_zorder() + 1)  # the losses stay above the learning rate,
    axes.patch.set_visible(False)  # which must shine through
    return line


def _draw_several(axes: Axes, histories: Sequence[History], smoothing: float) -> None:
    handles: list[Entry] = []
    for history, colour in zip(histories, _colours(len(histories)), strict=True):
        steps, losses = _columns(history.train)
        line = axes.plot(steps, smooth(losses, smoothing), color=colour, linewidth=2.2, alpha=0.9)[0]
        line.set_marker(_marker(losses, single=True))
        label = drawable(history.name)
        if history.evaluations:
            curve = _draw_evaluations(axes, history, colour, FILE)[0][0]
            curve.set(linestyle=(0, (4, 2)), linewidth=1.3)
        if history.best:
            step, loss = history.best
            axes.plot(step, loss, color=colour, marker="*", markersize=17, markeredgecolor="white", zorder=6)
            label += f": best {loss:.4g} at step {step}"
        handles.append((line, label))
    _title(axes, f"{len(histories)} runs")
    _legend(axes, handles, FILE)
    _key_to_styles(axes, histories, smoothing)


def _key_to_styles(axes: Axes, histories: Sequence[History], smoothing: float) -> None:
    """A legend of the line styles at the top right, which falling curves leave empty."""
    key = [Line2D([], [], linewidth=2.2, label=f"train, smoothed {smoothing:g}" if smoothing else "train")]
    if any(history.evaluations for history in histories):
        key.append(Line2D([], [], linewidth=1.3, linestyle=(0, (4, 2)), marker="o", label="evaluation"))
    if any(history.best for history in histories):
        key.append(Line2D([], [], linestyle="none", marker="*", markersize=13, label="best evaluation"))
    for line in key:
        line.set_color(FILE.quiet)
    axes.legend(handles=key, loc="upper right", fontsize=11, labelcolor=FILE.ink, edgecolor="none", framealpha=0.85)


def _colours(count: int) -> list[Any]:
    if count <= len(_PALETTE):
        return list(_PALETTE[:count])
    return [colormaps["turbo"](0.05 + 0.9 * i / (count - 1)) for i in range(count)]


def _columns(points: Points) -> tuple[list[int], list[float]]:
    """Steps and values, with NaN for every value that cannot be drawn."""
    return [step for step, _ in points], [value if math.isfinite(value) else math.nan for _, value in points]


def _marker(values: Sequence[float], single: bool = False) -> str:
    """Markers for a short curve, or only for a curve of a `single` point, which a line would not show."""
    return "o" if len(values) <= (1 if single else _MARKERS_UP_TO) else ""


@cache
def _families() -> list[str]:
    """The fonts, in the order in which matplotlib looks for a character: its own, and one with Chinese ones."""
    installed = set(font_manager.get_font_names())
    if installed.isdisjoint(_CJK_FONTS):  # matplotlib lists the fonts once and does not see one installed since
        for path in {*font_manager.findSystemFonts()} - {font.fname for font in font_manager.fontManager.ttflist}:
            with suppress(OSError, RuntimeError):  # bitmap and broken fonts
                font_manager.fontManager.addfont(path)
        installed = set(font_manager.get_font_names())
    return ["DejaVu Sans", *[font for font in _CJK_FONTS if font in installed][:1]]


@cache
def has_glyph(character: str) -> bool:
    """Whether a font in which the curves are written has `character`."""
    fonts = (font_manager.get_font(font_manager.findfont(family)) for family in _families())
    return any(font.get_char_index(ord(character)) for font in fonts)


def _plain(text: Text) -> None:
    """Draw `text` as it is: each character in a font that has it, and `$` as a dollar, not as mathematics."""
    text.set_fontfamily(_families())
    text.set_parse_math(False)


def _title(axes: Axes, title: str) -> None:
    _plain(axes.set_title(title, loc="left", fontsize=16, color=FILE.ink, pad=14))


def _legend(axes: Axes, entries: Sequence[Entry], theme: Theme) -> None:
    """Below the picture, where it covers nothing: in one row if that fits, else in columns as wide as the longest."""
    widths, room = [display_width(label) + 7 for _, label in entries], round(10.5 * theme.width)
    legend = axes.get_figure(root=True).legend(  # pyright: ignore[reportOptionalMemberAccess]
        [handle for handle, _ in entries],
        [str(i) for i in range(len(entries))],  # set below: matplotlib drops a label that begins with an underscore
        loc="outside lower center",
        ncols=len(entries) if sum(widths) <= room else max(1, room // max(widths)),
        frameon=False,
        fontsize=11,
        labelcolor=theme.ink,
        columnspacing=1.6,
    )
    for text, (_, label) in zip(legend.get_texts(), entries, strict=True):
        text.set_text(label)
        _plain(text)
