"""Sizes and durations as people read them."""

from __future__ import annotations


def format_size(num_bytes: float) -> str:
    """Bytes, in decimal units: 1,234,567 -> "1.2 MB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:,.0f} {unit}" if unit == "B" else f"{num_bytes:,.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:,.1f} TB"


def format_duration(hours: float) -> str:
    """Hours, in the unit that suits them: 0.5 -> "30.0 min"."""
    if hours >= 1:
        return f"{hours:,.1f} h"
    return f"{hours * 60:,.1f} min" if hours >= 1 / 60 else f"{hours * 3600:,.0f} s"
