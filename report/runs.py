"""The finished runs of one folder, as a report needs them: what each is, its errors, its curve.

Reads the files of the runs and nothing else; `train.run_files` says what each file holds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.errors import UserError
from runtime.program import program_text
from store.identity import identity_sha256
from train.run_files import read_metrics
from train.runs import FoundRun, finished_alike, runs_in


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
    num_teachers: int = 1
    last_validation: float | None = None  # top-1 error in percent, where samples are held out

    @property
    def has_top5(self) -> bool:
        """With five classes or fewer every top-5 error is zero."""
        return self.num_classes is None or self.num_classes > 5


@dataclass(frozen=True)
class Found:
    """The results of a folder; left_out: {name of a run: why its files cannot be believed}."""

    results: Sequence[Result]
    left_out: Mapping[str, str]


def results_in(folder: Path, names: Sequence[str] = ()) -> Found:
    """The results of these runs, or of all finished ones with the settings of the latest.

    A run whose files are damaged is left out and named. Raises ReportError where nothing is left.
    """
    runs = runs_in(folder)
    left_out = {run.folder.name: run.problem for run in runs if run.problem}
    by_name = {run.folder.name: run for run in runs if run.summary is not None}
    if unknown := [name for name in names if name not in by_name and name not in left_out]:
        raise ReportError(f"{folder} holds no finished run {', '.join(unknown)}")
    chosen = [by_name[name] for name in names if name in by_name]
    if not names and by_name:
        chosen = _like_the_latest(by_name.values())
    if not chosen and left_out:
        raise ReportError("\n".join(left_out.values()))
    if not chosen:
        fix = f"{program_text('train')} ablation STUDENT"
        raise ReportError(f"{folder} holds no finished run", fix=fix)
    return Found([_result(run) for run in chosen], left_out)


def _like_the_latest(finished: Iterable[FoundRun]) -> list[FoundRun]:
    """In the order of ce, kd and the names of the other methods."""
    by_age = sorted(finished, key=lambda run: run.changed)
    latest_of = {run.label: run.identity for run in by_age if run.is_like(by_age[-1].identity)}
    labels = sorted(latest_of, key=lambda label: (label != "ce", label != "kd", label))
    return finished_alike(by_age, {label: latest_of[label] for label in labels})


def _result(run: FoundRun) -> Result:
    """`train.run_files` has checked the types and ranges of everything here."""
    assert run.summary is not None
    summary = run.summary
    last, best = summary["last"], summary["best"]
    epochs = read_metrics(run.folder, identity_sha256(run.identity)) or []
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
        num_teachers=summary.get("num_teachers", 1),
        num_views=run.identity.get("num_views", 0),
        reads_cache=summary["is_taught"] and run.identity.get("teacher_outputs") == "cache",
        cache=summary["cache"],
        cache_sha256=summary["cache_sha256"],
        teacher=summary["teacher"],
        device=summary["device"],
        versions=summary["versions"],
        curve=tuple(_curve(epochs)),
        last_validation=epochs[-1]["validation_top1_error"] if epochs else None,
    )


def _curve(epochs: Iterable[Mapping[str, Any]]) -> Iterable[Point]:
    """epochs: of metrics.jsonl; none where that file is gone."""
    seconds = 0.0
    for epoch in epochs:
        seconds += epoch["train_seconds"] + epoch["wait_seconds"]
        yield Point(epoch["epoch"], seconds, epoch["top1_error"])
