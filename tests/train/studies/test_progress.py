"""Progress of a study: the time left counts epochs, also with shared loading."""

from __future__ import annotations

import io
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from teach_once.runtime.formats import format_rate
from teach_once.train.studies.progress import StudyProgress


@dataclass(eq=False)
class Planned:
    """As much of a run as is looked at."""

    training: Any


def runs(*epochs: int) -> list[Any]:
    return [Planned(SimpleNamespace(epochs=each)) for each in epochs]


def epoch(number: int) -> Any:
    return SimpleNamespace(epoch=number)


def test_a_group_prints_a_line_per_epoch_with_the_time_left_of_all_runs() -> None:
    console, seconds = Console(file=io.StringIO(), width=100), iter([0.0, 20.0, 40.0])
    one, other, alone = runs(2, 2, 4)
    progress = StudyProgress([[one, other], [alone]], console, clock=lambda: next(seconds))
    progress.epoch_done(one, epoch(1))
    progress.epoch_done(other, epoch(1))
    progress.epoch_done(one, epoch(2))
    progress.epoch_done(other, epoch(2))
    progress.epoch_done(alone, epoch(1))
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue().splitlines() == [
        "epoch   1/2 of 2 runs  ETA   60 s",
        "epoch   2/2 of 2 runs  ETA   40 s",
    ]


def test_a_group_that_another_process_trained_counts_as_a_whole() -> None:
    seconds = iter([0.0, 30.0, 30.0])
    one, other, third = runs(10, 10, 10)
    progress = StudyProgress([[one, other], [third]], Console(), clock=lambda: next(seconds))
    assert progress.seconds_left == 0
    for run in (one, other):
        progress.group_ended(run)
        assert progress.seconds_left == pytest.approx(15)


def test_a_resumed_run_has_only_its_last_epochs_left() -> None:
    seconds = iter([0.0, 5.0])
    (resumed,) = runs(10)
    progress = StudyProgress([[resumed]], Console(), clock=lambda: next(seconds))
    progress.epoch_done(resumed, epoch(8))
    assert progress.seconds_left == pytest.approx(10)


@pytest.mark.parametrize(
    ("rate", "text"), [(1234.5, "1,234"), (9.96, "10"), (0.4, "0.4"), (0.0512, "0.051")]
)
def test_slow_rates_do_not_print_as_zero(rate: float, text: str) -> None:
    assert format_rate(rate) == text
