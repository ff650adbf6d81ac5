"""Learning curves for the page: means over seeds as inline SVG.

The file contains, in order, the curves as numbers, the axes, the chart (a line, markers and an
interval band per method, named at the line's end), and the section with the charts by epochs and by
seconds. Two radio buttons select one of the two, and the style sheet hides the other, so no script
is needed. Each chart has two sizes, for wide and for narrow windows. The best five methods have
colors, which are classes of the page's style sheet and follow its light or dark scheme; the others
are gray. Neighboring lines differ in their markers too.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from teach_once.report.escape import for_html
from teach_once.report.intervals import FEWEST_SEEDS, LEVEL, Interval, t_interval
from teach_once.report.runs import Point, Result, metric_of
from teach_once.runtime.metrics import TOP1_ERROR, Metric
from teach_once.runtime.safe.text import one_line

_MOST_POINTS = 400  # per line; more would exceed its pixels


@dataclass(frozen=True)
class CurvePoint:
    """One epoch of a method. x: epochs or seconds; interval: None with one or two seeds."""

    x: float
    mean: float
    interval: Interval | None


@dataclass(frozen=True)
class Curve:
    """One method; `points` is not empty and ascends in x."""

    method: str
    num_seeds: int
    points: Sequence[CurvePoint]
    metric: Metric = TOP1_ERROR


def epochs_of(point: Point) -> float:
    return point.epoch


def seconds_of(point: Point) -> float:
    return point.seconds


def curves_of(results: Sequence[Result], x_of: Callable[[Point], float]) -> list[Curve]:
    """Return a curve per method over the epochs in which all its seeds were tested.

    x is the mean over seeds too.
    """
    metric = metric_of(results)
    grouped: dict[str, list[Result]] = {}
    for result in results:
        grouped.setdefault(result.method, []).append(result)
    curves = [
        Curve(name, len(runs), _points(runs, x_of, metric), metric)
        for name, runs in grouped.items()
    ]
    return [curve for curve in curves if curve.points]


def _points(
    runs: Sequence[Result], x_of: Callable[[Point], float], metric: Metric
) -> list[CurvePoint]:
    tested = [{p.epoch: p for p in run.curve if metric.name in (p.test or {})} for run in runs]
    epochs = sorted(set.intersection(*(set(each) for each in tested)))
    points = []
    for epoch in _thinned(epochs):
        of_seeds = [each[epoch] for each in tested]
        errors = [point.test[metric.name] for point in of_seeds if point.test is not None]
        x = statistics.fmean(map(x_of, of_seeds))
        points.append(CurvePoint(x, statistics.fmean(errors), t_interval(errors)))
    return points


def _thinned(epochs: Sequence[int]) -> Sequence[int]:
    """Keep evenly spaced epochs, including the last one."""
    step = -(-len(epochs) // _MOST_POINTS)
    return epochs[::-1][::step][::-1] if step > 1 else epochs


_ERROR_TICKS = (0, 1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100)
_FEWEST_TICKS = 4


@dataclass(frozen=True)
class Axis:
    """Map values to pixels. is_log: linear up to 1 and logarithmic above, as errors are drawn."""

    low: float
    high: float
    start_px: float
    end_px: float
    ticks: Sequence[float]
    is_log: bool = False

    def px(self, value: float) -> float:
        """Return the position of a value; values outside of the axis are clamped to its ends."""
        inside = min(max(value, self.low), self.high)
        low, high, here = (self._scaled(each) for each in (self.low, self.high, inside))
        return self.start_px + (here - low) / (high - low) * (self.end_px - self.start_px)

    def _scaled(self, value: float) -> float:
        return 1 + math.log(value) if self.is_log and value > 1 else value


def from_zero(highest: float, start_px: float, end_px: float, *, whole: bool) -> Axis:
    """Return an axis from 0 to `highest`. whole: ticks at whole numbers only."""
    high = highest if highest > 1e-3 else 1.0
    ticks = _round_ticks(0, high, at_most=max(2, int((end_px - start_px) / 70)), whole=whole)
    return Axis(0, high, start_px, end_px, ticks)


def of_errors(errors: Sequence[float], start_px: float, end_px: float) -> Axis:
    """Return an axis for errors in percent.

    It is logarithmic because methods are close together at the end of training.
    """
    low = min(errors) * 0.85 if min(errors) > 1 else 0.0
    high = max(errors) * 1.1 + 0.1
    ticks: Sequence[float] = [tick for tick in _ERROR_TICKS if low <= tick <= high]
    if len(ticks) < _FEWEST_TICKS:
        ticks = _round_ticks(low, high, at_most=8, whole=False)
    return Axis(low, high, start_px, end_px, ticks, is_log=True)


def _round_ticks(low: float, high: float, *, at_most: int, whole: bool) -> list[float]:
    """Return the multiples of 1, 2 or 5 times a power of ten between low and high."""
    raw = (high - low) / at_most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * each for each in (1, 2, 5, 10, 20) if power * each >= raw)
    step = max(step, 1.0) if whole else step
    first, last = math.ceil(low / step), math.floor(high / step)
    return [round(number * step, 12) for number in range(first, last + 1)]


def spread_apart(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Return positions at least `gap` apart, from low to high, near the wanted ones.

    Positions that would touch are centered on their wanted positions. They are in the order of
    `wanted`, and exceed `high` if there is not enough space for all.
    """
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    groups: list[tuple[float, int]] = []  # start and size of each group of touching labels
    for index in order:
        start, size = min(max(wanted[index], low), high), 1
        while groups and groups[-1][0] + groups[-1][1] * gap > start:
            before, count = groups.pop()
            start = (before * count + (start - count * gap) * size) / (count + size)
            size += count
            start = max(min(start, high - (size - 1) * gap), low)
        groups.append((start, size))
    places = [start + number * gap for start, size in groups for number in range(size)]
    return [place for _, place in sorted(zip(order, places, strict=True))]


BEST = 5  # number of methods with a color
_MARKERS = (
    "m-3.5 0a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0 -7 0z",  # circle
    "m-3.2 -3.2h6.4v6.4h-6.4z",  # square
    "m0 -4.2l4 7h-8z",  # triangle
    "m0 -4.5l4.5 4.5l-4.5 4.5l-4.5 -4.5z",  # diamond
    "m-4 -2.8h8l-4 7z",  # triangle pointing down
    "m-1.3 -4h2.6v2.7h2.7v2.6h-2.7v2.7h-2.6v-2.7h-2.7v-2.6h2.7z",  # cross
)
_MARKER_EVERY_PX = 55.0
_LABEL_GAP_PX = 16.0
_LETTER_PX = 9.0
MOST_BANDS = 6  # if there are more, bands appear one at a time, under the pointer
_MOST_STRIP_PX = 100.0
_TOP_PX, _BOTTOM_PX, _LEFT_PX = 12.0, 44.0, 44.0


@dataclass(frozen=True)
class Size:
    """Size of a chart in px; the height grows if the labels need more."""

    name: str  # class in the style sheet
    width: float
    height: float
    most_letters: int  # per label
    bar_px: float  # distance between the bars of intervals
    leader_px: float  # distance from the bars to the labels


WIDE = Size("wide", 860, 440, 26, 8, 30)
NARROW = Size("narrow", 366, 400, 13, 4, 20)


def line_chart(curves: Sequence[Curve], size: Size, x_label: str, *, whole_x: bool) -> str:
    """Draw the curves as one `<svg>`. whole_x: ticks of x at whole numbers only.

    `curves` must not be empty.
    """
    names = [_shortened(curve.method, size.most_letters) for curve in curves]
    height = max(size.height, len(curves) * _LABEL_GAP_PX + _TOP_PX + _BOTTOM_PX)
    labels_px = max(map(len, names)) * _LETTER_PX + size.leader_px
    strip_px = min(len(curves) * size.bar_px, _MOST_STRIP_PX)
    bottom = height - _BOTTOM_PX
    x = from_zero(
        max(curve.points[-1].x for curve in curves),
        *(_LEFT_PX, size.width - labels_px - strip_px),
        whole=whole_x,
    )
    y = of_errors(_errors_to_show(curves), bottom, _TOP_PX)
    ends = [y.px(curve.points[-1].mean) for curve in curves]
    label_ys = spread_apart(ends, _LABEL_GAP_PX, _TOP_PX, bottom)
    label_x = x.end_px + strip_px + size.leader_px
    by_height = sorted(range(len(curves)), key=lambda index: label_ys[index])
    metric = curves[0].metric
    parts, kinds = [_grid(x, y, x_label, metric.on_test())], color_classes(curves)
    for index, (curve, name) in enumerate(zip(curves, names, strict=True)):
        bar_x = x.end_px + strip_px * (by_height.index(index) + 1.0) / len(curves)
        label = f'<text x="{label_x:.1f}" y="{label_ys[index] + 4:.1f}">{for_html(name)}</text>'
        label += _leader(curve, x, y, label_x - 12, label_ys[index])
        label += _bar(index, curve, bar_x, y)
        parts.append(_series(index, kinds[index], curve, label, x, y))
    kind = f"chart {size.name}{' crowded' if len(curves) > MOST_BANDS else ''}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="{kind}" role="img" '
        f'viewBox="0 0 {size.width:g} {height:g}" '
        f'aria-label="{metric.on_test()} by {for_html(x_label)}">{"".join(parts)}</svg>'
    )


def color_classes(curves: Sequence[Curve]) -> list[str]:
    """Return a class per curve: a color for the best five at the end, gray for the others."""
    by_error = sorted(range(len(curves)), key=lambda index: curves[index].points[-1].mean)
    return [
        f"color{rank + 1}" if (rank := by_error.index(index)) < BEST else "others"
        for index in range(len(curves))
    ]


def _errors_to_show(curves: Sequence[Curve]) -> list[float]:
    """Return all means, and the bounds of the intervals at the end."""
    means = [point.mean for curve in curves for point in curve.points]
    last = [curve.points[-1].interval for curve in curves]
    ends = [end for each in last if each is not None for end in (each.low, each.high)]
    return means + [min(max(end, 0.0), 100.0) for end in ends]


def _shortened(text: str, most_letters: int) -> str:
    shown = one_line(text)
    return shown if len(shown) <= most_letters else f"{shown[: most_letters - 1]}…"


def _grid(x: Axis, y: Axis, x_label: str, y_label: str) -> str:
    left, right, bottom = x.start_px, x.end_px, y.start_px
    lines = "".join(f"M{left:.1f} {y.px(tick):.1f}H{right:.1f}" for tick in y.ticks)
    lines += "".join(f"M{x.px(tick):.1f} {bottom:.1f}v5" for tick in x.ticks)
    texts = [
        f'<text x="{left - 7:.1f}" y="{y.px(tick) + 4:.1f}" class="to-left">{tick:g}</text>'
        for tick in y.ticks
    ]
    texts += [
        f'<text x="{x.px(tick):.1f}" y="{bottom + 19:.1f}" class="centered">{tick:,.6g}</text>'
        for tick in x.ticks
    ]
    middle_x, middle_y = (left + right) / 2, (bottom + y.end_px) / 2
    texts += [
        f'<text x="{middle_x:.1f}" y="{bottom + 38:.1f}" class="centered">'
        f"{for_html(x_label)}</text>",
        f'<text transform="translate(12 {middle_y:.1f}) rotate(-90)" class="centered">'
        f"{for_html(y_label)}</text>",
    ]
    return f'<path class="grid" d="{lines}M{left:.1f} {bottom:.1f}H{right:.1f}"/>{"".join(texts)}'


def _series(index: int, kind: str, curve: Curve, label: str, x: Axis, y: Axis) -> str:
    """Draw a method's line. kind: class that sets the color."""
    places = [(x.px(point.x), y.px(point.mean)) for point in curve.points]
    marker = _marker(index)
    step = math.ceil(len(places) * _MARKER_EVERY_PX / (x.end_px - x.start_px))
    marks = "".join(f"M{px:.1f} {py:.1f}{marker}" for px, py in places[::-1][::step])
    line = "L".join(f"{px:.1f} {py:.1f}" for px, py in places)
    return (
        f'<g class="series {kind}"><title>{for_html(_told(curve))}</title>'
        f'{_band(curve.points, x, y)}<path class="line" d="M{line}"/>'
        f'<path class="marks" d="{marks}"/>{label}</g>'
    )


def _leader(curve: Curve, x: Axis, y: Axis, to_x: float, to_y: float) -> str:
    last = curve.points[-1]
    start = f"{x.px(last.x) + 5:.1f} {y.px(last.mean):.1f}"
    across = f"H{to_x - 10:.1f}" if to_x - 10 > x.px(last.x) + 5 else ""
    return f'<path class="leader" d="M{start}{across}L{to_x:.1f} {to_y:.1f}h8"/>'


def _bar(index: int, curve: Curve, bar_x: float, y: Axis) -> str:
    """Draw the interval at the end with the line's marker, next to the ends of the lines."""
    if (interval := curve.points[-1].interval) is None:
        return ""
    ends = f"{y.px(interval.low):.1f}V{y.px(interval.high):.1f}"
    marker = f"M{bar_x:.1f} {y.px(interval.mean):.1f}{_marker(index)}"
    return f'<path class="interval" d="M{bar_x:.1f} {ends}"/><path class="marks" d="{marker}"/>'


def _marker(index: int) -> str:
    return _MARKERS[index % len(_MARKERS)]


def _band(points: Sequence[CurvePoint], x: Axis, y: Axis) -> str:
    """Draw the intervals as an area, clipped to the axis."""
    bounds = [(x.px(p.x), p.interval) for p in points if p.interval is not None]
    upper = [f"{px:.1f} {y.px(interval.high):.1f}" for px, interval in bounds]
    lower = [f"{px:.1f} {y.px(interval.low):.1f}" for px, interval in reversed(bounds)]
    return f'<path class="band" d="M{"L".join([*upper, *lower])}Z"/>' if bounds else ""


def _told(curve: Curve) -> str:
    """Return the text that the browser shows under the pointer."""
    last = curve.points[-1]
    seeds = f"{curve.num_seeds} seed{'s' if curve.num_seeds > 1 else ''}"
    if last.interval is None:
        return f"{curve.method}: {last.mean:.2f} % at the end, {seeds}"
    low, high = last.interval.low, last.interval.high
    return (
        f"{curve.method}: {last.mean:.2f} % at the end, {LEVEL:.0%} interval {low:.2f} to "
        f"{high:.2f}, {seeds}"
    )


def errors_by_epoch(results: Sequence[Result], size: Size = WIDE) -> str:
    """Draw the compared metric of every method over its tested epochs as SVG."""
    return line_chart(curves_of(results, epochs_of), size, "epoch", whole_x=True)


def errors_by_time(results: Sequence[Result], size: Size = WIDE) -> str:
    """Draw the compared metric of every method over seconds of training as SVG."""
    return line_chart(curves_of(results, seconds_of), size, "seconds of training", whole_x=False)


def learning_curves(results: Sequence[Result]) -> list[str]:
    """Format the section; nothing if the runs were not tested during training or lack metrics."""
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
    several = sorted(number for number in seeds if number >= FEWEST_SEEDS)
    if not several:
        return f"No method has {FEWEST_SEEDS} seeds, so there are no intervals."
    n = f"{several[0]}" if len(several) == 1 else f"{several[0]} to {several[-1]}"
    bands = ", and bands" if len(curves) <= MOST_BANDS else ""
    hidden = "" if bands else " Point at a line or its name to see the intervals of all epochs."
    alone = ""
    if min(seeds) < FEWEST_SEEDS:
        alone = f" Lines without a bar have fewer than {FEWEST_SEEDS} seeds."
    return (
        f"Bars next to the last epoch{bands}: {LEVEL:.0%} confidence intervals of the mean "
        f"(Student's t, n = {n} seeds), clipped at the chart's edge.{hidden}{alone}"
    )
