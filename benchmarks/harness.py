"""Interleaved rounds, medians and spreads; a table for people and JSON for programs.

Rows that are compared are timed in turn, round after round, so that a slow moment of a shared
machine falls on all of them alike.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Timing:
    """Seconds of one row over all rounds."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles, relative to the median."""
        if len(self.seconds) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return (high - low) / 2 / self.median

    @property
    def mean(self) -> float:
        """Without the slowest and the fastest tenth, which belong to the machine."""
        ordered = sorted(self.seconds)
        cut = len(ordered) // 10
        return statistics.fmean(ordered[cut : len(ordered) - cut])

    def ratio_to(self, other: Timing) -> float:
        """The median over rounds of this row's seconds by the other's in the same round."""
        return statistics.median(
            ours / theirs for ours, theirs in zip(self.seconds, other.seconds, strict=True)
        )


@dataclass(frozen=True)
class Verdict:
    """A measured ratio, and the target that it should meet; without one it is only reported."""

    what: str
    value: float
    target: str = ""
    is_met_by: Callable[[float], bool] | None = None

    @property
    def mark(self) -> str:
        if self.is_met_by is None:
            return ""
        return "✓" if self.is_met_by(self.value) else "✗ missed"

    def as_plain(self) -> dict[str, Any]:
        return {"what": self.what, "value": self.value, "target": self.target, "mark": self.mark}


def verdict_table(verdicts: Sequence[Verdict]) -> str:
    rows = [[v.what, f"{v.value:,.3g}", v.target, v.mark] for v in verdicts]
    return markdown(["what", "measured", "target", ""], rows)


def interleaved(rows: Mapping[str, Callable[[], object]], rounds: int = 7) -> dict[str, Timing]:
    """Call every row once to warm up, then `rounds` times in turn; name -> timing.

    A row that returns a float has timed itself.
    """
    for run in rows.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(rounds):
        for name, run in rows.items():
            started = time.perf_counter()
            own = run()
            elapsed = time.perf_counter() - started
            seconds[name].append(own if isinstance(own, float) else elapsed)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def machine() -> str:
    """Processor, cores and versions, for the line above a table."""
    import numpy

    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [x for x in cpuinfo.read_text().splitlines() if x.startswith("model name")]
        model = names[0].split(":", 1)[1].strip() if names else model
    return (
        f"{model}, {os.cpu_count()} cores, Python {platform.python_version()}, "
        f"numpy {numpy.__version__}"
    )


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [list(header), ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def write_section(file: Path, title: str, body: str) -> None:
    """Put `body` under `## title` of a Markdown file, replacing what stood there."""
    text = file.read_text() if file.is_file() else "# Benchmarks\n"
    head, found, rest = text.partition(f"\n## {title}\n")
    following = rest.find("\n## ")
    tail = rest[following:] if found and following >= 0 else ""
    file.write_text(f"{head.rstrip()}\n\n## {title}\n\n{body.strip()}\n{tail}")


def write_json(file: Path, content: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=1) + "\n")


def parser_of(name: str, description: str | None) -> argparse.ArgumentParser:
    """With the options that every target's program has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--docs", type=Path, default=Path("docs/benchmarks.md"))
    parser.add_argument("--json", type=Path, default=Path(f"runs/benchmarks/{name}.json"))
    return parser


def publish(
    options: argparse.Namespace, title: str, text: str, verdicts: Sequence[Verdict]
) -> None:
    """Print text and verdicts; put them into the documents as one section, and into JSON."""
    body = f"{text}\n\n{verdict_table(verdicts)}"
    print(body)
    write_section(options.docs, title, body)
    write_json(options.json, [verdict.as_plain() for verdict in verdicts])
