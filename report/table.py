"""The results as a table: one row per method over its seeds, or one line per run as CSV."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from report.escape import for_csv, for_markdown
from report.runs import Errors, Result

_COLUMNS = {
    "last_top1": "top-1 error, last (%)",
    "last_top5": "top-5 error, last (%)",
    "best_top1": "top-1 error, best (%)",
    "best_top5": "top-5 error, best (%)",
    "seconds": "seconds per run",
}
_OF_TEACHER = {"last_top1": "test_top1_error", "last_top5": "test_top5_error"}


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation; a single value has no deviation."""

    mean: float
    std: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        std = statistics.stdev(values) if len(values) > 1 else None
        return cls(statistics.fmean(values), std)

    def __str__(self) -> str:
        return f"{self.mean:.2f}" + ("" if self.std is None else f" ± {self.std:.2f}")


@dataclass(frozen=True)
class Difference:
    """Of a method's last top-1 error to another's, over the seeds that both have.

    p: two-sided, of a paired t-test; None with fewer than two seeds or without any spread.
    """

    mean: float
    p: float | None

    def __str__(self) -> str:
        return f"{self.mean:+.2f}" + ("" if self.p is None else f" (p = {self.p:.2g})")


@dataclass(frozen=True)
class Row:
    """One method over all its seeds; `cells` by the names of the columns."""

    method: str
    num_seeds: int
    cells: dict[str, Spread]
    model: str = ""
    to_ce: Difference | None = None
    to_kd: Difference | None = None


def rows_of(results: Iterable[Result]) -> list[Row]:
    """Group results by method, in the order in which the methods first come."""
    grouped: dict[str, list[Result]] = {}
    for result in results:
        grouped.setdefault(result.method, []).append(result)
    return [
        Row(
            method,
            len(runs),
            _cells(runs),
            runs[0].model,
            _difference(runs, grouped.get("ce", [])) if method != "ce" else None,
            _difference(runs, grouped.get("kd", [])) if method not in ("ce", "kd") else None,
        )
        for method, runs in grouped.items()
    ]


def _cells(results: Sequence[Result]) -> dict[str, Spread]:
    """By the names of `_COLUMNS`; without top-5 errors where they say nothing."""
    values = [{**_errors(each), "seconds": each.seconds} for each in results]
    names = [name for name in _COLUMNS if _has(name, results)]
    return {name: Spread.of([each[name] for each in values]) for name in names}


def _errors(result: Result) -> dict[str, float]:
    def of(when: str, errors: Errors) -> dict[str, float]:
        return {f"{when}_top1": errors.top1, f"{when}_top5": errors.top5}

    return of("last", result.last) | of("best", result.best)


def _has(column: str, results: Iterable[Result]) -> bool:
    return not column.endswith("top5") or all(result.has_top5 for result in results)


def _difference(ours: Sequence[Result], theirs: Sequence[Result]) -> Difference | None:
    our_errors, their_errors = (
        {result.seed: result.last.top1 for result in results} for results in (ours, theirs)
    )
    common = sorted(our_errors.keys() & their_errors.keys())
    if not common:
        return None
    gaps = [our_errors[seed] - their_errors[seed] for seed in common]
    return Difference(statistics.fmean(gaps), _paired_p(gaps))


def _paired_p(gaps: Sequence[float]) -> float | None:
    if len(gaps) < 2 or statistics.stdev(gaps) == 0:
        return None
    from scipy.special import stdtr  # Student's t distribution; scipy.stats takes a second to load

    t = statistics.fmean(gaps) / (statistics.stdev(gaps) / len(gaps) ** 0.5)
    return float(2 * stdtr(len(gaps) - 1, -abs(t)))


def table_cells(rows: Sequence[Row], teacher: Mapping[str, float]) -> list[list[str]]:
    """Header, teacher (where its errors are known) and one line per method."""
    names = [name for name in _COLUMNS if all(name in row.cells for row in rows)]
    titles = [_COLUMNS[name] for name in names]
    lines = [["method", "model", "seeds", *titles, "Δ to ce", "Δ to kd"]]
    if "test_top1_error" in teacher:
        known = {name: f"{teacher[key]:.2f}" for name, key in _OF_TEACHER.items()}
        lines.append(["teacher", "", "", *(known.get(name, "") for name in names), "", ""])
    for row in rows:
        cells = [str(row.cells[name]) for name in names]
        differences = [str(each) if each else "" for each in (row.to_ce, row.to_kd)]
        lines.append([row.method, row.model, str(row.num_seeds), *cells, *differences])
    return lines


def markdown_table(rows: Sequence[Row], teacher: Mapping[str, float]) -> str:
    """`table_cells` as Markdown, escaped."""
    header, *body = table_cells(rows, teacher)
    lines = [header, ["---"] * len(header), *body]
    return "".join(f"| {' | '.join(map(for_markdown, cells))} |\n" for cells in lines)


def csv_table(results: Sequence[Result]) -> str:
    """One line per run."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = [name for name in _COLUMNS if name != "seconds" and _has(name, results)]
    writer.writerow(["method", "model", "seed", *names, "best_epoch", "seconds", "cache"])
    for run in results:
        errors = [_errors(run)[name] for name in names]
        start = [for_csv(run.method), for_csv(run.model), run.seed]
        writer.writerow([*start, *errors, run.best_epoch, run.seconds, for_csv(run.cache)])
    return text.getvalue()
