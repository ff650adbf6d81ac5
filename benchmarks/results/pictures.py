"""The pictures of the results page as SVG, drawn from the runs that the tables show.

`errors`: a row per method. `curves`: the error of each tested epoch. `differences`: to kd.
`stored`: a row per method, with the bytes of an image in the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from matplotlib.figure import Figure

from benchmarks.results.kept import LabeledResult
from benchmarks.results.tables import by_label, teacher_of
from teach_once.report.charts import (
    Dot,
    as_svg,
    differences_to,
    dot_chart,
    errors_by_method,
    learning_curves,
)
from teach_once.report.learning_curves import curves_of, epochs_of
from teach_once.report.table import rows_of

Runs = Sequence[LabeledResult]


def _errors(runs: Runs) -> Figure | None:
    results = [run.result for run in runs]
    return errors_by_method(rows_of(results), results, teacher_of(runs))


def _curves(runs: Runs) -> Figure | None:
    return learning_curves(curves_of([run.result for run in runs], epochs_of))


def _differences(runs: Runs) -> Figure | None:
    return differences_to(rows_of([run.result for run in runs]), "kd")


def _stored(runs: Runs) -> Figure | None:
    methods = by_label(runs)
    dots = [
        Dot(
            f"{each.label.partition(', ')[2] or each.label} · {each.bytes_per_image or 0:,} B",
            each.error.mean,
            0.0,
            errors,
        )
        for each in methods
        for errors in [[result.last.top1 for result in each.results]]
    ]
    return dot_chart(dots, "top-1 test error, last epoch (%)", {})


_FIGURES = {"errors": _errors, "curves": _curves, "differences": _differences, "stored": _stored}


def _drawn(draw: Callable[[Runs], Figure | None]) -> Callable[[Runs], bytes]:
    def svg(runs: Runs) -> bytes:
        figure = draw(runs)
        assert figure is not None, "no two methods share three seeds"
        return as_svg(figure)

    return svg


PICTURES: Mapping[str, Callable[[Runs], bytes]] = {
    kind: _drawn(draw) for kind, draw in _FIGURES.items()
}
