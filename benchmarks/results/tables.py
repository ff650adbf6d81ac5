"""The tables of the results page, each computed from runs alone.

- `errors`: a row per method.
- `teacher`: what its pass measured, on the test set and on the cached views.
- `differences`: to ce and kd, `paired`: to the first method, `pairs`: within pairs of methods,
  `order`: to the method before; all paired by seed, with intervals.
- `curves`: the error of each tested epoch.
- `payback`: pairs of a method from the cache and with the teacher in the loop; the number of runs
  after which the teacher's pass has paid for itself.
- `stored`: bytes per image in the cache, and the difference to the first method.
- `validation`: the error on held-out samples, by which weights are chosen.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.results.kept import LabeledResult, ResultsError
from teach_once.report.intervals import LEVEL
from teach_once.report.runs import Result
from teach_once.report.table import Cell, Spread, difference, rows_of, table_cells

Lines = list[list[Cell]]
Shown = str | int | Spread | None
_INTERVAL = f"{LEVEL:.0%} interval"
_ERROR = "top-1 error, last (%)"


@dataclass(frozen=True)
class MethodRuns:
    """The runs of one label, all seeds."""

    label: str
    runs: Sequence[LabeledResult]

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
    def seconds(self) -> Spread:
        return Spread.of([result.seconds for result in self.results])

    @property
    def machine_seconds(self) -> float:
        """The machine's seconds for one run on average."""
        return statistics.fmean(run.machine_seconds for run in self.runs)

    @property
    def tested_epochs(self) -> list[int]:
        return sorted({p.epoch for each in self.results for p in each.curve if p.top1 is not None})

    def error_at(self, epoch: int) -> Spread | None:
        """None unless every run was tested then."""
        points = [point for each in self.results for point in each.curve if point.epoch == epoch]
        errors = [point.top1 for point in points if point.top1 is not None]
        return Spread.of(errors) if len(errors) == len(self.runs) else None

    @property
    def bytes_per_image(self) -> int | None:
        """The cache's bytes per image: 0 if no run reads it, None if it was not kept."""
        if not self.first.reads_cache:
            return 0
        record_bytes = self.runs[0].record_bytes
        return None if record_bytes is None else record_bytes * self.first.num_views


def by_label(runs: Sequence[LabeledResult]) -> list[MethodRuns]:
    """In the order in which the labels first come."""
    found: dict[str, list[LabeledResult]] = {}
    for run in runs:
        found.setdefault(run.result.method, []).append(run)
    return [MethodRuns(label, of_one) for label, of_one in found.items()]


def teacher_of(runs: Sequence[LabeledResult]) -> Mapping[str, float]:
    """What was measured when the cache was made that the first of these runs read."""
    return next((run.result.teacher for run in runs if run.result.teacher), {})


def _line(*shown: Shown) -> list[Cell]:
    return [
        Cell.of(each) if each is None or isinstance(each, Spread) else Cell(str(each))
        for each in shown
    ]


def _gap(each: MethodRuns, other: MethodRuns | None) -> list[str]:
    """The difference, its interval and its p, if they exist."""
    gap = None if other is None else difference(each.results, other.results)
    if gap is None:
        return ["", "", ""]
    if gap.interval is None or gap.p is None:
        return [f"{gap.mean:+.2f}", "", ""]
    interval = f"{gap.interval.low:+.2f} to {gap.interval.high:+.2f}"
    return [f"{gap.mean:+.2f}", interval, f"{gap.p:.2g}"]


def _start(each: MethodRuns) -> tuple[Shown, ...]:
    return each.label, len(each.runs), each.error


def _compared(pairs: Iterable[tuple[MethodRuns, MethodRuns | None]]) -> Lines:
    """A line per pair of a method and its reference."""
    titles = ("method", "seeds", _ERROR, "compared with", "difference", _INTERVAL, "p")
    return [_line(*titles)] + [
        _line(*_start(each), other.label if other else "", *_gap(each, other))
        for each, other in pairs
    ]


def _differences(runs: Sequence[LabeledResult]) -> Lines:
    methods = {each.label: each for each in by_label(runs)}
    references = [methods[name] for name in ("ce", "kd") if name in methods]
    return _compared(
        (each, reference)
        for index, reference in enumerate(references)
        for each in methods.values()
        if each not in references[: index + 1]
    )


def _paired(runs: Sequence[LabeledResult]) -> Lines:
    first, *others = by_label(runs)
    return _compared([(first, None), *((each, first) for each in others)])


def _pairs(runs: Sequence[LabeledResult]) -> Lines:
    return _compared((each, first) for first, each in _in_pairs("pairs", runs))


def _order(runs: Sequence[LabeledResult]) -> Lines:
    methods = by_label(runs)
    return _compared(zip(methods, [None, *methods], strict=False))


def _in_pairs(kind: str, runs: Sequence[LabeledResult]) -> list[tuple[MethodRuns, MethodRuns]]:
    methods = by_label(runs)
    if len(methods) % 2:
        raise ResultsError(f"{kind}: {len(methods)} methods are named; they come in pairs")
    return list(zip(methods[::2], methods[1::2], strict=True))


def _errors(runs: Sequence[LabeledResult]) -> Lines:
    return table_cells(rows_of([run.result for run in runs]), teacher_of(runs))


def _teacher(runs: Sequence[LabeledResult]) -> Lines:
    """A column for each that was measured; on the cached views there are no top-5 errors."""
    teacher, num_samples = teacher_of(runs), runs[0].result.num_samples
    formats: dict[str, tuple[str, Callable[[float], str]]] = {
        "test_top1_error": ("top-1 test error (%)", "{:.2f}".format),
        "test_top5_error": ("top-5 test error (%)", "{:.2f}".format),
        "train_agreement": (
            "top-1 error on the cached views (%)",
            lambda fraction: f"{100 * (1 - fraction):.2f}",
        ),
        "views": (
            "images in the pass",
            lambda views: f"{num_samples:,} x {views:,.0f} = {num_samples * views:,.0f}",
        ),
        "images_per_second": ("images per second", "{:,.0f}".format),
    }
    known = {title: show(teacher[k]) for k, (title, show) in formats.items() if k in teacher}
    return [_line(*known), _line(*known.values())]


def _curves(runs: Sequence[LabeledResult]) -> Lines:
    """A row per method, a column per epoch in which all its runs were tested."""
    methods = by_label(runs)
    epochs = sorted({epoch for each in methods for epoch in each.tested_epochs})
    return [_line("method", *(f"epoch {epoch}" for epoch in epochs))] + [
        _line(each.label, *map(each.error_at, epochs)) for each in methods
    ]


def _payback(runs: Sequence[LabeledResult]) -> Lines:
    """Pass and run both in seconds of the whole machine. A resumed pass records its last rate."""
    titles = ["method", "seconds per run, from the cache", "seconds per run, teacher in the loop"]
    titles += ["runs side by side", "seconds of the pass", "paid back after (runs)"]
    lines = [_line(*titles)]
    for cached, live in _in_pairs("payback", runs):
        saved = live.machine_seconds - cached.machine_seconds
        first = cached.first
        images = first.num_samples * first.num_views * first.num_teachers
        rate = first.teacher.get("images_per_second")
        passing = f"{images / rate:,.0f}" if rate else ""
        paid = f"{images / rate / saved:.1f}" if rate and saved > 0 else ""
        seconds = (cached.seconds, live.seconds)
        lines.append(_line(cached.label, *seconds, cached.runs[0].jobs, passing, paid))
    return lines


def _stored(runs: Sequence[LabeledResult]) -> Lines:
    first, *_ = methods = by_label(runs)
    titles = ("teacher's outputs", "views", "bytes per record", "bytes per image", "seeds", _ERROR)
    lines = [_line(*titles, f"Δ to {first.label}", _INTERVAL, "p")]
    for each in methods:
        size = each.bytes_per_image
        sizes = [f"{each.runs[0].record_bytes:,}", f"{size:,}"] if size else ["", ""]
        gap = _gap(each, None if each is first else first)
        label, *rest = _start(each)
        lines.append(_line(label, each.first.num_views or "", *sizes, *rest, *gap))
    return lines


def _validation(runs: Sequence[LabeledResult]) -> Lines:
    lines = [_line("method", "seeds", "top-1 validation error, last (%)")]
    for each in by_label(runs):
        errors = [r.last_validation for r in each.results if r.last_validation is not None]
        lines.append(_line(each.label, len(each.runs), Spread.of(errors) if errors else None))
    return lines


TABLES: Mapping[str, Callable[[Sequence[LabeledResult]], Lines]] = {
    "errors": _errors,
    "teacher": _teacher,
    "differences": _differences,
    "paired": _paired,
    "pairs": _pairs,
    "order": _order,
    "curves": _curves,
    "payback": _payback,
    "stored": _stored,
    "validation": _validation,
}
