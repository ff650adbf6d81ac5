"""Charts of the report as SVG or PNG: errors, learning curves and differences of methods.

Figures are 480 px wide with text of at least 14.5 px, which a phone scales to 11 px. Labels are
placed next to their data instead of in legends. Long ones are wrapped, then shortened in the
middle, so that the axes keep half of the width. An SVG follows the reader's light or dark scheme
with the colors of the report's page. Axes cover the methods without outliers: a value far beyond
the others is an arrow at the edge with its number.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import text_to_path
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from teach_once.report.differences import known_differences
from teach_once.report.learning_curves import BEST, Curve, of_errors, spread_apart
from teach_once.report.page_assets import DARK, DARK_PAPER, LIGHT, LIGHT_PAPER
from teach_once.report.runs import Result
from teach_once.report.table import Row
from teach_once.runtime.safe.text import in_plot, one_line

WIDTH, FONT_PX = 480, 14.5
_ROW_PX, _LINE_PX = 26, 20
_LABEL_PX = 165  # leaves half of the width to the axes, next to the numbers or ticks
_BREAKS = re.compile(r"(?<=[ =_+])|(?<=\.)(?=[a-z])")
_BLOCKS = re.compile(r"(?<=[( ])(?:\w+\.)+(?=\w+=)")  # of a setting's key
_FEWEST_LINES, _MOST_LINES = 3, 8
_MAX_ROWS = 200  # per figure; viewers cannot open larger images
INK, QUIET, RULE = "#1c232b", "#5b6672", "#e3e7eb"
_DARK_OF = {
    **{INK: "#e6eaee", QUIET: "#a3adb8", RULE: "#323a43", LIGHT_PAPER: DARK_PAPER},
    **dict(zip(LIGHT, DARK, strict=True)),
}
_STYLE: dict[Any, Any] = {  # matplotlib's rcParams
    **{"font.size": FONT_PX, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": QUIET},
    **{"xtick.color": QUIET, "ytick.color": QUIET, "xtick.labelcolor": INK, "axes.grid": True},
    **{"ytick.labelcolor": INK, "grid.color": RULE, "figure.facecolor": "none"},
    **{"axes.facecolor": "none", "axes.spines.top": False, "axes.spines.right": False},
    **{"svg.fonttype": "none", "svg.hashsalt": "teach-once"},
}


class Dot(NamedTuple):
    """One row of a chart: a mean, the half-width of its interval or deviation, and single runs."""

    label: str
    mean: float
    half_width: float = 0.0
    runs: Sequence[float] = ()


def errors_by_method(
    rows: Sequence[Row], results: Sequence[Result], teacher: Mapping[str, float]
) -> Figure:
    """Draw the rows sorted by error, and the student alone (ce) and the teacher as lines."""
    metric = rows[0].metric
    errors: dict[str, list[float]] = {}
    for result in results:
        errors.setdefault(result.method, []).append(result.last[metric.name])
    dots = [_dot(row.method, errors[row.method]) for row in rows]
    lines = {
        "student alone": next(
            (row.last.mean for row in rows if (row.name or row.method) == "ce"), None
        ),
        "teacher": teacher.get(f"test_{metric.name}"),
    }
    known = {label: value for label, value in lines.items() if value is not None}
    return dot_chart(dots, metric.on_test(", last epoch"), known)


def _dot(label: str, errors: Sequence[float]) -> Dot:
    return Dot(label, sum(errors) / len(errors), 0.0, errors)


def differences_to(rows: Sequence[Row], reference: str) -> Figure | None:
    """Draw a forest plot of the paired differences to ce or kd, sorted; None if there are none."""
    dots = [
        Dot(row.method, each.mean, each.interval.half_width if each.interval else 0.0)
        for row, to, each in known_differences(rows)
        if to == reference
    ]
    title = f"difference to {in_plot(reference)} (points); bar: 95% interval"
    return dot_chart(dots, title, {"no difference": 0.0}, signed=True) if dots else None


@rc_context(_STYLE)
def dot_chart(
    dots: Sequence[Dot], title: str, lines: Mapping[str, float], *, signed: bool = False
) -> Figure:
    """Draw a row per dot, the lowest on top, and vertical lines with their labels."""
    dots = sorted(dots, key=lambda dot: dot.mean)
    shown = range_of([dot.mean for dot in dots], lines.values() if signed else ())
    low, high = shown
    inside = [dot for dot in dots if low <= dot.mean <= high]
    ends = [x for dot in inside for x in (dot.mean - dot.half_width, dot.mean + dot.half_width)]
    reach = [*shown, *(run for dot in inside for run in dot.runs)]
    reach += [end for end in ends if abs(end - (low + high) / 2) <= high - low]
    reach += [x for x in lines.values() if low - (high - low) <= x <= high + (high - low)]
    margin = 0.04 * (max(reach) - min(reach)) or 1.0
    low, high = min(reach) - margin, max(reach) + margin
    labels = _distinct_labels([dot.label for dot in dots])
    row_px = _ROW_PX + _LINE_PX * max(label.count("\n") for label in labels)
    height = min(row_px * len(dots), _ROW_PX * _MAX_ROWS) + 62 + 22 * len(lines)
    line_rows = 0.85 * _ROW_PX / row_px
    figure, axes = _new_figure(height)
    axes.set_xlim(low, high)
    axes.set_ylim(len(dots) - 0.4, -0.6 - line_rows * len(lines))
    axes.set_yticks(range(len(dots)), labels)
    axes.tick_params("y", length=0)
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlabel(title, x=1.0, ha="right")
    for index, (label, value) in enumerate(lines.items()):
        _draw_line(axes, label, value, -0.7 - line_rows * index, signed)
    for row, dot in enumerate(dots):
        _draw_dot(axes, dot, row, "{:+.2f}" if signed else "{:.2f}")
    return figure


def _distinct_labels(texts: Sequence[str]) -> list[str]:
    """Fit texts into the space for labels, with as many lines as keep different texts different."""
    for lines in range(_FEWEST_LINES, _MOST_LINES + 1):
        labels = [_fitted(text, lines) for text in texts]
        if len(set(labels)) == len(set(texts)):
            break
    return labels


def _fitted(text: str, most_lines: int) -> str:
    """Wrap a text to `_LABEL_PX`, with an ellipsis in its middle if it needs more lines.

    Settings of a label with more than one line are named by the last part of their keys.
    """
    whole = one_line(text, longest=1000)
    whole = _BLOCKS.sub("", whole) if len(_wrapped(whole)) > 1 else whole
    shown, letters = whole, min(len(whole), 60 * most_lines)
    while len(lines := _wrapped(shown)) > most_lines:
        letters -= 1
        shown = f"{whole[: letters // 2]}…{whole[len(whole) - (letters + 1) // 2 :]}"
    return "\n".join(map(in_plot, lines))


def _wrapped(text: str) -> list[str]:
    """Break a text into lines of at most `_LABEL_PX`, inside words only if they are wider."""
    lines = [""]
    for word in _BREAKS.split(text):
        for part in [word] if _width_px(word) <= _LABEL_PX else word:
            if _width_px((lines[-1] + part).rstrip()) > _LABEL_PX:
                lines.append("")
            lines[-1] += part
    return [line.strip() for line in lines]


def _width_px(text: str) -> float:
    return sum(map(_letter_px, text))


@cache
def _letter_px(letter: str) -> float:
    font = FontProperties(size=FONT_PX)
    return text_to_path.get_text_width_height_descent(letter, font, ismath=False)[0]


def range_of(means: Sequence[float], more: Iterable[float] = ()) -> tuple[float, float]:
    """Return the least and greatest mean, without an outlier that alone doubles the range.

    more: values that the range always includes.
    """
    fixed, kept = list(more), sorted(means)
    if len(kept) > 3 and kept[-1] - kept[0] > 2 * (kept[-2] - kept[0]) > 0:
        kept.pop()
    if len(kept) > 3 and kept[-1] - kept[0] > 2 * (kept[-1] - kept[1]) > 0:
        kept.pop(0)
    return min([*fixed, *kept]), max([*fixed, *kept])


def _draw_line(axes: Axes, label: str, value: float, y: float, signed: bool) -> None:
    low, high = axes.get_xlim()
    text = label if signed else f"{label} {value:.2f}"
    if not low <= value <= high:
        arrow, x, side = ("← ", low, "left") if value < low else (" →", high, "right")
        axes.text(x, y, f"{arrow}{text}" if value < low else text + arrow, ha=side, va="center")
        return
    axes.plot(
        [value, value], [y + 0.35, axes.get_ylim()[0]], color=QUIET, lw=1.2, ls="--", zorder=1
    )
    side = "left" if value < low + 0.2 * (high - low) else "right"
    side = "center" if 0.3 < (value - low) / (high - low) < 0.7 else side
    axes.text(value, y, text, ha=side, va="center", color=INK)


def _draw_dot(axes: Axes, dot: Dot, row: int, form: str) -> None:
    low, high = axes.get_xlim()
    axes.text(1.04, row, form.format(dot.mean), transform=axes.get_yaxis_transform(), va="center")
    if not low <= dot.mean <= high:
        edge, marker = (high, ">") if dot.mean > high else (low, "<")
        axes.plot([edge], [row], marker, color=LIGHT[4], ms=9, clip_on=False)
        return
    axes.plot(dot.runs, [row] * len(dot.runs), "o", ms=5, color=LIGHT[2], alpha=0.7, zorder=2)
    if dot.half_width:
        axes.plot(
            [dot.mean - dot.half_width, dot.mean + dot.half_width], [row, row], color=LIGHT[4]
        )
    axes.plot([dot.mean], [row], "D" if dot.runs else "o", ms=7, color=LIGHT[4], zorder=3)


@rc_context(_STYLE)
def learning_curves(curves: Sequence[Curve]) -> Figure:
    """Draw mean errors over epochs: the best five in color with their names, the others in gray."""
    curves = sorted(curves, key=lambda curve: curve.points[-1].mean)
    figure, axes = _new_figure(330)
    axes.set_yscale("log")
    last_x = max(curve.points[-1].x for curve in curves)
    for index, curve in reversed(list(enumerate(curves))):
        color, width = (LIGHT[1 + index], 2.2) if index < BEST else (QUIET, 1.0)
        x, y = [point.x for point in curve.points], [point.mean for point in curve.points]
        axes.plot(x, y, color=color, lw=width, marker="o", ms=4 if index < BEST else 0)
    low, high = axes.get_ylim()
    ticks = [tick for tick in of_errors([low, high], 0, 1).ticks if low <= tick <= high]
    axes.yaxis.set_major_locator(FixedLocator(ticks))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.set_xlim(0, last_x * 1.02)
    axes.set_xlabel("epoch")
    axes.set_title(curves[0].metric.on_test(), loc="left", fontsize=FONT_PX)
    named = [*curves[:BEST], *curves[-1:]] if len(curves) > BEST else curves
    places = axes.transAxes.inverted()
    ends = [places.transform(axes.transData.transform((0, c.points[-1].mean)))[1] for c in named]
    labels = [_fitted(curve.method, 2) for curve in named]
    gap = 0.075 * (1 + max(label.count("\n") for label in labels))
    for index, place in enumerate(spread_apart(ends, gap, 0.0, 1.0)):
        text = labels[index] if index < BEST else f"{len(curves) - BEST} others"
        color = LIGHT[1 + index] if index < BEST else QUIET
        axes.text(1.03, place, text, color=color, va="center", transform=axes.transAxes)
    return figure


def _new_figure(height_px: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH / 72, height_px / 72), dpi=72, layout="constrained")
    return figure, figure.subplots()


def as_png(figure: Figure) -> bytes:
    """Render a figure at three pixels per px on white."""
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=216, facecolor=LIGHT_PAPER)
    return png.getvalue()


def as_svg(figure: Figure) -> bytes:
    """Render a figure with text as text and colors that follow the reader's scheme."""
    file = io.StringIO()
    with rc_context(_STYLE):
        figure.savefig(file, format="svg", metadata={"Date": None})
    svg = re.sub(r'(width|height)="([\d.]+)pt"', r'\1="\2"', file.getvalue())
    svg = re.sub("font-family: [^;]*", "font-family: system-ui, sans-serif", svg)
    names = {light: f"--c{number}" for number, light in enumerate(_DARK_OF)}
    svg = re.sub("|".join(names), lambda found: f"var({names[found[0]]})", svg)
    light, dark = (
        " ".join(f"{name}: {color};" for name, color in zip(names.values(), colors, strict=True))
        for colors in (_DARK_OF.keys(), _DARK_OF.values())
    )
    style = f"svg {{ {light} }} @media (prefers-color-scheme: dark) {{ svg {{ {dark} }} }}"
    return svg.replace("<defs>", f"<style>{style}</style>\n <defs>", 1).encode()
