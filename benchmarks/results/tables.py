"""The tables of docs/results.md, each computed from runs alone.

- `errors`: a row per method.
- `teacher`: what its pass measured, on the test set and on the cached views.
- `differences`: to ce and kd, paired by seed, with intervals.
- `paired`: the same, to the first method that is named.
- `pairs`: of pairs of methods, the second's difference to the first.
- `order`: each method's difference to the one before it, and whether its error is lower.
- `curves`: the error of each tested epoch.
- `cost`: seconds and images.
- `payback`: of pairs of methods, one from the cache and the same with the teacher in the loop:
  after how many runs the teacher's pass has paid for itself.
- `stored`: what the cache of a run takes per image, and the difference to the first.
- `validation`: the error on held-out samples, which weights are chosen by.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.results.kept import LabelledResult, ResultsError
from teach_once.report.differences import difference_cells
from teach_once.report.intervals import LEVEL
from teach_once.report.runs import Result
from teach_once.report.table import Cell, PairedDifference, Spread, difference, rows_of, table_cells

Lines = list[list[Cell]]
_INTERVAL = f"{LEVEL:.0%} interval"


@dataclass(frozen=True)
class MethodRuns:
    """The runs of one label, all seeds."""

    label: str
    runs: Sequence[LabelledResult]

    @property
    def results(self) -> list[Result]:
        return [run.result for run in self.runs]

    @property
    def first(self) -> Result:
        return self.runs[0].result

    @property
    def error(self) -> Spread:
        return Spread.of([result.last.top1 for result in self.results])

    @property
    def machine_seconds(self) -> float:
        """Of one run on average."""
        return statistics.fmean(run.machine_seconds for run in self.runs)

    @property
    def tested_epochs(self) -> list[int]:
        return sorted({p.epoch for each in self.results for p in each.curve if p.top1 is not None})

    def error_at(self, epoch: int) -> Spread | None:
        """None unless every run was tested then."""
        errors = [
            point.top1
            for each in self.results
            for point in each.curve
            if point.epoch == epoch and point.top1 is not None
        ]
        return Spread.of(errors) if len(errors) == len(self.runs) else None

    @property
    def bytes_per_image(self) -> int | None:
        """Of the cache: nothing where no run reads it, None where it was not kept."""
        if not self.first.reads_cache:
            return 0
        record_bytes = self.runs[0].record_bytes
        return None if record_bytes is None else record_bytes * self.first.num_views


def by_label(runs: Sequence[LabelledResult]) -> list[MethodRuns]:
    """In the order in which the labels first come."""
    found: dict[str, list[LabelledResult]] = {}
    for run in runs:
        found.setdefault(run.result.method, []).append(run)
    return [MethodRuns(label, of_one) for label, of_one in found.items()]


def _results(runs: Sequence[LabelledResult]) -> list[Result]:
    return [run.result for run in runs]


def teacher_of(runs: Sequence[LabelledResult]) -> Mapping[str, float]:
    """What was measured when the cache was made that the first of these runs read."""
    return next((run.result.teacher for run in runs if run.result.teacher), {})


def _errors(runs: Sequence[LabelledResult]) -> Lines:
    return table_cells(rows_of(_results(runs)), teacher_of(runs))


def _teacher(runs: Sequence[LabelledResult]) -> Lines:
    """A column for each that was measured; on the cached views there are no top-5 errors."""
    teacher, first = teacher_of(runs), runs[0].result
    shown: dict[str, tuple[str, Callable[[float], str]]] = {
        "test_top1_error": ("top-1 test error (%)", lambda error: f"{error:.2f}"),
        "test_top5_error": ("top-5 test error (%)", lambda error: f"{error:.2f}"),
        "train_agreement": (
            "top-1 error on the cached views (%)",
            lambda share: f"{100 * (1 - share):.2f}",
        ),
        "views": (
            "images in the pass",
            lambda views: (
                f"{first.num_samples:,} x {views:,.0f} = {first.num_samples * views:,.0f}"
            ),
        ),
        "images_per_second": ("images per second", lambda rate: f"{rate:,.0f}"),
    }
    known = {title: Cell(of(teacher[key])) for key, (title, of) in shown.items() if key in teacher}
    return [[Cell(title) for title in known], list(known.values())]


def _differences(runs: Sequence[LabelledResult]) -> Lines:
    return difference_cells(rows_of(_results(runs)))


def _paired(runs: Sequence[LabelledResult]) -> Lines:
    first, *others = by_label(runs)
    titles = ("method", "seeds", "top-1 error, last (%)", f"Δ to {first.label}", _INTERVAL, "p")
    lines = [[Cell(title) for title in titles]]
    for each in (first, *others):
        gap = None if each is first else difference(each.results, first.results)
        lines.append([*_start(each), Cell.of(each.error), *_gap_cells(gap)])
    return lines


def _pairs(runs: Sequence[LabelledResult]) -> Lines:
    titles = ("method", "seeds", "top-1 error, last (%)", "against", "its error (%)", "difference")
    lines = [[Cell(title) for title in (*titles, _INTERVAL, "p")]]
    for first, each in _in_pairs("pairs", runs):
        gap = difference(each.results, first.results)
        against = [Cell(first.label), Cell.of(first.error)]
        lines.append([*_start(each), Cell.of(each.error), *against, *_gap_cells(gap)])
    return lines


def _in_pairs(kind: str, runs: Sequence[LabelledResult]) -> Iterator[tuple[MethodRuns, MethodRuns]]:
    methods = by_label(runs)
    if len(methods) % 2:
        raise ResultsError(f"{kind}: {len(methods)} methods are named; they come in pairs")
    yield from zip(methods[::2], methods[1::2], strict=True)


def _order(runs: Sequence[LabelledResult]) -> Lines:
    titles = ("method", "seeds", "top-1 error, last (%)", "Δ to the row above", _INTERVAL, "p")
    lines = [[Cell(title) for title in (*titles, "lower than the row above")]]
    above: MethodRuns | None = None
    for each in by_label(runs):
        gap = None if above is None else difference(each.results, above.results)
        start = [*_start(each), Cell.of(each.error)]
        lines.append([*start, *_gap_cells(gap), Cell(_is_lower(gap) if gap else "")])
        above = each
    return lines


def _is_lower(gap: PairedDifference) -> str:
    """What the interval tells; without one, as of a single seed, nothing."""
    if gap.interval is None or gap.p is None or gap.interval.low <= 0 <= gap.interval.high:
        return "cannot be told"
    return "yes" if gap.interval.high < 0 else "no, higher"


def _start(each: MethodRuns) -> Iterator[Cell]:
    yield Cell(each.label)
    yield Cell(str(len(each.runs)))


def _gap_cells(gap: PairedDifference | None) -> Iterator[Cell]:
    """The difference, its interval and its p, as far as there are any."""
    yield Cell("" if gap is None else f"{gap.mean:+.2f}")
    if gap is None or gap.interval is None or gap.p is None:
        yield from (Cell(), Cell())
    else:
        yield Cell(f"{gap.interval.low:+.2f} to {gap.interval.high:+.2f}")
        yield Cell(f"{gap.p:.2g}")


def _curves(runs: Sequence[LabelledResult]) -> Lines:
    """A row per method, a column per epoch in which all its runs were tested."""
    methods = by_label(runs)
    epochs = sorted({epoch for each in methods for epoch in each.tested_epochs})
    lines = [[Cell("method"), *(Cell(f"epoch {epoch}") for epoch in epochs)]]
    for each in methods:
        lines.append([Cell(each.label), *(Cell.of(each.error_at(epoch)) for epoch in epochs)])
    return lines


@dataclass(frozen=True)
class _Cost:
    """Of one run on average, and of the teacher's pass."""

    seconds: Spread
    student_images: int
    live_images: int
    passed_images: int

    @classmethod
    def of(cls, each: MethodRuns) -> _Cost:
        first = each.first
        is_taught = first.reads_cache or each.runs[0].is_live
        return cls(
            Spread.of([result.seconds for result in each.results]),
            first.num_samples * first.epochs,
            first.num_samples * first.epochs * first.num_teachers if is_taught else 0,
            first.num_samples * first.num_views * first.num_teachers if first.reads_cache else 0,
        )


def _cost(runs: Sequence[LabelledResult]) -> Lines:
    """Images through networks say what a run costs on any machine."""
    titles = (
        "method",
        "seconds per run",
        "images through the student",
        "images through the teacher, live",
        "in one pass for all runs",
        "paid back after (runs)",
    )
    lines = [[Cell(title) for title in titles]]
    for each in by_label(runs):
        cost = _Cost.of(each)
        back = cost.passed_images / cost.live_images if cost.passed_images else None
        images = (cost.student_images, cost.live_images, cost.passed_images)
        shown = [Cell(f"{number:,}" if number else "") for number in images]
        paid = Cell("" if back is None else f"{back:.1f}")
        lines.append([Cell(each.label), Cell.of(cost.seconds), *shown, paid])
    return lines


def _payback(runs: Sequence[LabelledResult]) -> Lines:
    """Pass and run both in seconds of the whole machine. A resumed pass knows its last rate."""
    titles = (
        "method",
        "seconds per run, from the cache",
        "seconds per run, teacher in the loop",
        "runs side by side",
        "seconds of the pass",
        "paid back after (runs)",
    )
    lines = [[Cell(title) for title in titles]]
    for cached, live in _in_pairs("payback", runs):
        seconds = [
            Spread.of([result.seconds for result in each.results]) for each in (cached, live)
        ]
        saved = live.machine_seconds - cached.machine_seconds
        first = cached.first
        images = first.num_samples * first.num_views * first.num_teachers
        rate = first.teacher.get("images_per_second")
        passing = Cell(f"{images / rate:,.0f}" if rate else "")
        paid = Cell(f"{images / rate / saved:.1f}" if rate and saved > 0 else "")
        jobs = Cell(str(cached.runs[0].jobs))
        lines.append([Cell(cached.label), *map(Cell.of, seconds), jobs, passing, paid])
    return lines


def _stored(runs: Sequence[LabelledResult]) -> Lines:
    first, *others = by_label(runs)
    titles = (
        "teacher's outputs",
        "views",
        "bytes per record",
        "bytes per image",
        "seeds",
        "top-1 error, last (%)",
        f"Δ to {first.label}",
        _INTERVAL,
        "p",
    )
    lines = [[Cell(title) for title in titles]]
    for each in (first, *others):
        gap = None if each is first else difference(each.results, first.results)
        label, seeds = _start(each)
        size = [Cell(), Cell()]
        if each.bytes_per_image:
            size = [Cell(f"{each.runs[0].record_bytes:,}"), Cell(f"{each.bytes_per_image:,}")]
        views = Cell(str(each.first.num_views or ""))
        lines.append([label, views, *size, seeds, Cell.of(each.error), *_gap_cells(gap)])
    return lines


def _validation(runs: Sequence[LabelledResult]) -> Lines:
    lines = [[Cell("method"), Cell("seeds"), Cell("top-1 validation error, last (%)")]]
    for each in by_label(runs):
        errors = [r.last_validation for r in each.results if r.last_validation is not None]
        lines.append([*_start(each), Cell.of(Spread.of(errors) if errors else None)])
    return lines


TABLES: Mapping[str, Callable[[Sequence[LabelledResult]], Lines]] = {
    "errors": _errors,
    "teacher": _teacher,
    "differences": _differences,
    "paired": _paired,
    "pairs": _pairs,
    "order": _order,
    "curves": _curves,
    "cost": _cost,
    "payback": _payback,
    "stored": _stored,
    "validation": _validation,
}
