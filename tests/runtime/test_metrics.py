"""Metrics: the values that are valid, the better of two, and values read from files."""

from __future__ import annotations

import math

import pytest

from teach_once.runtime.metrics import TOP1_ERROR, Metric, check_values

ACCURACY = Metric("accuracy", "accuracy", is_lower_better=False)


@pytest.mark.parametrize("value", [0.0, 5.27, 100.0])
def test_metric_of_a_value_in_its_closed_range_is_valid(value: float) -> None:
    assert TOP1_ERROR.is_valid(value)


@pytest.mark.parametrize(
    "value",
    [math.nextafter(100, 101), -5e-324, math.nan, math.inf, -math.inf, 5, True, "5.27", None],
)
def test_metric_of_another_value_is_not_valid(value: object) -> None:
    assert not TOP1_ERROR.is_valid(value)


def test_metric_is_better_in_its_direction_and_not_if_values_are_equal() -> None:
    assert TOP1_ERROR.is_better(5.0, 6.0)
    assert ACCURACY.is_better(6.0, 5.0)
    for metric in (TOP1_ERROR, ACCURACY):
        assert not metric.is_better(5.0, 5.0)
    assert not TOP1_ERROR.is_better(6.0, 5.0)
    assert not ACCURACY.is_better(5.0, 6.0)


def test_check_values_of_a_file_returns_them() -> None:
    values = {"top5_error": 0.0, "top1_error": 100.0}
    assert check_values(values) == values


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"top5_error": 1.0}, "none of top1_error, neighbor_disagreement is there"),
        ({}, "none of top1_error, neighbor_disagreement is there"),
        ({"top1_error": 1.0, "loss": 1.0}, "loss is not a metric"),
        ({"top1_error": 100.5}, "top1_error is 100.5, expected a number from 0 to 100"),
    ],
)
def test_check_values_without_a_deciding_metric_or_with_an_invalid_one_raises(
    values: dict[str, float], problem: str
) -> None:
    with pytest.raises(ValueError, match=problem):
        check_values(values)
