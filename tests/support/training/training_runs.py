"""Read the results of runs, and compare two runs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def without_times(folder: Path) -> list[dict[str, object]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in line.items() if "seconds" not in k and k != "check"} for line in lines
    ]


def largest_relative(a: list[float], b: list[float]) -> float:
    return max(abs(x - y) / max(abs(x), 1e-12) for x, y in zip(a, b, strict=True))


def metrics_of_logits(card: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics of an export's card that its program's logits determine."""
    return {name: value for name, value in card["metrics"].items() if "neighbor" not in name}
