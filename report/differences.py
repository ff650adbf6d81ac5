"""Differences of the methods to the student alone (ce) and to kd, paired by seed, with intervals.
If a method has rows with different settings, they are also compared with the first of these rows.

Two methods with the same seed share the order of the samples and the student's initial weights, so
the differences between them vary less than the errors themselves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from teach_once.report.intervals import FEWEST_SEEDS, LEVEL, Interval
from teach_once.report.table import Cell, PairedDifference, Row

MEANING = (
    f"Differences of the last epoch in percentage points; negative is better. Intervals: "
    f"{LEVEL:.0%} confidence, Student's t with n - 1 degrees of freedom, over the n seeds of both "
    f"methods; not corrected for the number of rows. With fewer than {FEWEST_SEEDS} seeds, no "
    f"interval is given."
)
_WIDTH, _HEIGHT = 150.0, 14.0  # of a bar, in px


def known_differences(rows: Sequence[Row]) -> list[tuple[Row, str, PairedDifference]]:
    """Return (row, reference, difference) of the pairs with at least two common seeds.

    Sorted by difference, the lowest first.
    """
    found = [(row, "ce", row.to_ce) for row in rows] + [(row, "kd", row.to_kd) for row in rows]
    others = [(row, *row.to_other) for row in rows if row.to_other]
    known = [(row, to, each) for row, to, each in [*found, *others] if each and each.num_seeds > 1]
    return sorted(known, key=lambda each: each[2].mean)


def difference_cells(rows: Sequence[Row]) -> list[list[Cell]]:
    """Return a header and one line per difference; nothing if no two methods share two seeds."""
    header = ["method", "against", "seeds", "difference", f"{LEVEL:.0%} interval", "p"]
    lines = [list(_cells(*each)) for each in known_differences(rows)]
    return [[Cell(title) for title in header], *lines] if lines else []


def _cells(row: Row, baseline: str, difference: PairedDifference) -> Iterator[Cell]:
    interval, p = difference.interval, difference.p
    yield Cell(row.method)
    yield Cell(baseline)
    yield Cell(str(difference.num_seeds), difference.num_seeds)
    yield Cell(f"{difference.mean:+.2f}", difference.mean)
    # If all differences are equal, Student's t interval would be a single point.
    if interval is None or p is None:
        yield Cell()
    else:
        yield Cell(f"{interval.low:+.2f} to {interval.high:+.2f}", interval.low)
    yield Cell() if p is None else Cell(f"{p:.2g}", p)


def interval_bars(rows: Sequence[Row]) -> list[str]:
    """Draw an SVG for each line of `difference_cells`: the interval, and a dashed line at zero.

    Empty for a line without an interval. All share one scale, which wide intervals may exceed.
    """
    intervals = [difference.interval for _, _, difference in known_differences(rows)]
    bounds = [max(-each.low, each.high) for each in intervals if each]
    means = [abs(each.mean) for each in intervals if each]
    reach = max(min(max(bounds, default=0), 2.5 * max(means, default=0)), 1e-3)
    return [_bar(each, reach) if each else "" for each in intervals]


def _bar(interval: Interval, reach: float) -> str:
    def px(value: float) -> str:
        return f"{_WIDTH / 2 * (1 + max(-1.0, min(1.0, value / reach)) * 0.97):.1f}"

    low, high, middle = interval.low, interval.high, _HEIGHT / 2
    ends = "".join(f"M{px(end)} {middle - 3:g}v6" for end in (low, high) if abs(end) <= reach)
    return (
        f'<svg class="bar" viewBox="0 0 {_WIDTH:g} {_HEIGHT:g}" aria-hidden="true">'
        f'<path class="zero" d="M{_WIDTH / 2:g} 0v{_HEIGHT:g}"/>'
        f'<path d="M{px(low)} {middle:g}H{px(high)}{ends}"/>'
        f'<circle cx="{px(interval.mean)}" cy="{middle:g}" r="3"/></svg>'
    )
