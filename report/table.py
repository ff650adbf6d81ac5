"""Tables of the results: one row per method over its seeds, and a CSV with one line per run."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from teach_once.report.escape import for_csv, for_markdown
from teach_once.report.intervals import Interval, paired_p, t_interval
from teach_once.report.runs import Result, metric_of
from teach_once.runtime.formats import format_table
from teach_once.runtime.metrics import DECIDING, ERRORS, METRICS, TOP1_ERROR, Metric

_SHORT_NAME, _LONG_NAME = 22, 61  # maximum width of a method's name in the terminal
_SECONDS = "seconds"


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation, which is None for a single value."""

    mean: float
    std: float | None
    digits: int = 2

    @classmethod
    def of(cls, values: Sequence[float], digits: int = 2) -> Spread:
        std = statistics.stdev(values) if len(values) > 1 else None
        return cls(statistics.fmean(values), std, digits)

    def __str__(self) -> str:
        mean = f"{self.mean:.{self.digits}f}"
        return mean if self.std is None else f"{mean} ± {self.std:.{self.digits}f}"


@dataclass(frozen=True)
class PairedDifference:
    """Difference of a method's last error to another method's, over their common seeds.

    p: two-sided, from a paired t-test; None with fewer than two seeds or if all differences are
    equal. interval: of the mean; None with fewer than three seeds.
    """

    mean: float
    p: float | None
    num_seeds: int
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

    metric: by which the rows are compared. name: the method without its settings. to_ce, to_kd:
    differences to these methods with the same settings. to_other: name of the first row of the same
    method, which has other settings, and the difference to it.
    """

    method: str
    num_seeds: int
    cells: dict[str, Spread]
    model: str = ""
    to_ce: PairedDifference | None = None
    to_kd: PairedDifference | None = None
    name: str = ""
    to_other: tuple[str, PairedDifference] | None = None
    metric: Metric = TOP1_ERROR

    @property
    def last(self) -> Spread:
        """The metric after the last epoch."""
        return self.cells[f"last_{self.metric.name}"]


def rows_of(results: Sequence[Result]) -> list[Row]:
    """Group results by method and settings, in the order of their first result.

    Raises ReportError if they have no metric in common.
    """
    metric = metric_of(results)
    grouped: dict[str, list[Result]] = {}
    for result in results:
        grouped.setdefault(result.method, []).append(result)
    return [
        Row(
            method,
            len(runs),
            _cells(runs),
            runs[0].model,
            difference(runs, _baseline("ce", runs, grouped), metric) if name != "ce" else None,
            difference(runs, _baseline("kd", runs, grouped), metric)
            if name not in ("ce", "kd")
            else None,
            name,
            _to_other(runs, grouped, metric),
            metric,
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
    runs: Sequence[Result], grouped: Mapping[str, Sequence[Result]], metric: Metric
) -> tuple[str, PairedDifference] | None:
    first = next(each for each in grouped.values() if each[0].name == runs[0].name)
    if first[0].method == runs[0].method or (found := difference(runs, first, metric)) is None:
        return None
    return first[0].method, found


def _cells(results: Sequence[Result]) -> dict[str, Spread]:
    """Return {column: value} of the metrics that all these runs have, and of their seconds."""
    values = [{**_values(each), _SECONDS: each.seconds} for each in results]
    common = [name for name in _columns() if all(name in each for each in values)]
    return {name: Spread.of([each[name] for each in values], _digits(name)) for name in common}


def _values(result: Result) -> dict[str, float]:
    """Return {column: value} of all metrics after the last epoch, and the best epoch's errors."""
    last = {f"last_{name}": value for name, value in result.last.items()}
    compared = {*ERRORS, *(metric.name for metric in DECIDING)}
    best = {f"best_{name}": value for name, value in result.best.items() if name in compared}
    return last | best


def _columns() -> dict[str, str]:
    """Return the columns of all metrics in order, with their titles."""
    titles = {
        f"{when}_{name}": f"{metric.title}, {when}" + (f" ({metric.unit})" if metric.unit else "")
        for when in ("last", "best")
        for name, metric in METRICS.items()
    }
    return {**titles, _SECONDS: "seconds per run"}


def _digits(column: str) -> int:
    metric = METRICS.get(column.partition("_")[2])
    return metric.digits if metric is not None else 2


def difference(
    ours: Sequence[Result], theirs: Sequence[Result], metric: Metric = TOP1_ERROR
) -> PairedDifference | None:
    """Return the paired difference of two methods' errors; None if they have no common seed."""
    our_errors, their_errors = (
        {result.seed: result.last[metric.name] for result in results} for results in (ours, theirs)
    )
    common = sorted(our_errors.keys() & their_errors.keys())
    if not common:
        return None
    gaps = [our_errors[seed] - their_errors[seed] for seed in common]
    return PairedDifference(statistics.fmean(gaps), paired_p(gaps), len(gaps), t_interval(gaps))


def table_cells(rows: Sequence[Row], teacher: Mapping[str, float]) -> list[list[Cell]]:
    """Return a header, the teacher (if its errors are known) and one line per method."""
    names = [name for name in _columns() if any(name in row.cells for row in rows)]
    titles = [_columns()[name] for name in names]
    header = ["method", "model", "seeds", *titles, "Δ to ce", "Δ to kd"]
    lines = [[Cell(title) for title in header]]
    known = {name: teacher[key] for name, key in _of_teacher().items() if key in teacher}
    if known:
        errors = [Cell(f"{known[n]:.2f}", known[n]) if n in known else Cell() for n in names]
        lines.append([Cell("teacher"), Cell(), Cell(), *errors, Cell(), Cell()])
    for row in rows:
        cells = [Cell.of(row.cells.get(name)) for name in names]
        start = [Cell(row.method), Cell(row.model), Cell(str(row.num_seeds), row.num_seeds)]
        lines.append([*start, *cells, Cell.of(row.to_ce), Cell.of(row.to_kd)])
    return lines


def _of_teacher() -> dict[str, str]:
    """Return {column: key of the teacher's measurement}."""
    return {f"last_{name}": f"test_{name}" for name in ERRORS}


def terminal_table(rows: Sequence[Row], teacher: Mapping[str, float]) -> str:
    """Format the compared metric of `table_cells` in at most 100 columns.

    If the methods' names contain settings, which are long, the differences are omitted.
    """
    has_gaps = max(len(row.method) for row in rows) <= _SHORT_NAME
    metric = rows[0].metric
    title = "error" if metric.name in ERRORS else metric.title
    lines = [["method", "seeds", f"last {title} (%)", f"best {title} (%)", "Δ to ce", "Δ to kd"]]
    if (error := teacher.get(f"test_{metric.name}")) is not None:
        lines.append(["teacher", "", f"{error:.2f}", "", "", ""])
    for row in rows:
        name = row.method
        shown = name if len(name) <= _LONG_NAME else f"{name[: _LONG_NAME - 1]}…"
        last, best = (str(row.cells[f"{when}_{metric.name}"]) for when in ("last", "best"))
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
    values = list(map(_values, results))
    names = [name for name in _columns() if any(name in each for each in values)]
    writer.writerow(["method", "model", "seed", *names, "best_epoch", "seconds", "cache"])
    for run, own in zip(results, values, strict=True):
        errors = [own.get(name, "") for name in names]
        start = [for_csv(run.method), for_csv(run.model), run.seed]
        writer.writerow([*start, *errors, run.best_epoch, run.seconds, for_csv(run.cache)])
    return text.getvalue()
