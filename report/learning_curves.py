"""The section of the page with the learning curves, by epochs and by seconds.

Two radio buttons choose between the two and the style sheet hides the other one, so that it works
without scripts. Each is there in two sizes, for wide and for narrow windows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from teach_once.report.curves import Curve, curves_of, epochs_of, seconds_of
from teach_once.report.intervals import LEVEL
from teach_once.report.line_chart import MOST_BANDS, NARROW, WIDE, Size, line_chart
from teach_once.report.runs import Result


def errors_by_epoch(results: Sequence[Result], size: Size = WIDE) -> str:
    """SVG: the top-1 error of every method, over its tested epochs."""
    return line_chart(curves_of(results, epochs_of), size, "epoch", whole_x=True)


def errors_by_time(results: Sequence[Result], size: Size = WIDE) -> str:
    """SVG: the top-1 error of every method, over seconds of training."""
    return line_chart(curves_of(results, seconds_of), size, "seconds of training", whole_x=False)


def learning_curves(results: Sequence[Result]) -> list[str]:
    """Nothing where no run was tested on the way, or the runs' metrics are gone."""
    curves = curves_of(results, epochs_of)
    if not curves:
        return []
    return [
        "<h2>Learning curves</h2>",
        '<div class="curves">',
        '<input type="radio" name="x" id="by-epoch" checked><label for="by-epoch">epochs</label>',
        '<input type="radio" name="x" id="by-time"><label for="by-time">seconds</label>',
        f'<div class="by-epoch">{_both_sizes(errors_by_epoch, results)}</div>',
        f'<div class="by-time">{_both_sizes(errors_by_time, results)}</div>',
        "</div>",
        f'<p class="quiet">Means over seeds. {_what_bands_are(curves)}</p>',
    ]


def _both_sizes(draw: Callable[[Sequence[Result], Size], str], results: Sequence[Result]) -> str:
    return f"{draw(results, WIDE)}{draw(results, NARROW)}"


def _what_bands_are(curves: Sequence[Curve]) -> str:
    seeds = {curve.num_seeds for curve in curves}
    several = sorted(number for number in seeds if number > 1)
    if not several:
        return "One seed each, so that there are no intervals."
    n = f"{several[0]}" if len(several) == 1 else f"{several[0]} to {several[-1]}"
    bands = ", and bands" if len(curves) <= MOST_BANDS else ""
    hidden = "" if bands else " Point at a line or its name to see the intervals of all epochs."
    alone = " Lines without a bar have one seed." if 1 in seeds else ""
    return (
        f"Bars beside the last epoch{bands}: {LEVEL:.0%} confidence intervals of the mean "
        f"(Student's t, n = {n} seeds), cut off at the chart's edge.{hidden}{alone}"
    )
