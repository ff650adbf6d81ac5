"""Axes of the line chart: where values lie, which ticks they get, where labels find room."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

_ERROR_TICKS = (0, 1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100)
_FEWEST_TICKS = 4


@dataclass(frozen=True)
class Axis:
    """From values to pixels. is_log: linear up to 1 and logarithmic above, as errors are drawn."""

    low: float
    high: float
    start_px: float
    end_px: float
    ticks: Sequence[float]
    is_log: bool = False

    def px(self, value: float) -> float:
        """Values outside of the axis lie on its ends."""
        inside = min(max(value, self.low), self.high)
        low, high, here = (self._scaled(each) for each in (self.low, self.high, inside))
        return self.start_px + (here - low) / (high - low) * (self.end_px - self.start_px)

    def _scaled(self, value: float) -> float:
        return 1 + math.log(value) if self.is_log and value > 1 else value


def from_zero(highest: float, start_px: float, end_px: float, *, whole: bool) -> Axis:
    """whole: ticks lie at whole numbers only."""
    high = highest if highest > 1e-3 else 1.0
    ticks = _round_ticks(0, high, at_most=max(2, int((end_px - start_px) / 70)), whole=whole)
    return Axis(0, high, start_px, end_px, ticks)


def of_errors(errors: Sequence[float], start_px: float, end_px: float) -> Axis:
    """In percent. Methods lie close together at the end of training, hence the logarithm."""
    low = min(errors) * 0.85 if min(errors) > 1 else 0.0
    high = max(errors) * 1.1 + 0.1
    ticks: Sequence[float] = [tick for tick in _ERROR_TICKS if low <= tick <= high]
    if len(ticks) < _FEWEST_TICKS:
        ticks = _round_ticks(low, high, at_most=8, whole=False)
    return Axis(low, high, start_px, end_px, ticks, is_log=True)


def _round_ticks(low: float, high: float, *, at_most: int, whole: bool) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten."""
    raw = (high - low) / at_most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * each for each in (1, 2, 5, 10, 20) if power * each >= raw)
    step = max(step, 1.0) if whole else step
    first, last = math.ceil(low / step), math.floor(high / step)
    return [round(number * step, 12) for number in range(first, last + 1)]


def spread_apart(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions at least `gap` apart between low and high, near to the wanted ones.

    Those that would touch are centred on where they wanted to be. In the order of `wanted`; they
    overflow `high` where there is no room for all.
    """
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    groups: list[tuple[float, int]] = []  # where a group of touching labels starts, its size
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
