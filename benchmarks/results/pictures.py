"""The pictures of the results page as PNG bytes, drawn from the runs that the tables show.

`errors`: a dot per run. `curves`: the error of each tested epoch. `stored`: the error against what
the cache takes per image.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, ScalarFormatter

from benchmarks.results.kept import LabeledResult
from benchmarks.results.tables import MethodRuns, by_label, teacher_of
from teach_once.report.charts import errors_by_method
from teach_once.report.table import rows_of

_ERROR = "top-1 test error, last epoch (%)"
# Okabe and Ito's, which people with any color vision can tell apart.
_COLORS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7f7f7f")
_MARKERS = "osD^v<>P"
_TICKS = (1, 2, 3, 5, 7, 10, 12, 14, 16, 18, 20, 22, 25, 30, 40, 50, 60, 80, 100)  # in percent


def _errors(runs: Sequence[LabeledResult]) -> bytes:
    results = [run.result for run in runs]
    return errors_by_method(rows_of(results), results, teacher_of(runs), results[0].student)


def _curves(runs: Sequence[LabeledResult]) -> bytes:
    figure = Figure(figsize=(7, 4.2), dpi=150, layout="constrained")
    axes = figure.subplots()
    for index, each in enumerate(by_label(runs)):
        _draw_curve(axes, each, index)
    _separate_small_errors(axes)
    axes.set_xticks(sorted({epoch for each in by_label(runs) for epoch in each.tested_epochs}))
    axes.set_xlabel("epoch")
    axes.set_ylabel("top-1 test error (%)")
    axes.set_title(f"{runs[0].result.student}: mean ± standard deviation over seeds", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return _png(figure)


def _separate_small_errors(axes: Axes) -> None:
    """A logarithmic axis: methods lie close together at the end of training."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.set_yticks([tick for tick in _TICKS if low <= tick <= high])
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_locator(NullLocator())


def _draw_curve(axes: Axes, each: MethodRuns, index: int) -> None:
    tested = [(epoch, error) for epoch in each.tested_epochs if (error := each.error_at(epoch))]
    axes.errorbar(
        [epoch for epoch, _ in tested],
        [error.mean for _, error in tested],
        yerr=[error.std or 0.0 for _, error in tested],
        marker=_MARKERS[index % len(_MARKERS)],
        color=_COLORS[index % len(_COLORS)],
        capsize=3,
        ms=5,
        lw=1.2,
        label=each.label,
    )


def _stored(runs: Sequence[LabeledResult]) -> bytes:
    """The teacher in the loop stores nothing: a line across."""
    figure = Figure(figsize=(7, 4.2), dpi=150, layout="constrained")
    axes = figure.subplots()
    for index, each in enumerate(by_label(runs)):
        color, error = _COLORS[index % len(_COLORS)], each.error
        if size := each.bytes_per_image:
            axes.errorbar(
                size,
                error.mean,
                yerr=error.std or 0.0,
                marker=_MARKERS[index % len(_MARKERS)],
                color=color,
                capsize=4,
                lw=1.2,
                label=each.label,
            )
        else:
            axes.axhline(error.mean, color=color, linestyle="--", label=each.label)
            spread = error.std or 0.0
            axes.axhspan(error.mean - spread, error.mean + spread, color=color, alpha=0.1)
    axes.set_xscale("log")
    axes.set_xlabel("bytes per image in the cache, all views")
    axes.set_ylabel(_ERROR)
    axes.set_title(f"{runs[0].result.student}: mean ± standard deviation over seeds", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return _png(figure)


def _png(figure: Figure) -> bytes:
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()


PICTURES: Mapping[str, Callable[[Sequence[LabeledResult]], bytes]] = {
    "errors": _errors,
    "curves": _curves,
    "stored": _stored,
}
