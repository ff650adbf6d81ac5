"""The report's charts: the error per method as PNG, the learning curves as SVG."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from report.runs import Point, Result
from report.table import Row
from runtime.text import in_plot

_COLOURS = (
    *("#b03a2e", "#1b4f8f", "#2a7f3f", "#c77c11", "#6c3a9c", "#118a8a", "#7a5230", "#d14d8b"),
    *("#4d5a66", "#8a9a12", "#3a7bd5", "#a83232"),
)
_MOST_INCHES = 60  # of width
_TICKS = (0, 1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100)


def errors_by_method(
    rows: Sequence[Row], results: Sequence[Result], teacher: Mapping[str, float], title: str
) -> bytes:
    """PNG bytes: per method the runs as dots, mean and deviation as a bar, two reference lines."""
    width = min(1.6 + 1.0 * len(rows), _MOST_INCHES)
    figure = Figure(figsize=(width, 4.2), dpi=150, layout="constrained")
    axes = figure.subplots()
    _draw_methods(axes, rows, results)
    _draw_references(axes, rows, teacher)
    axes.set_ylabel("top-1 test error, last epoch (%)")
    axes.set_title(in_plot(title), fontsize=10)
    axes.margins(x=0.1)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize=8, framealpha=0.9)
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()


def _draw_methods(axes: Axes, rows: Sequence[Row], results: Sequence[Result]) -> None:
    names = [row.method for row in rows]
    slanted = len(rows) > 7
    axes.set_xticks(
        range(len(names)),
        [in_plot(name) for name in names],
        rotation=30 if slanted else 0,
        ha="right" if slanted else "center",
    )
    axes.errorbar(
        range(len(names)),
        [row.cells["last_top1"].mean for row in rows],
        yerr=[row.cells["last_top1"].std or 0.0 for row in rows],
        fmt="o",
        capsize=5,
        color="#1b4f8f",
        zorder=3,
        label="mean ± std",
    )
    beside = [names.index(result.method) + 0.1 for result in results]
    errors = [result.last.top1 for result in results]
    axes.plot(beside, errors, "o", ms=4, color="#6f9fd8", zorder=2, label="runs")


def _draw_references(axes: Axes, rows: Sequence[Row], teacher: Mapping[str, float]) -> None:
    if "test_top1_error" in teacher:
        axes.axhline(teacher["test_top1_error"], color="#2a7f3f", linestyle="--", label="teacher")
    for row in rows:
        if row.method == "ce":
            mean, label = row.cells["last_top1"].mean, "student alone (ce)"
            axes.axhline(mean, color="#b03a2e", linestyle=":", label=label)


def errors_by_epoch(results: Sequence[Result]) -> bytes:
    """SVG bytes: the top-1 error of every method, over its tested epochs."""
    return _curves(results, "epoch", lambda point: point.epoch)


def errors_by_time(results: Sequence[Result]) -> bytes:
    """SVG bytes: the top-1 error of every method, over seconds of training."""
    return _curves(results, "seconds of training", lambda point: point.seconds)


def _curves(results: Sequence[Result], label: str, x_of: Callable[[Point], float]) -> bytes:
    figure = Figure(figsize=(6.2, 4.4), layout="constrained")
    axes = figure.subplots()
    methods = dict.fromkeys(result.method for result in results)
    for method, colour in zip(methods, cycle(_COLOURS), strict=False):
        _draw_method(axes, [r for r in results if r.method == method], x_of, colour)
    axes.set_xlabel(label)
    if label == "epoch":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _scale_errors(axes, [p.top1 for r in results for p in r.curve if p.top1 is not None])
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, ncols=2, framealpha=0.9)
    svg = io.BytesIO()
    figure.savefig(svg, format="svg", metadata={"Date": None})
    return svg.getvalue()


def _draw_method(
    axes: Axes, results: Sequence[Result], x_of: Callable[[Point], float], colour: str
) -> None:
    """The mean over seeds, in a band from the lowest to the highest; one line per method."""
    of_seeds = [
        [(x_of(point), point.top1) for point in result.curve if point.top1 is not None]
        for result in results
    ]
    by_epoch = list(zip(*of_seeds, strict=False))
    xs = [sum(x for x, _ in points) / len(points) for points in by_epoch]
    errors = [[error for _, error in points] for points in by_epoch]
    means = [sum(each) / len(each) for each in errors]
    axes.plot(xs, means, color=colour, lw=1.6, label=in_plot(results[0].method))
    low, high = [min(each) for each in errors], [max(each) for each in errors]
    axes.fill_between(xs, low, high, color=colour, alpha=0.1, lw=0)


def _scale_errors(axes: Axes, errors: Sequence[float]) -> None:
    axes.set_ylabel("top-1 test error (%)")
    axes.set_yscale("symlog", linthresh=1.0)  # methods lie close together at the end of training
    axes.set_yticks(_TICKS, [f"{tick:g}" for tick in _TICKS])
    if errors:
        axes.set_ylim(min(errors) * 0.7 if min(errors) > 1 else 0, max(errors) * 1.15 + 0.1)
