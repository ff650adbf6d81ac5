"""The pictures of the results page, from the runs of its tables.

`errors`: a row per method. `curves`: the error of each tested epoch. `differences`: the
differences to kd. `stored`: a row per method, with the bytes of an image in the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from matplotlib.figure import Figure

from benchmarks.results.tables import Methods, results_of, teacher_of
from teach_once.report.charts import (
    Dot,
    differences_to,
    dot_chart,
    errors_by_method,
    learning_curves,
)
from teach_once.report.learning_curves import curves_of, epochs_of
from teach_once.report.table import rows_of
from teach_once.runtime.metrics import TOP1_ERROR


def _errors(methods: Methods) -> Figure:
    results = results_of(methods)
    return errors_by_method(rows_of(results), results, teacher_of(methods))


def _stored(methods: Methods) -> Figure:
    dots = [
        Dot(
            f"{each.label.partition(', ')[2] or each.label} · {each.bytes_per_image or 0:,} B",
            each.error.mean,
            runs=[result.last[TOP1_ERROR.name] for result in each.results],
        )
        for each in methods
    ]
    return dot_chart(dots, TOP1_ERROR.on_test(", last epoch"), {})


PICTURES: Mapping[str, Callable[[Methods], Figure | None]] = {
    "errors": _errors,
    "curves": lambda methods: learning_curves(curves_of(results_of(methods), epochs_of)),
    "differences": lambda methods: differences_to(rows_of(results_of(methods)), "kd"),
    "stored": _stored,
}
