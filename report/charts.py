"""The report's picture: the error per method as PNG."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from teach_once.report.runs import Result
from teach_once.report.table import Row
from teach_once.runtime.safe.text import in_plot

_MOST_INCHES = 60  # of width


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
        if (row.name or row.method) == "ce":
            mean, label = row.cells["last_top1"].mean, f"student alone ({in_plot(row.method)})"
            axes.axhline(mean, color="#b03a2e", linestyle=":", label=label)
