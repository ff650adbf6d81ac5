"""Confidence intervals of means over seeds, from Student's t distribution.

They take the seeds for independent draws of a normal distribution, and are not corrected for the
number of comparisons. scipy is loaded where an interval is asked for, since it takes a while.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

LEVEL = 0.95
_ROUNDING = 1e-9  # of differences of errors in percent; one of 10⁹ samples is a hundred times more


@dataclass(frozen=True)
class Interval:
    """The mean of `count` values, and how far its confidence interval reaches to either side."""

    mean: float
    half_width: float
    count: int

    @property
    def low(self) -> float:
        return self.mean - self.half_width

    @property
    def high(self) -> float:
        return self.mean + self.half_width


def t_interval(values: Sequence[float]) -> Interval | None:
    """mean ± t(n - 1) · s / √n at `LEVEL`; None of fewer than two values, which have no s."""
    if len(values) < 2:
        return None
    error = statistics.stdev(values) / len(values) ** 0.5
    return Interval(statistics.fmean(values), _quantile(len(values) - 1) * error, len(values))


def paired_p(gaps: Sequence[float]) -> float | None:
    """Two-sided p of a paired t-test; None of fewer than two gaps, or if all are equal.

    Equal up to rounding: 10.3 - 7.3 and 11.3 - 8.3 differ in their last bits alone.
    """
    if len(gaps) < 2 or max(gaps) - min(gaps) < _ROUNDING:
        return None
    from scipy.special import stdtr

    t = statistics.fmean(gaps) / (statistics.stdev(gaps) / len(gaps) ** 0.5)
    return float(2 * stdtr(len(gaps) - 1, -abs(t)))


@cache
def _quantile(degrees_of_freedom: int) -> float:
    from scipy.special import stdtrit

    return float(stdtrit(degrees_of_freedom, (1 + LEVEL) / 2))
