"""The finished runs of one folder, as the report uses them: settings, errors and curves.

Reads only the files of the runs, whose fields `train.runs.files` defines.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from teach_once.runtime.command.program import program_text
from teach_once.runtime.errors import UserError
from teach_once.runtime.metrics import Metric, Values, common_metric
from teach_once.store.identity import identity_sha256
from teach_once.train.runs.files import read_metrics, read_probe
from teach_once.train.runs.folder import (
    FoundRun,
    distinct_settings,
    method_key,
    runs_in,
    settings_key,
)


class ReportError(UserError, ValueError):
    """There are no runs to report, or a run's files cannot be read."""


@dataclass(frozen=True)
class Point:
    """One epoch of a run. test: None if it was not tested. seconds: since the start of the run."""

    epoch: int
    seconds: float
    test: Values | None


@dataclass(frozen=True)
class Result:
    """One finished run.

    method: name of its row in the table: `name`, followed by the settings that differ between rows.
    settings, terms: keys that are equal for runs with the same settings, and for seeds of one
    method.
    """

    method: str
    seed: int
    student: str
    model: str
    last: Values  # on the test images, by name of the metric
    best: Values
    best_epoch: int
    chosen_on: str  # the split whose error chose the best epoch: "test" or "validation"
    epochs: int
    seconds: float
    num_samples: int
    num_classes: int
    num_views: int
    reads_cache: bool  # True if its losses read teacher outputs from the cache
    cache: str
    cache_sha256: str
    teacher: Mapping[str, float]  # measured when the cache was made; may be empty
    device: str
    versions: Mapping[str, str]
    curve: tuple[Point, ...] = ()
    num_teachers: int = 1
    last_validation: Values | None = None  # if samples are held out
    label: str = ""  # the method's name, with "-live" if the teacher ran in the loop
    settings: str = ""
    terms: str = ""
    probe: Mapping[str, Any] | None = None  # `train.runs.files.read_probe`
    teachers: tuple[str, ...] = ()  # description of each teacher: architecture and weights

    @property
    def name(self) -> str:
        """The method's name without settings."""
        return self.label or self.method


@dataclass(frozen=True)
class Found:
    """The results of a folder. left_out: {name of a run: error in its files}.

    finished: all finished runs of the folder, including those that are not reported.
    """

    results: Sequence[Result]
    left_out: Mapping[str, str]
    finished: Sequence[Result]


def results_in(folder: Path, names: Sequence[str] = (), methods: Sequence[str] = ()) -> Found:
    """Return the results of the runs `names` (default: all finished runs), restricted to `methods`.

    Runs of one method with different settings have different rows. A run whose files are damaged is
    left out and listed.

    Raises ReportError if no run is left, or a run is named twice.
    """
    _check_distinct(folder, names)
    runs = runs_in(folder)
    left_out = {run.folder.name: run.problem for run in runs if run.problem}
    by_name = {run.folder.name: run for run in runs if run.summary is not None}
    if unknown := [name for name in names if name not in by_name and name not in left_out]:
        raise ReportError(f"{folder} contains no finished run {', '.join(unknown)}")
    chosen = [by_name[name] for name in names if name in by_name]
    if not names:
        chosen = _in_order(by_name.values())
    if methods:
        chosen = [run for run in chosen if run.label in methods]
    if not chosen and left_out:
        raise ReportError("\n".join(left_out.values()))
    if not chosen:
        fix = f"{program_text('train')} ablation STUDENT"
        of = f" of the method {' or '.join(methods)}" if methods else ""
        raise ReportError(f"{folder} contains no finished run{of}", fix=fix)
    finished = [_result(run, run.label) for run in by_name.values()]
    rows = _row_names(chosen)
    return Found(
        [_result(run, row) for run, row in zip(chosen, rows, strict=True)], left_out, finished
    )


def _check_distinct(folder: Path, names: Sequence[str]) -> None:
    once = list(dict.fromkeys(names))
    if twice := next((name for name in once if names.count(name) > 1), None):
        fix = f"{program_text('report')} {shlex.join([str(folder), *once])}"
        raise ReportError(f"{twice} is named twice, but is a single run", fix=fix)


def _in_order(runs: Iterable[FoundRun]) -> list[FoundRun]:
    """Sort by method (ce, kd, then by name), then by settings, the oldest first, then by seed."""
    by_age = sorted(runs, key=lambda run: run.changed)
    ages = dict.fromkeys(map(_row_key, by_age))
    order = {key: age for age, key in enumerate(ages)}

    def place(run: FoundRun) -> tuple[bool, bool, str, int, int]:
        return run.label != "ce", run.label != "kd", run.label, order[_row_key(run)], run.seed

    return sorted(by_age, key=place)


def _row_key(run: FoundRun) -> str:
    """Return a key that is equal for all seeds of a row."""
    return f"{settings_key(run.identity)}{method_key(run.identity)}"


def _row_names(runs: Sequence[FoundRun]) -> list[str]:
    """Return the label of each run, with the settings that differ between the runs."""
    found = distinct_settings([(run.label, run.identity) for run in runs])
    named = [
        f"{run.label} ({', '.join(settings)})" if settings else run.label
        for run, settings in zip(runs, found, strict=True)
    ]
    keys = list(map(_row_key, runs))
    rows: dict[str, set[str]] = {}
    for name, key in zip(named, keys, strict=True):
        rows.setdefault(name, set()).add(key)
    return [
        name if len(rows[name]) == 1 else f"{name} [{identity_sha256({'row': key})[:8]}]"
        for name, key in zip(named, keys, strict=True)
    ]


def _result(run: FoundRun, row: str) -> Result:
    """Build a result from files whose types and ranges `train.runs.files` has checked."""
    assert run.summary is not None
    summary = run.summary
    last, best = summary["last"], summary["best"]
    epochs = read_metrics(run.folder, identity_sha256(run.identity)) or []
    return Result(
        method=row,
        label=run.label,
        settings=settings_key(run.identity),
        terms=method_key(run.identity),
        teachers=tuple(_teachers(run)),
        seed=run.seed,
        student=summary["student"],
        model=summary.get("model", ""),
        last=last,
        best=best["metrics"],
        best_epoch=best["epoch"],
        chosen_on=best["chosen_on"],
        epochs=summary["epochs"],
        seconds=summary["seconds"],
        num_samples=summary["num_samples"],
        num_classes=summary["num_classes"],
        num_teachers=summary.get("num_teachers", 1),
        num_views=run.identity.get("num_views", 0),
        reads_cache=summary["is_taught"] and run.identity.get("teacher_outputs") == "cache",
        cache=summary["cache"],
        cache_sha256=summary["cache_sha256"],
        teacher=summary["teacher"],
        device=summary["device"],
        versions=summary["versions"],
        curve=tuple(_curve(epochs)),
        probe=read_probe(run.folder, identity_sha256(run.identity)),
        last_validation=epochs[-1]["validation"] if epochs else None,
    )


def _teachers(run: FoundRun) -> Iterable[str]:
    """Yield the architecture and the weights of each teacher; nothing if a run's files lack them.

    The summary contains the name of the weights file, the identity its sha256.
    """
    further = run.identity.get("further_caches", [])
    named = (run.summary or {}).get("teacher_weights", [])
    for number, cache in enumerate([run.identity["cache"], *further]):
        if not isinstance(cache, Mapping) or not isinstance(of := cache.get("teacher"), Mapping):
            return
        arch, sha256 = of.get("arch"), of.get("weights_sha256")
        if not isinstance(arch, str) or not isinstance(sha256, str):
            return
        name = f"{named[number]}, " if number < len(named) else ""
        yield f"{arch}, weights {name}sha256 {sha256}"


def _curve(epochs: Iterable[Mapping[str, Any]]) -> Iterable[Point]:
    """Yield a point for each line of metrics.jsonl; none if that file is missing."""
    seconds = 0.0
    for epoch in epochs:
        seconds += epoch["train_seconds"] + epoch["wait_seconds"]
        yield Point(epoch["epoch"], seconds, epoch["test"])


def metric_of(results: Iterable[Result]) -> Metric:
    """Return the metric by which results are compared.

    Raises ReportError if they have none in common.
    """
    of_each = {result.method: result.last for result in results}
    if (metric := common_metric(of_each.values())) is not None:
        return metric
    lines = (f"{method}: {', '.join(values)}" for method, values in of_each.items())
    raise ReportError(
        "\n  ".join(["the methods have no metric in common:", *lines]),
        fix="name the methods to report with --method",
    )
