"""The tables of the results page, each computed from runs alone.

- `errors`: a row per method.
- `teacher`: the metrics of its pass, on the test set and on the cached views.
- `differences`: to ce and kd, `paired`: to the first method, `pairs`: within pairs of methods,
  `order`: to the method before; all paired by seed, with intervals.
- `curves`: the error of each tested epoch.
- `payback`: pairs of a method from the cache and with the teacher in the loop; the number of runs
  after which the teacher's pass has paid for itself.
- `stored`: bytes per image in the cache, and the difference to the first method.
- `validation`: the error on held-out samples, by which weights are chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from benchmarks.results.kept import MethodRuns, ResultsError
from teach_once.report.intervals import LEVEL
from teach_once.report.runs import Result
from teach_once.report.table import Cell, Spread, difference, rows_of, table_cells
from teach_once.runtime.metrics import TOP1_ERROR

Lines = list[list[Cell]]
Methods = Sequence[MethodRuns]
Pairs = Iterable[tuple[MethodRuns, MethodRuns | None]]  # a method and its reference
_INTERVAL = f"{LEVEL:.0%} interval"
_ERROR = "top-1 error, last (%)"


def results_of(methods: Methods) -> list[Result]:
    return [result for each in methods for result in each.results]


def teacher_of(methods: Methods) -> Mapping[str, float]:
    """Return the metrics of the pass that made the first cache which one of these runs read."""
    return next((each.teacher for each in results_of(methods) if each.teacher), {})


def _line(*values: str | int | Spread | None) -> list[Cell]:
    return [
        Cell.of(each) if each is None or isinstance(each, Spread) else Cell(str(each))
        for each in values
    ]


def _gap(each: MethodRuns, other: MethodRuns | None) -> list[str]:
    """Format the difference, its interval and its p, if they exist."""
    gap = None if other is None else difference(each.results, other.results)
    if gap is None:
        return ["", "", ""]
    if gap.interval is None or gap.p is None:
        return [f"{gap.mean:+.2f}", "", ""]
    interval = f"{gap.interval.low:+.2f} to {gap.interval.high:+.2f}"
    return [f"{gap.mean:+.2f}", interval, f"{gap.p:.2g}"]


def _compared(choose: Callable[[Methods], Pairs]) -> Callable[[Methods], Lines]:
    """Make a table with a line per pair of a method and its reference."""
    titles = ("method", "seeds", _ERROR, "compared with", "difference", _INTERVAL, "p")

    def table(methods: Methods) -> Lines:
        return [_line(*titles)] + [
            _line(own.label, len(own.results), own.error, other.label if other else "", *gap)
            for own, other in choose(methods)
            for gap in [_gap(own, other)]
        ]

    return table


def _to_ce_and_kd(methods: Methods) -> Pairs:
    known = {each.label: each for each in methods}
    references = [known[name] for name in ("ce", "kd") if name in known]
    return (
        (each, reference)
        for index, reference in enumerate(references)
        for each in methods
        if each not in references[: index + 1]
    )


def _in_pairs(methods: Methods) -> Iterable[tuple[MethodRuns, MethodRuns]]:
    if len(methods) % 2:
        raise ResultsError(f"{len(methods)} methods are named; they come in pairs")
    return zip(methods[1::2], methods[::2], strict=True)


def _errors(methods: Methods) -> Lines:
    return table_cells(rows_of(results_of(methods)), teacher_of(methods))


def _teacher(methods: Methods) -> Lines:
    """Return a column for each measured metric; the cached views have no top-5 errors."""
    teacher, num_samples = teacher_of(methods), methods[0].first.num_samples
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


def _curves(methods: Methods) -> Lines:
    """Return a row per method and a column per epoch in which all its runs were tested."""
    name = TOP1_ERROR.name
    curves = [(each, p.epoch, p.test) for each in methods for r in each.results for p in r.curve]
    points = [(each, epoch, test[name]) for each, epoch, test in curves if test and name in test]
    epochs = sorted({epoch for _, epoch, _ in points})
    lines = [_line("method", *(f"epoch {epoch}" for epoch in epochs))]
    for each in methods:
        errors = [
            [error for own, at, error in points if own is each and at == epoch] for epoch in epochs
        ]
        is_whole = [len(tested) == len(each.results) for tested in errors]
        cells = (Spread.of(e) if whole else None for e, whole in zip(errors, is_whole, strict=True))
        lines.append(_line(each.label, *cells))
    return lines


def _payback(methods: Methods) -> Lines:
    """Compare pass and run in seconds of the whole machine; a resumed pass has its last rate."""
    titles = ["method", "seconds per run, from the cache", "seconds per run, teacher in the loop"]
    titles += ["runs side by side", "seconds of the pass", "paid back after (runs)"]
    lines = [_line(*titles)]
    for live, cached in _in_pairs(methods):
        saved = live.seconds.mean / live.jobs - cached.seconds.mean / cached.jobs
        first = cached.first
        images = first.num_samples * first.num_views * first.num_teachers
        rate = first.teacher.get("images_per_second")
        passing = f"{images / rate:,.0f}" if rate else ""
        paid = f"{images / rate / saved:.1f}" if rate and saved > 0 else ""
        lines.append(_line(cached.label, cached.seconds, live.seconds, cached.jobs, passing, paid))
    return lines


def _stored(methods: Methods) -> Lines:
    first, *_ = methods
    titles = ("teacher's outputs", "views", "bytes per record", "bytes per image", "seeds", _ERROR)
    lines = [_line(*titles, f"Δ to {first.label}", _INTERVAL, "p")]
    for each in methods:
        size = each.bytes_per_image
        sizes = [f"{each.record_bytes:,}", f"{size:,}"] if size else ["", ""]
        gap = _gap(each, None if each is first else first)
        views = each.first.num_views or ""
        lines.append(_line(each.label, views, *sizes, len(each.results), each.error, *gap))
    return lines


def _validation(methods: Methods) -> Lines:
    lines = [_line("method", "seeds", "top-1 validation error, last (%)")]
    for each in methods:
        measured = [r.last_validation for r in each.results if r.last_validation is not None]
        errors = [values[TOP1_ERROR.name] for values in measured]
        lines.append(_line(each.label, len(each.results), Spread.of(errors) if errors else None))
    return lines


TABLES: Mapping[str, Callable[[Methods], Lines]] = {
    "errors": _errors,
    "teacher": _teacher,
    "differences": _compared(_to_ce_and_kd),
    "paired": _compared(lambda m: [(m[0], None), *((each, m[0]) for each in m[1:])]),
    "pairs": _compared(_in_pairs),
    "order": _compared(lambda m: zip(m, [None, *m], strict=False)),
    "curves": _curves,
    "payback": _payback,
    "stored": _stored,
    "validation": _validation,
}
