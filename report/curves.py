"""The learning curves as numbers: per method and epoch the mean over seeds, with its interval."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from teach_once.report.intervals import Interval, t_interval
from teach_once.report.runs import Point, Result

_MOST_POINTS = 400  # of a line: more than its pixels


@dataclass(frozen=True)
class CurvePoint:
    """One epoch of a method. x: epochs or seconds; interval: None with one seed."""

    x: float
    mean: float
    interval: Interval | None


@dataclass(frozen=True)
class Curve:
    """One method; `points` is not empty and ascends in x."""

    method: str
    num_seeds: int
    points: Sequence[CurvePoint]


def epochs_of(point: Point) -> float:
    return point.epoch


def seconds_of(point: Point) -> float:
    return point.seconds


def curves_of(results: Sequence[Result], x_of: Callable[[Point], float]) -> list[Curve]:
    """Per method the epochs that all of its seeds were tested in; x is a mean over seeds too."""
    grouped: dict[str, list[Result]] = {}
    for result in results:
        grouped.setdefault(result.method, []).append(result)
    curves = [Curve(name, len(runs), _points(runs, x_of)) for name, runs in grouped.items()]
    return [curve for curve in curves if curve.points]


def _points(runs: Sequence[Result], x_of: Callable[[Point], float]) -> list[CurvePoint]:
    tested = [{p.epoch: p for p in run.curve if p.top1 is not None} for run in runs]
    epochs = sorted(set.intersection(*(set(each) for each in tested)))
    points = []
    for epoch in _thinned(epochs):
        of_seeds = [each[epoch] for each in tested]
        errors = [point.top1 for point in of_seeds if point.top1 is not None]
        x = statistics.fmean(map(x_of, of_seeds))
        points.append(CurvePoint(x, statistics.fmean(errors), t_interval(errors)))
    return points


def _thinned(epochs: Sequence[int]) -> Sequence[int]:
    """Evenly, with the last one."""
    step = -(-len(epochs) // _MOST_POINTS)
    return epochs[::-1][::step][::-1] if step > 1 else epochs
