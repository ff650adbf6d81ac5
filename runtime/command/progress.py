"""Progress of a long pass: a live bar on a terminal, otherwise an occasional line."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

_SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Progress in `unit`s up to `total`, with the rate and the time left. A context manager."""

    def __init__(self, total: int, unit: str, console: Console) -> None:
        self._total, self._unit, self._console = total, unit, console
        self._done, self.note = 0, ""  # note: printed after the rate
        self._started = self._last_line = time.perf_counter()
        self._bar = Bar(
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("pass", total=total, rate="")

    def advance(self, count: int) -> None:
        self._done += count
        self._bar.update(self._task, advance=count, rate=self._rate_text())
        now = time.perf_counter()
        if not self._console.is_terminal and now - self._last_line > _SECONDS_BETWEEN_LINES:
            self._last_line = now
            left = (self._total - self._done) / max(self.rate, 1e-9)
            self._console.print(
                f"{self._done:,} of {self._total:,} {self._unit}, {self._rate_text()}, "
                f"ETA {left:,.0f} s"
            )

    def skip(self, count: int) -> None:
        """Count `count` units that were done earlier; they do not affect the rate."""
        self._total -= count
        self._bar.update(self._task, total=self._total)

    @property
    def rate(self) -> float:
        """Return the units per second so far."""
        return self._done / max(time.perf_counter() - self._started, 1e-9)

    def _rate_text(self) -> str:
        return f"{self.rate:,.0f} {self._unit}/s{self.note}"

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._bar.stop()
        if self._done and error is None:
            seconds = time.perf_counter() - self._started
            self._console.print(
                f"{self._done:,} {self._unit} in {seconds:,.1f} s, {self._rate_text()}"
            )
