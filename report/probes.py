"""The probes of the runs: a table and a chart of the accuracies that embeddings reach."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from teach_once.report.runs import Result
from teach_once.report.table import Cell, Spread
from teach_once.runtime.metrics import KNN_ACCURACY, PROBED, Metric

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MEANING = (
    "Probe: accuracy on labeled test images of a k-NN vote and of a linear classifier, both fitted "
    "to the embeddings of labeled training images by a network that is not trained further."
)


def probed_rows(results: Sequence[Result]) -> dict[str, list[Mapping[str, Any]]]:
    """Return the probes of each row of the table, in order; rows without probes are left out."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for result in results:
        if result.probe is not None:
            found.setdefault(result.method, []).append(result.probe)
    return found


def probe_cells(results: Sequence[Result]) -> list[list[Cell]]:
    """Return a header, the teacher, and the student before and after training by each method.

    Empty without probes.
    """
    if not (rows := probed_rows(results)):
        return []
    head = ["network", "seeds", *(metric.title_with_unit for metric in PROBED)]
    first = next(iter(rows.values()))
    lines = [_line("teacher", first[:1], "teacher")]
    lines += [_line(f"student before training, {first[0]['start']}", first, "before")]
    lines += [_line(method, probes, "after") for method, probes in rows.items()]
    return [list(map(Cell, head)), *lines]


def _line(name: str, probes: Sequence[Mapping[str, Any]], when: str) -> list[Cell]:
    spreads = (Spread.of(_values(probes, when, metric), metric.digits) for metric in PROBED)
    count = Cell() if when == "teacher" else Cell(str(len(probes)), len(probes))
    return [Cell(name), count, *map(Cell.of, spreads)]


def _values(probes: Sequence[Mapping[str, Any]], when: str, metric: Metric) -> list[float]:
    return [probe[when][metric.name] for probe in probes]


def probe_chart(results: Sequence[Result], metric: Metric = KNN_ACCURACY) -> Figure | None:
    """Draw the methods' accuracies, and those of the teacher and of the untrained student as lines.

    Returns None without probes.
    """
    from teach_once.report.charts import Dot, dot_chart  # loads matplotlib

    if not (rows := probed_rows(results)):
        return None
    dots = []
    for method, probes in rows.items():
        values = _values(probes, "after", metric)
        dots.append(Dot(method, sum(values) / len(values), 0.0, values))
    first = next(iter(rows.values()))
    before = _values(first, "before", metric)
    lines = {
        "before training": sum(before) / len(before),
        "teacher": _values(first, "teacher", metric)[0],
    }
    return dot_chart(dots, metric.title_with_unit, lines)
