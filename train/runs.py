"""The runs that a folder holds: which there are, how those of one method differ, what can go.

Imports no torch, and trusts nothing but the files that a run leaves (see `train.records`).
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.errors import Busy
from runtime.formats import format_age, format_table
from runtime.locks import LOCK_FILE, Job, WriterLock
from store.differences import distinctions
from store.identity import identity_sha256

# The names of the files of a run; `train.records` says what each of them holds.
RUN_FILE = "run.json"
SUMMARY_FILE = "summary.json"
METRICS_FILE = "metrics.jsonl"
CHECKPOINT_FILE = "checkpoint.pt"

# Of a run's identity, what its method and seed decide; the rest are the settings of its study.
_OF_ONE_RUN = ("terms", "seed", "sources", "window")
_FOLDER = re.compile(r"(?P<label>.+)-seed(?P<seed>[0-9]+)-[0-9a-f]{8}")


@dataclass(frozen=True)
class FoundRun:
    """A run's folder and what its files say; `summary` is None before its end.

    label: its method, and "-live" where the teacher ran in the loop.
    """

    folder: Path
    label: str
    seed: int
    identity: Mapping[str, Any]
    summary: Mapping[str, Any] | None
    epochs: int  # that are done
    num_bytes: int
    changed: float  # seconds, as of time.time
    is_training: bool

    @property
    def key(self) -> tuple[str, str, int]:
        """Student, label and seed: of runs that agree in these only the settings differ."""
        return self.folder.parent.name, self.label, self.seed

    @property
    def state(self) -> str:
        if self.summary is not None:
            return "finished"
        if self.is_training:
            return "training now"
        has_checkpoint = (self.folder / CHECKPOINT_FILE).is_file()
        of = f"{self.epochs} of {self.identity['training']['epochs']} epochs"
        return f"interrupted, {of}" if has_checkpoint else f"unfinished, {of}"

    def is_like(self, identity: Mapping[str, Any]) -> bool:
        """Whether this run and that of the identity differ in method and seed alone."""
        return _without(_OF_ONE_RUN, self.identity) == _without(_OF_ONE_RUN, identity)

    def is_repetition_of(self, identity: Mapping[str, Any]) -> bool:
        """Whether this run and that of the identity differ in the seed alone."""
        return _without(("seed",), self.identity) == _without(("seed",), identity)


def read_json(file: Path) -> dict[str, Any] | None:
    """The object that a file of a run holds; None where it is missing or damaged."""
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def runs_below(runs_dir: Path, student: str | None = None) -> list[FoundRun]:
    """All runs, or those of one student, by student, method, seed and age."""
    students = runs_dir.glob("*/") if student is None else [runs_dir / student]
    return sorted((run for each in students for run in runs_in(each)), key=_order)


def runs_in(student_dir: Path) -> list[FoundRun]:
    """The runs of one student's folder, by method, seed and age."""
    found = (_read_run(folder) for folder in student_dir.glob("*"))
    return sorted((run for run in found if run is not None), key=_order)


def _order(run: FoundRun) -> tuple[str, str, int, float]:
    return *run.key, run.changed


def finished_alike(
    runs: Iterable[FoundRun], own: Mapping[str, Mapping[str, Any]]
) -> list[FoundRun]:
    """The finished ones of `runs` that can be compared with each other: one per method and seed.

    own: {label: identity of a run of it, whatever its seed}, all with the same settings. A run of
    one of these labels must have that very method's terms. Another label counts by the settings
    that all share. Of several runs of one method and seed the latest counts. In the order of `own`.
    """
    order = {label: position for position, label in enumerate(own)}
    example = next(iter(own.values()))
    latest: dict[tuple[str, int], FoundRun] = {}
    for run in sorted(runs, key=_order):
        terms_fit = run.label not in own or run.is_repetition_of(own[run.label])
        if run.summary is not None and run.is_like(example) and terms_fit:
            latest[run.label, run.seed] = run
    return sorted(latest.values(), key=lambda run: (order.get(run.label, len(order)), *run.key))


def table_of(runs: Sequence[FoundRun], now: float) -> str:
    """A line per run, which ends with the settings that are not those of all of its method.

    now: seconds, as of time.time.
    """
    rows = [["run", "state", "top-1 error (%)", "size", "age", "differs in"]]
    for run in runs:
        errors = run.summary["last"]["top1_error"] if run.summary else None
        rows.append(
            [
                f"{run.folder.parent.name}/{run.folder.name}",
                run.state,
                "" if errors is None else f"{errors:.2f}",
                f"{run.num_bytes / 1e6:,.1f} MB",
                format_age(now - run.changed),
                ", ".join(_distinctions(run, runs)),
            ]
        )
    return format_table(rows)


def format_result(summary: Mapping[str, Any], folder: Path) -> str:
    """A finished run in a few lines: its errors, its time, its folder."""
    has_top5 = summary.get("num_classes", 6) > 5  # else every top-5 error is zero
    best = summary["best"]

    def errors(of: Mapping[str, Any], prefix: str = "") -> str:
        top5 = f", {of[f'{prefix}top5_error']:.2f} % top-5" if has_top5 else ""
        return f"test error {of[f'{prefix}top1_error']:.2f} % top-1{top5}"

    lines = [
        f"{summary['method']}, seed {summary['seed']}: {summary['seconds']:.1f} s, in {folder}",
        f"last epoch ({summary['epochs']}): {errors(summary['last'])}",
        f"best epoch ({best['epoch']}, chosen on the {best['chosen_on']} set): {errors(best)}",
    ]
    if summary["teacher"]:
        lines.append(f"teacher: {errors(summary['teacher'], 'test_')}")
    return "\n  ".join(lines)


def removable(runs: Iterable[FoundRun]) -> dict[Path, str]:
    """{folder: why} of runs that are unfinished, or superseded by a later finished one."""
    found, latest = {}, {}
    runs = list(runs)
    for run in sorted(runs, key=lambda run: run.changed):
        if run.summary is not None:
            latest[run.key] = run
    for run in runs:
        successor = latest.get(run.key, run)
        if run.is_training:
            continue
        if run.summary is None:
            found[run.folder] = run.state
        elif successor is not run:
            found[run.folder] = f"superseded by {successor.folder.name}"
    return found


def remove_run(folder: Path) -> None:
    """Delete a run, unless it is being trained. Raises Busy."""
    lock = WriterLock(folder, Job())
    try:
        shutil.rmtree(folder)
    finally:
        lock.release()


def _read_run(folder: Path) -> FoundRun | None:
    """None where there is no run in the folder, or none that can be read."""
    name = _FOLDER.fullmatch(folder.name)
    identity, summary = (read_json(folder / file) for file in (RUN_FILE, SUMMARY_FILE))
    if name is None or identity is None or "training" not in identity:
        return None
    is_finished = summary is not None and summary.get("run_sha256") == identity_sha256(identity)
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != LOCK_FILE]
    metrics = folder / METRICS_FILE
    return FoundRun(
        folder=folder,
        label=name["label"],
        seed=int(name["seed"]),
        identity=identity,
        summary=summary if is_finished else None,
        epochs=len(metrics.read_bytes().splitlines()) if metrics.is_file() else 0,
        num_bytes=sum(path.stat().st_size for path in files),
        changed=max(path.stat().st_mtime for path in files),
        is_training=not is_finished and _is_locked(folder),
    )


def _is_locked(folder: Path) -> bool:
    if not (folder / LOCK_FILE).exists():
        return False
    try:
        WriterLock(folder, Job()).release()
    except Busy:
        return True
    return False


def _without(keys: Sequence[str], identity: Mapping[str, Any]) -> str:
    return identity_sha256({key: value for key, value in identity.items() if key not in keys})


def _distinctions(run: FoundRun, runs: Sequence[FoundRun]) -> list[str]:
    """`key=value` of each setting that is not the same in all runs of its student and method."""
    same_method = (each.identity for each in runs if each.key[:2] == run.key[:2])
    return distinctions(run.identity, same_method, but=["seed"])
