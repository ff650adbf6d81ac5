"""Detect code or weights that have changed since a run was planned.

A run is identified by its planned identity. The process that trains it compares that with the
loaded code and weights, and a difference is an error. Does not import torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from teach_once.nets.weights.source import known_sha256
from teach_once.store.identity import differences
from teach_once.store.read.reader import TeacherCache
from teach_once.train.errors import TrainError
from teach_once.train.runs.study import Run
from teach_once.train.runs.weights import TeacherRun

if TYPE_CHECKING:
    from teach_once.train.engine.step import AnyRun


def check_unchanged(run: AnyRun, planned: Mapping[str, Any]) -> None:
    """Raise TrainError unless a run's identity in this process is the planned one."""
    _check_same(run, planned, run.identity)


def changed_since_planned(run: Run, planned: Mapping[str, Any]) -> str:
    """Describe changes since a run was planned; "" if there are none."""
    try:
        check_unchanged(run, planned)
    except TrainError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def check_inputs(run: Run | TeacherRun) -> None:
    """Raise TrainError unless the loaded code and weights are those in the run's identity.

    Call it when they are loaded.
    """
    check_unchanged(replace(run), run.identity)


def check_teacher_weights(run: Run, weights: str, cache: TeacherCache) -> None:
    """Raise TrainError unless the cache was made with the loaded teacher's weights."""
    expected = cache.identity["teacher"]["weights_sha256"]
    _check_same(run, {"teacher.weights": expected}, {"teacher.weights": known_sha256(weights)})


def _check_same(run: AnyRun, planned: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    changed = differences(planned, found)
    if names := list(dict.fromkeys(_name_of(each.field) for each in changed)):
        verb = "has" if len(names) == 1 else "have"
        raise TrainError(
            f"{run}: {', '.join(names)} {verb} changed since this command began",
            fix="run the same command again to train with the current files",
        )


def _name_of(field: str) -> str:
    if field.startswith("sources."):
        return f"the file of the module {field.removeprefix('sources.')}"
    return field
