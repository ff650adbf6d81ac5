"""Format sizes, durations, rates and tables for people."""

from __future__ import annotations

from collections.abc import Sequence

_LABEL_WIDTH = 9  # of the rows of all plans


def format_size(num_bytes: float) -> str:
    """Format bytes in decimal units: 1,234,567 -> "1.2 MB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:,.0f} {unit}" if unit == "B" else f"{num_bytes:,.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:,.1f} TB"


def format_duration(hours: float) -> str:
    """Format hours in a suitable unit: 0.5 -> "30.0 min"."""
    if hours >= 1:
        return f"{hours:,.1f} h"
    return f"{hours * 60:,.1f} min" if hours >= 1 / 60 else f"{hours * 3600:,.0f} s"


def format_rate(per_second: float) -> str:
    """Format a rate with enough digits: 1234.5 -> "1,234", 0.0512 -> "0.051"."""
    return f"{per_second:,.0f}" if per_second >= 10 else f"{per_second:.2g}"


def counted(number: int, noun: str) -> str:
    """Format a number with its noun: 1 -> "1 view", 2,000 -> "2,000 views"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def format_age(seconds: float) -> str:
    """Format seconds in the largest whole unit: 200 -> "3 min"."""
    for size, unit in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Format rows as lines with left-aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(map(str.ljust, row, widths)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def format_rows(rows: Sequence[tuple[str, str]]) -> str:
    """Format labels and values as lines, as in a plan: labels are padded to a common width."""
    return "\n".join(f"{label:<{_LABEL_WIDTH}}{value}" for label, value in rows)
