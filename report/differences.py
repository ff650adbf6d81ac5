"""Differences of the methods to the student alone (ce) and to kd, paired by seed, with intervals.
If a method has rows with different settings, they are also compared with the first of these rows.

Two methods with the same seed share the order of the samples and the student's initial weights, so
the differences between them vary less than the errors themselves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from teach_once.report.intervals import LEVEL
from teach_once.report.table import Cell, PairedDifference, Row

MEANING = (
    f"Differences of the last epoch in percentage points; negative is better. Intervals: "
    f"{LEVEL:.0%} confidence, Student's t with n - 1 degrees of freedom, over the n seeds of both "
    f"methods; not corrected for the number of rows."
)
_WIDTH, _HEIGHT = 150.0, 14.0  # of a bar, in px


def known_differences(rows: Sequence[Row]) -> list[tuple[Row, str, PairedDifference]]:
    """Return (row, reference, difference) of the pairs with at least two common seeds.

    Sorted by difference, the lowest first.
    """
    found = [(row, "ce", row.to_ce) for row in rows] + [(row, "kd", row.to_kd) for row in rows]
    others = [(row, *row.to_other) for row in rows if row.to_other]
    known = [(row, to, each) for row, to, each in [*found, *others] if each and each.interval]
    return sorted(known, key=lambda each: each[2].mean)


def difference_cells(rows: Sequence[Row]) -> list[list[Cell]]:
    """Return a header and one line per difference; nothing if no two methods share two seeds."""
    header = ["method", "against", "seeds", "difference", f"{LEVEL:.0%} interval", "p"]
    lines = [list(_cells(*each)) for each in known_differences(rows)]
    return [[Cell(title) for title in header], *lines] if lines else []


def _cells(row: Row, baseline: str, difference: PairedDifference) -> Iterator[Cell]:
    interval, p = difference.interval, difference.p
    assert interval is not None
    yield Cell(row.method)
    yield Cell(baseline)
    yield Cell(str(interval.count), interval.count)
    yield Cell(f"{difference.mean:+.2f}", difference.mean)
    # If all differences are equal, Student's t interval would be a single point.
    yield (
        Cell() if p is None else Cell(f"{interval.low:+.2f} to {interval.high:+.2f}", interval.low)
    )
    yield Cell() if p is None else Cell(f"{p:.2g}", p)


def interval_bars(rows: Sequence[Row]) -> list[str]:
    """Draw an SVG for each line of `difference_cells`: the interval, and a dashed line at zero.

    All share one scale, which the wide intervals of few seeds may exceed.
    """
    known = [difference for _, _, difference in known_differences(rows)]
    bounds = [max(-d.interval.low, d.interval.high) for d in known if d.interval]
    means = [abs(difference.mean) for difference in known]
    reach = max(min(max(bounds, default=0), 2.5 * max(means, default=0)), 1e-3)
    return [_bar(difference, reach) for difference in known]


def _bar(difference: PairedDifference, reach: float) -> str:
    def px(value: float) -> str:
        return f"{_WIDTH / 2 * (1 + max(-1.0, min(1.0, value / reach)) * 0.97):.1f}"

    assert difference.interval is not None
    low, high, middle = difference.interval.low, difference.interval.high, _HEIGHT / 2
    ends = "".join(f"M{px(end)} {middle - 3:g}v6" for end in (low, high) if abs(end) <= reach)
    return (
        f'<svg class="bar" viewBox="0 0 {_WIDTH:g} {_HEIGHT:g}" aria-hidden="true">'
        f'<path class="zero" d="M{_WIDTH / 2:g} 0v{_HEIGHT:g}"/>'
        f'<path d="M{px(low)} {middle:g}H{px(high)}{ends}"/>'
        f'<circle cx="{px(difference.mean)}" cy="{middle:g}" r="3"/></svg>'
    )
