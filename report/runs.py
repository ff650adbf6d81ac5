"""The finished runs of one folder, as a report needs them: what each is, its errors, its curve.

Reads the files of the runs and nothing else; `train.records` says what each file holds.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.errors import UserError
from train.runs import METRICS_FILE, SUMMARY_FILE, FoundRun, finished_alike, runs_in


class ReportError(UserError, ValueError):
    """There is nothing to report, or a run's files cannot be read."""


@dataclass(frozen=True)
class Errors:
    """Test errors in percent."""

    top1: float
    top5: float


@dataclass(frozen=True)
class Point:
    """One epoch of a run: `top1` is None where it was not tested; seconds since the start."""

    epoch: int
    seconds: float
    top1: float | None


@dataclass(frozen=True)
class Result:
    """One finished run."""

    method: str  # with "-live" where the teacher ran in the loop
    seed: int
    student: str
    model: str
    last: Errors
    best: Errors
    best_epoch: int
    chosen_on: str  # the split whose error chose the best epoch: "test" or "validation"
    epochs: int
    seconds: float
    num_samples: int
    num_classes: int | None  # older runs do not say
    num_views: int
    reads_cache: bool  # whether its losses read teacher outputs from the cache
    cache: str
    cache_sha256: str
    teacher: Mapping[str, float]  # measured when the cache was made; may be empty
    device: str
    versions: Mapping[str, str]
    curve: tuple[Point, ...] = ()

    @property
    def has_top5(self) -> bool:
        """With five classes or fewer every top-5 error is zero."""
        return self.num_classes is None or self.num_classes > 5


def results_in(folder: Path, names: Sequence[str] = ()) -> list[Result]:
    """The finished runs of one student's folder.

    names: of the runs to report, in this order. Default: all that have the settings of the latest
    one, of each method and seed the latest. Raises ReportError where there is none.
    """
    found = [run for run in runs_in(folder) if run.summary is not None]
    if names:
        by_name = {run.folder.name: run for run in found}
        if unknown := [name for name in names if name not in by_name]:
            raise ReportError(f"{folder} holds no finished run {', '.join(unknown)}")
        return [_result(by_name[name]) for name in names]
    if not found:
        raise ReportError(f"{folder} holds no finished run", fix="python -m train ablation STUDENT")
    return [_result(run) for run in _like_the_latest(found)]


def _like_the_latest(finished: Iterable[FoundRun]) -> list[FoundRun]:
    """In the order of ce, kd and the names of the other methods."""
    by_age = sorted(finished, key=lambda run: run.changed)
    latest_of = {run.label: run.identity for run in by_age if run.is_like(by_age[-1].identity)}
    labels = sorted(latest_of, key=lambda label: (label != "ce", label != "kd", label))
    return finished_alike(by_age, {label: latest_of[label] for label in labels})


def _result(run: FoundRun) -> Result:
    assert run.summary is not None
    try:
        return _parsed(run, run.summary)
    except (KeyError, TypeError, ValueError) as error:
        file = run.folder / SUMMARY_FILE
        raise ReportError(
            f"{file} or {METRICS_FILE} beside it cannot be read: {type(error).__name__} {error}",
            fix=f"rm -r {shlex.quote(str(run.folder))}  # and train this run again",
        ) from None


def _parsed(run: FoundRun, summary: Mapping[str, Any]) -> Result:
    last, best = summary["last"], summary["best"]
    return Result(
        method=run.label,
        seed=run.seed,
        student=summary["student"],
        model=summary.get("model", ""),
        last=Errors(last["top1_error"], last["top5_error"]),
        best=Errors(best["top1_error"], best["top5_error"]),
        best_epoch=best["epoch"],
        chosen_on=best["chosen_on"],
        epochs=summary["epochs"],
        seconds=summary["seconds"],
        num_samples=summary["num_samples"],
        num_classes=summary.get("num_classes"),
        num_views=run.identity["num_views"],
        reads_cache=summary["is_taught"] and run.identity["teacher_outputs"] == "cache",
        cache=summary["cache"],
        cache_sha256=summary["cache_sha256"],
        teacher=summary["teacher"],
        device=summary["device"],
        versions=summary["versions"],
        curve=tuple(_curve(run.folder / METRICS_FILE)),
    )


def _curve(metrics: Path) -> Iterable[Point]:
    """Nothing where the file is gone."""
    seconds = 0.0
    for line in metrics.read_text().splitlines() if metrics.is_file() else []:
        epoch = json.loads(line)
        seconds += epoch["train_seconds"] + epoch["wait_seconds"]
        yield Point(epoch["epoch"], seconds, epoch["top1_error"])
