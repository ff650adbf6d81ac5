"""The metrics of a network: their names in files, titles, units, directions and ranges.

Files and tables hold values by name, {"top1_error": 5.27}. To add a metric, add a record here and
compute its value where networks are evaluated (`train.engine.evaluation`); run files, printed lines
and trackers then include it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

Values = Mapping[str, float]  # {name of a metric: its value}


class Metric(NamedTuple):
    """A metric: `title` for tables, `unit` ("" if it has none), direction and range of values."""

    name: str
    title: str
    unit: str = "%"
    is_lower_better: bool = True
    lowest: float = 0.0
    highest: float = 100.0
    digits: int = 2

    @property
    def title_with_unit(self) -> str:
        return f"{self.title} ({self.unit})" if self.unit else self.title

    def on_test(self, when: str = "") -> str:
        """Format a title for values of test images: "top-1 test error, last epoch (%)"."""
        unit = f" ({self.unit})" if self.unit else ""
        if self.title.endswith(" error"):
            return f"{self.title.removesuffix('error')}test error{when}{unit}"
        return f"{self.title} on test images{when}{unit}"

    def format_number(self, value: float) -> str:
        """Format a value without its unit: "5.27"."""
        return f"{value:.{self.digits}f}"

    def format(self, value: float, width: int = 0) -> str:
        """Format a value with its unit: "5.27 %". width: of the number, padded on the left."""
        return f"{self.format_number(value):>{width}} {self.unit}".rstrip()

    def is_better(self, value: float, other: float) -> bool:
        """Return True if `value` is better than `other`; equal values are not."""
        return value < other if self.is_lower_better else value > other

    def is_valid(self, value: object) -> bool:
        """Return True for a finite number in the metric's range."""
        if not isinstance(value, float) or not math.isfinite(value):
            return False
        return self.lowest <= value <= self.highest


TOP1_ERROR = Metric("top1_error", "top-1 error")
TOP5_ERROR = Metric("top5_error", "top-5 error")
# Comparisons with the teacher on test images; `train.engine.comparison` has the definitions.
TOP1_AGREEMENT = Metric("top1_agreement", "top-1 agreement", is_lower_better=False)
TEACHER_KL = Metric("teacher_kl", "KL from the teacher", "nats", highest=math.inf, digits=3)
EMBEDDING_COSINE = Metric(
    "embedding_cosine",
    "embedding cosine",
    "",
    is_lower_better=False,
    lowest=-1,
    highest=1,
    digits=3,
)
NEIGHBOR_DISAGREEMENT = Metric("neighbor_disagreement", "neighbor disagreement")
# Of probes: of labeled images that measure an embedding, see `train.engine.probe`.
KNN_ACCURACY = Metric("knn_accuracy", "k-NN accuracy", is_lower_better=False)
LINEAR_ACCURACY = Metric("linear_accuracy", "linear accuracy", is_lower_better=False)
PROBED = (KNN_ACCURACY, LINEAR_ACCURACY)
METRICS = {
    each.name: each
    for each in (
        *(TOP1_ERROR, TOP5_ERROR),
        *(TOP1_AGREEMENT, TEACHER_KL, EMBEDDING_COSINE, NEIGHBOR_DISAGREEMENT),
    )
}
ERRORS = (TOP1_ERROR.name, TOP5_ERROR.name)
# The metrics that can choose the best epoch: the first of them that a run has does.
DECIDING = (TOP1_ERROR, NEIGHBOR_DISAGREEMENT)


def deciding_metric(values: Values) -> Metric:
    """Return the metric by which an epoch with these values is compared with others.

    Raises ValueError if none of the values can decide.
    """
    for metric in DECIDING:
        if metric.name in values:
            return metric
    raise ValueError(f"none of the metrics {', '.join(values)} chooses the best epoch")


def common_metric(of_each: Iterable[Values]) -> Metric | None:
    """Return the metric by which runs with these values are compared; None if none is common."""
    runs = list(of_each)
    common = (each for each in DECIDING if all(each.name in values for values in runs))
    return next(common, None)


def format_values(values: Values, width: int = 0) -> str:
    """Format values in a line: "top-1 error 5.27 %, top-5 error 0.10 %". width: of the numbers."""
    known = [metric for metric in METRICS.values() if metric.name in values]
    return ", ".join(f"{each.title} {each.format(values[each.name], width)}" for each in known)


def format_epoch(values: Values, width: int = 0) -> str:
    """Format the values that a line of an epoch has room for: errors; without them, all."""
    errors = {name: value for name, value in values.items() if name in ERRORS}
    return format_values(errors or values, width)


def format_deciding(values: Values) -> str:
    """Format the value that compares this epoch with others: "top-1 error 5.27 %"."""
    metric = deciding_metric(values)
    return f"{metric.title} {metric.format(values[metric.name])}"


def check_values(values: Mapping[str, Any]) -> dict[str, float]:
    """Return the values read from a file, one of which chooses the best epoch.

    Raises ValueError, which names the first that is not a metric or is outside its range.
    """
    if not any(metric.name in values for metric in DECIDING):
        raise ValueError(f"none of {', '.join(each.name for each in DECIDING)} is there")
    return check_known(values)


def check_known(values: Mapping[str, Any]) -> dict[str, float]:
    """Return the values read from a file. Raises ValueError as `check_values` does."""
    for name, value in values.items():
        if (metric := METRICS.get(name)) is None:
            raise ValueError(f"{name} is not a metric of this version")
        if not metric.is_valid(value):
            bounds = f"{metric.lowest:g} to {metric.highest:g}"
            raise ValueError(f"{name} is {value!r}, expected a number from {bounds}")
    return dict(values)
