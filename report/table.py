"""Tables of the results: one row per method over its seeds, and a CSV with one line per run."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from teach_once.report.escape import for_csv, for_markdown
from teach_once.report.intervals import Interval, paired_p, t_interval
from teach_once.report.runs import Errors, Result
from teach_once.runtime.formats import format_table

_COLUMNS = {
    "last_top1": "top-1 error, last (%)",
    "last_top5": "top-5 error, last (%)",
    "best_top1": "top-1 error, best (%)",
    "best_top5": "top-5 error, best (%)",
    "seconds": "seconds per run",
}
_SHORT_NAME, _LONG_NAME = 22, 61  # maximum width of a method's name in the terminal
_OF_TEACHER = {"last_top1": "test_top1_error", "last_top5": "test_top5_error"}


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation, which is None for a single value."""

    mean: float
    std: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        std = statistics.stdev(values) if len(values) > 1 else None
        return cls(statistics.fmean(values), std)

    def __str__(self) -> str:
        return f"{self.mean:.2f}" + ("" if self.std is None else f" ± {self.std:.2f}")


@dataclass(frozen=True)
class PairedDifference:
    """Difference of a method's last top-1 error to another method's, over their common seeds.

    p: two-sided, from a paired t-test; None with fewer than two seeds or if all differences are
    equal. interval: of the mean; None with fewer than two seeds.
    """

    mean: float
    p: float | None
    interval: Interval | None = None

    def __str__(self) -> str:
        return f"{self.mean:+.2f}" + ("" if self.p is None else f" (p = {self.p:.2g})")


@dataclass(frozen=True)
class Cell:
    """A cell's text, and the number it is sorted by; None for cells sorted by text."""

    text: str = ""
    value: float | None = None

    def __str__(self) -> str:
        return self.text

    @classmethod
    def of(cls, shown: Spread | PairedDifference | None) -> Cell:
        return cls() if shown is None else cls(str(shown), shown.mean)


@dataclass(frozen=True)
class Row:
    """One method with the same settings over all its seeds. cells: {column: value}.

    name: the method without its settings. to_ce, to_kd: differences to these methods with the same
    settings. to_other: name of the first row of the same method, which has other settings, and the
    difference to it.
    """

    method: str
    num_seeds: int
    cells: dict[str, Spread]
    model: str = ""
    to_ce: PairedDifference | None = None
    to_kd: PairedDifference | None = None
    name: str = ""
    to_other: tuple[str, PairedDifference] | None = None


def rows_of(results: Iterable[Result]) -> list[Row]:
    """Group results by method and settings, in the order of their first result."""
    grouped: dict[str, list[Result]] = {}
    for result in results:
        grouped.setdefault(result.method, []).append(result)
    return [
        Row(
            method,
            len(runs),
            _cells(runs),
            runs[0].model,
            difference(runs, _baseline("ce", runs, grouped)) if name != "ce" else None,
            difference(runs, _baseline("kd", runs, grouped)) if name not in ("ce", "kd") else None,
            name,
            _to_other(runs, grouped),
        )
        for method, runs in grouped.items()
        for name in [runs[0].name]
    ]


def _baseline(
    name: str, runs: Sequence[Result], grouped: Mapping[str, Sequence[Result]]
) -> Sequence[Result]:
    """Return the runs of a method with the settings of `runs`; none if its rows differ in terms."""
    found = [
        each
        for each in grouped.values()
        if (each[0].name, each[0].settings) == (name, runs[0].settings)
    ]
    return found[0] if len(found) == 1 else ()


def _to_other(
    runs: Sequence[Result], grouped: Mapping[str, Sequence[Result]]
) -> tuple[str, PairedDifference] | None:
    first = next(each for each in grouped.values() if each[0].name == runs[0].name)
    if first[0].method == runs[0].method or (found := difference(runs, first)) is None:
        return None
    return first[0].method, found


def _cells(results: Sequence[Result]) -> dict[str, Spread]:
    """Return {column: value} for `_COLUMNS`; top-5 errors are omitted with few classes."""
    values = [{**_errors(each), "seconds": each.seconds} for each in results]
    names = [name for name in _COLUMNS if _has(name, results)]
    return {name: Spread.of([each[name] for each in values]) for name in names}


def _errors(result: Result) -> dict[str, float]:
    def of(when: str, errors: Errors) -> dict[str, float]:
        return {f"{when}_top1": errors.top1, f"{when}_top5": errors.top5}

    return of("last", result.last) | of("best", result.best)


def _has(column: str, results: Iterable[Result]) -> bool:
    return not column.endswith("top5") or all(result.has_top5 for result in results)


def difference(ours: Sequence[Result], theirs: Sequence[Result]) -> PairedDifference | None:
    """Return the paired difference of two methods' errors; None if they have no common seed."""
    our_errors, their_errors = (
        {result.seed: result.last.top1 for result in results} for results in (ours, theirs)
    )
    common = sorted(our_errors.keys() & their_errors.keys())
    if not common:
        return None
    gaps = [our_errors[seed] - their_errors[seed] for seed in common]
    return PairedDifference(statistics.fmean(gaps), paired_p(gaps), t_interval(gaps))


def table_cells(rows: Sequence[Row], teacher: Mapping[str, float]) -> list[list[Cell]]:
    """Return a header, the teacher (if its errors are known) and one line per method."""
    names = [name for name in _COLUMNS if all(name in row.cells for row in rows)]
    titles = [_COLUMNS[name] for name in names]
    header = ["method", "model", "seeds", *titles, "Δ to ce", "Δ to kd"]
    lines = [[Cell(title) for title in header]]
    if "test_top1_error" in teacher:
        known = {name: teacher[key] for name, key in _OF_TEACHER.items() if key in teacher}
        errors = [Cell(f"{known[n]:.2f}", known[n]) if n in known else Cell() for n in names]
        lines.append([Cell("teacher"), Cell(), Cell(), *errors, Cell(), Cell()])
    for row in rows:
        cells = [Cell.of(row.cells[name]) for name in names]
        start = [Cell(row.method), Cell(row.model), Cell(str(row.num_seeds), row.num_seeds)]
        lines.append([*start, *cells, Cell.of(row.to_ce), Cell.of(row.to_kd)])
    return lines


def terminal_table(rows: Sequence[Row], teacher: Mapping[str, float]) -> str:
    """Format the top-1 errors of `table_cells` in at most 100 columns.

    If the methods' names contain settings, which are long, the differences are omitted.
    """
    has_gaps = max(len(row.method) for row in rows) <= _SHORT_NAME
    lines = [["method", "seeds", "last error (%)", "best error (%)", "Δ to ce", "Δ to kd"]]
    if (error := teacher.get("test_top1_error")) is not None:
        lines.append(["teacher", "", f"{error:.2f}", "", "", ""])
    for row in rows:
        name = row.method
        shown = name if len(name) <= _LONG_NAME else f"{name[: _LONG_NAME - 1]}…"
        last, best = (str(row.cells[f"{when}_top1"]) for when in ("last", "best"))
        gaps = ("" if gap is None else str(gap) for gap in (row.to_ce, row.to_kd))
        lines.append([shown, str(row.num_seeds), last, best, *gaps])
    return format_table([line if has_gaps else line[:4] for line in lines])


def markdown_table(rows: Sequence[Row], teacher: Mapping[str, float]) -> str:
    """Format `table_cells` as an escaped Markdown table."""
    return in_markdown(table_cells(rows, teacher))


def in_markdown(lines: Sequence[Sequence[Cell]]) -> str:
    """Format lines of cells, the header first, as an escaped Markdown table."""
    header, *body = lines
    rule = [Cell("---")] * len(header)
    return "".join(
        f"| {' | '.join(map(for_markdown, cells))} |\n" for cells in [header, rule, *body]
    )


def csv_table(results: Sequence[Result]) -> str:
    """Format the results as CSV with one line per run."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = [name for name in _COLUMNS if name != "seconds" and _has(name, results)]
    writer.writerow(["method", "model", "seed", *names, "best_epoch", "seconds", "cache"])
    for run in results:
        errors = [_errors(run)[name] for name in names]
        start = [for_csv(run.method), for_csv(run.model), run.seed]
        writer.writerow([*start, *errors, run.best_epoch, run.seconds, for_csv(run.cache)])
    return text.getvalue()
