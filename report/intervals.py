"""Confidence intervals of means over seeds, from Student's t distribution.

They assume that seeds are independent samples of a normal distribution, and are not corrected for
the number of comparisons. scipy is imported in the functions because its import is slow.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

LEVEL = 0.95
FEWEST_SEEDS = 3  # Student's t with one degree of freedom contains nearly everything
_ROUNDING = 1e-9  # in percentage points; one error in 10⁹ samples is 1e-7


@dataclass(frozen=True)
class Interval:
    """A mean with the half-width of its confidence interval."""

    mean: float
    half_width: float

    @property
    def low(self) -> float:
        return self.mean - self.half_width

    @property
    def high(self) -> float:
        return self.mean + self.half_width


def t_interval(values: Sequence[float]) -> Interval | None:
    """Return mean ± t(n - 1) · s / √n at confidence `LEVEL`; None below `FEWEST_SEEDS` values."""
    if len(values) < FEWEST_SEEDS:
        return None
    error = statistics.stdev(values) / len(values) ** 0.5
    return Interval(statistics.fmean(values), _quantile(len(values) - 1) * error)


def paired_p(gaps: Sequence[float]) -> float | None:
    """Return the two-sided p of a paired t-test; None for fewer than two gaps or if all are equal.

    Equality is up to rounding: 10.3 - 7.3 and 11.3 - 8.3 differ in their last bits only.
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
