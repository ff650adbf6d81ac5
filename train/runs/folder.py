"""The runs in a folder: which exist, how their settings differ, and which can be removed.

Does not import torch, and trusts only verified files of runs (see `train.runs.files`).
"""

from __future__ import annotations

import glob
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from errno import EACCES
from pathlib import Path
from shlex import quote
from typing import Any

from rich.console import Console

from teach_once.runtime.errors import Busy
from teach_once.runtime.formats import format_age, format_table
from teach_once.runtime.metrics import METRICS, PROBED, format_deciding, format_values
from teach_once.runtime.safe.locks import LOCK_FILE, Job, WriterLock
from teach_once.runtime.safe.safe_read import BadFile
from teach_once.store.identity import (
    Difference,
    differences,
    distinguishing,
    identity_sha256,
    short_repr,
    told,
)
from teach_once.train.runs.files import (
    CHECKPOINT_FILE,
    RUN_FILE,
    count_epochs,
    read_result,
    read_run,
)

# Keys of an identity that depend on method and seed; others are the study's settings.
OF_ONE_RUN = ("terms", "seed", "sources", "window")
_OF_METHOD_IN_STUDENT = "linear_connectors"
# Suffixes of a run's folder name: `-live`, `-live-bn`.
_OF_LABEL = (*OF_ONE_RUN, "teacher_outputs", "teacher_bn")
_MOST = 6  # settings in a table cell
_TEST = "test_"  # prefix of the teacher's metrics in a summary

Identity = Mapping[str, Any]


def settings_key(identity: Identity) -> str:
    """Return the settings common to runs of all methods and seeds of a study."""
    return identity_sha256(without(_OF_LABEL, identity))


def method_key(identity: Identity) -> str:
    """Return the settings common to all seeds of one method, in any study."""
    kept = {key: identity[key] for key in _OF_LABEL if key != "seed" and key in identity}
    return identity_sha256(kept)


def distinct_settings(runs: Sequence[tuple[str, Identity]]) -> list[list[str]]:
    """Return, for each (label, identity), `key=value` of the settings that distinguish it.

    A method's own settings (its terms) are compared with runs of the same label, and the study's
    settings with all runs. At most six are listed, those of the cache last, then the number of
    others.
    """
    studies = distinguishing([without(_OF_LABEL, identity) for _, identity in runs])
    methods: dict[str, list[int]] = {}
    for position, (label, _) in enumerate(runs):
        methods.setdefault(label, []).append(position)
    own: list[list[str]] = [[] for _ in runs]
    for positions in methods.values():
        found = distinguishing([_of_method(runs[position][1]) for position in positions])
        for position, settings in zip(positions, found, strict=True):
            own[position] = settings
    return [_shortened([*own[n], *studies[n]]) for n in range(len(runs))]


def without(keys: Sequence[str], identity: Identity) -> dict[str, Any]:
    """Return the identity without these keys.

    Without its terms, settings of the student that follow from them are removed too.
    """
    kept = {key: value for key, value in identity.items() if key not in keys}
    student = kept.get("student")
    if "terms" in keys and isinstance(student, Mapping):
        kept["student"] = {k: v for k, v in student.items() if k != _OF_METHOD_IN_STUDENT}
    return kept


def _of_method(identity: Identity) -> dict[str, Any]:
    return {key: identity[key] for key in _OF_LABEL if key != "seed" and key in identity}


def _shortened(settings: Sequence[str]) -> list[str]:
    """Move the settings of the cache to the end, because another teacher changes many of them."""
    order = sorted(settings, key=lambda each: each.startswith(("cache.", "further_caches.")))
    more = len(order) - _MOST
    return order if more <= 1 else [*order[:_MOST], f"{more} more"]


_FOLDER = re.compile(
    r"(?P<label>.+)-seed(?P<seed>[0-9]+)-(?P<digits>[0-9a-f]{8})(?P<again>\.retrain)?"
)


@dataclass(frozen=True)
class FoundRun:
    """A run's folder and the content of its files; `summary` is None until it is finished.

    label: its method, with "-live" if the teacher ran in the loop. problem: why its files are
    invalid, and the fix; the other fields are then empty.
    """

    folder: Path
    label: str
    seed: int
    identity: Mapping[str, Any]
    summary: Mapping[str, Any] | None
    epochs: int  # finished epochs
    num_bytes: int
    changed: float  # seconds, as of time.time
    is_training: bool
    is_repetition: bool  # repeats a finished run, whose folder it will replace
    waits: bool = False  # a finished repetition that was killed before it replaced that folder
    problem: str = ""

    @property
    def key(self) -> tuple[str, str, int]:
        """Student, label and seed; runs with the same key differ only in settings."""
        return self.folder.parent.name, self.label, self.seed

    @property
    def threads(self) -> int | None:
        """Number of threads of a finished run on a CPU, which affects its last bits."""
        summary = self.summary or {}
        return summary.get("threads") if summary.get("device") == "cpu" else None

    @property
    def state(self) -> str:
        if self.problem:
            return "unreadable"
        if self.summary is not None:
            return "finished"
        if self.is_training:
            return "training now"
        if self.waits:
            return "finished repetition, replaces the result when the run is trained"
        has_checkpoint = (self.folder / CHECKPOINT_FILE).is_file()
        state = "interrupted" if has_checkpoint else "unfinished"
        of = f"{self.epochs} of {self.identity['training']['epochs']} epochs"
        return f"{'repetition ' if self.is_repetition else ''}{state}, {of}"

    def is_like(self, identity: Mapping[str, Any]) -> bool:
        """Return True if this run and the run of `identity` differ only in method and seed."""
        return _digest(OF_ONE_RUN, self.identity) == _digest(OF_ONE_RUN, identity)

    def is_repetition_of(self, identity: Mapping[str, Any]) -> bool:
        """Return True if this run and the run of `identity` differ only in the seed."""
        return _digest(("seed",), self.identity) == _digest(("seed",), identity)


def runs_below(runs_dir: Path, student: str | None = None) -> list[FoundRun]:
    """Return all runs, or one student's, sorted by student, method, seed and age.

    Raises BadFile if a folder cannot be read.
    """
    students = _entries(runs_dir) if student is None else [runs_dir / student]
    return sorted((run for each in students for run in runs_in(each)), key=_order)


def runs_in(student_dir: Path) -> list[FoundRun]:
    """Return the runs in a student's folder, sorted by method, seed and age.

    Raises BadFile if the folder cannot be read.
    """
    found = (_read_run(folder) for folder in _entries(student_dir))
    return sorted((run for run in found if run is not None), key=_order)


def _entries(folder: Path) -> list[Path]:
    """Return the content of a folder; nothing if it is missing or a file. Raises BadFile."""
    try:
        return list(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        fix = f"chmod u+rwx {quote(str(folder))}" if error.errno == EACCES else None
        raise BadFile(folder, f"cannot be read: {error.strerror}", fix=fix) from None


def _order(run: FoundRun) -> tuple[str, str, int, float]:
    return *run.key, run.changed


def finished_alike(
    runs: Iterable[FoundRun], own: Mapping[str, Mapping[str, Any]]
) -> list[FoundRun]:
    """Return the comparable finished runs of `runs`: one per method and seed.

    own: {label: identity of a run with that label and any seed}, all with the same settings. A run
    with one of these labels must have the same terms. A run with another label must have the common
    settings. Of several runs of one method and seed, the latest is returned. The order is that of
    `own`.
    """
    order = {label: position for position, label in enumerate(own)}
    example = next(iter(own.values()))
    latest: dict[tuple[str, int], FoundRun] = {}
    for run in sorted(runs, key=_order):
        terms_fit = run.label not in own or run.is_repetition_of(own[run.label])
        if run.summary is not None and run.is_like(example) and terms_fit:
            latest[run.label, run.seed] = run
    return sorted(latest.values(), key=lambda run: (order.get(run.label, len(order)), *run.key))


def changes_since(
    student_dir: Path, name: str, folder: Path, identity: Mapping[str, Any]
) -> list[str]:
    """Return how a run's settings differ from the latest run with its name, one line each.

    Empty if there is no such run, or if the run in `folder` has already started.
    """
    others = sorted(student_dir.glob(f"{glob.escape(name)}-*/{RUN_FILE}"), key=_changed_at)
    if not others or (folder / RUN_FILE).is_file():
        return []
    try:
        latest = read_run(others[-1].parent)
    except BadFile:
        return []  # nothing to compare with
    if latest is None:
        return []
    if latest.get("run_version") != identity["run_version"]:
        return ["this version of the program trains or identifies runs differently"]
    return told([_format_change(change) for change in differences(identity, latest)])


def _format_change(change: Difference) -> str:
    key, ours, theirs = change.field, change.expected, change.found
    for kind in ("cache.teacher.source.", "sources."):
        if key.startswith(kind) and ours is not None and theirs is not None:
            return f"the file of the module {key.removeprefix(kind)} has changed"
    if key == "tested_digest":
        return "the test or validation samples, or their labels, have changed"
    return f"{key} is {short_repr(ours)}, was {short_repr(theirs)}"


def _changed_at(path: Path) -> float:
    return path.stat().st_mtime


def table_of(runs: Sequence[FoundRun], now: float) -> str:
    """Format a line per run, ending with the settings in which the student's runs differ.

    now: seconds, as from time.time.
    """
    settings = _distinctions(runs)
    rows = [["run", "state", "last epoch", "size", "age", "differs in"]]
    for run in runs:
        rows.append(
            [
                f"{run.folder.parent.name}/{run.folder.name}",
                run.state,
                format_deciding(run.summary["last"]) if run.summary else "",
                f"{run.num_bytes / 1e6:,.1f} MB",
                format_age(now - run.changed),
                ", ".join(settings.get(run.folder, ())),
            ]
        )
    return format_table(rows)


def format_result(summary: Mapping[str, Any], folder: Path) -> str:
    """Format a finished run in a few lines: its errors, its time, its folder."""
    best = summary["best"]
    lines = [
        f"{summary['method']}, seed {summary['seed']}: {summary['seconds']:.1f} s, in {folder}",
        f"last epoch ({summary['epochs']}): test {format_values(summary['last'])}",
        f"best epoch ({best['epoch']}, chosen on the {best['chosen_on']} set): test "
        f"{format_values(best['metrics'])}",
    ]
    if teacher := _of_teacher(summary):
        lines.append(f"teacher: test {format_values(teacher)}")
    return "\n  ".join(lines)


def format_probe(probe: Mapping[str, Any]) -> str:
    """Format the result of a probe as a table."""
    rows = [
        (f"student, {probe['start']}", probe["before"]),
        ("student, trained", probe["after"]),
        ("teacher", probe["teacher"]),
    ]
    images = f"{probe['num_train']:,} and {probe['num_test']:,} images"
    head = [f"probe, {images}", *(metric.title_with_unit for metric in PROBED)]
    lines = [[name, *(m.format_number(values[m.name]) for m in PROBED)] for name, values in rows]
    return format_table([head, *lines])


def format_finished(summary: Mapping[str, Any], folder: Path) -> str:
    """Format a run with nothing left to do as a line with its top-1 errors."""
    others = [f"best epoch: test {format_deciding(summary['best']['metrics'])}"]
    if teacher := _of_teacher(summary):
        others.append(f"teacher: test {format_deciding(teacher)}")
    last = format_deciding(summary["last"])
    return f"{folder} is finished: nothing to do. Last epoch: test {last} ({'; '.join(others)})."


def _of_teacher(summary: Mapping[str, Any]) -> dict[str, float]:
    """Return the teacher's test metrics, which the pass measured."""
    measured = summary["teacher"]
    found = {name: measured.get(f"{_TEST}{name}") for name in METRICS}
    return {name: value for name, value in found.items() if value is not None}


def removable(runs: Sequence[FoundRun], *, superseded: bool = False) -> dict[Path, str]:
    """Return {folder: reason} of unfinished runs.

    superseded: include finished runs that were followed by a later run of the same method and seed
    with other settings, which need not be better.
    """
    found, latest = {}, {}
    for run in sorted(runs, key=lambda run: run.changed):
        if run.summary is not None:
            latest[run.key] = run
    for run in runs:
        later = latest.get(run.key, run)
        if run.is_training or run.problem or run.waits:
            continue
        if run.summary is None:
            found[run.folder] = run.state
        elif superseded and later is not run:
            found[run.folder] = _format_later(run, later)
    return found


def _format_later(run: FoundRun, later: FoundRun) -> str:
    """Describe the two runs: their errors, and how their settings differ."""
    pair = [run, later]
    errors = [format_deciding(each.summary["last"]) for each in pair if each.summary]
    own, _ = distinct_settings([(each.label, each.identity) for each in pair])
    return (
        f"finished with {errors[0]}, superseded by {later.folder.name} with {errors[1]}; "
        f"{', '.join(own)}"
    )


def offer_removal(
    runs: Sequence[FoundRun],
    console: Console,
    agree: Callable[[str], bool],
    *,
    superseded: bool = False,
) -> None:
    """List the removable runs, and delete them if `agree` confirms the question.

    superseded: as in `removable`.
    """
    surplus = removable(runs, superseded=superseded)
    for folder, why in surplus.items():
        console.print(f"{folder}: {why}")
    size = sum(run.num_bytes for run in runs if run.folder in surplus) / 1e6
    if not surplus or not agree(
        f"delete these {len(surplus)} of {len(runs)} runs, {size:,.1f} MB?"
    ):
        console.print("nothing deleted")
        return
    for folder in surplus:
        remove_run(folder)
    console.print(f"deleted {len(surplus)} of {len(runs)} runs, {size:,.1f} MB")


def remove_run(folder: Path) -> None:
    """Delete a run. Raises Busy if it is being trained, and BadFile for a link to a folder."""
    if folder.is_symlink():
        raise BadFile(
            folder, "is a symbolic link, expected a folder", fix=f"rm {quote(str(folder))}"
        )
    lock = WriterLock(folder, Job())
    try:
        shutil.rmtree(folder)
    finally:
        lock.release()


def repetition_of(folder: Path) -> Path:
    """Return the folder in which a finished run is trained again until its result is replaced."""
    return folder.with_name(f"{folder.name}.retrain")


def _read_run(folder: Path) -> FoundRun | None:
    """Read the run in a folder; None if there is none."""
    name = _FOLDER.fullmatch(folder.name)
    if name is None:
        return None
    identity, summary, epochs, problem = None, None, 0, ""
    try:
        if (identity := read_run(folder)) is None:
            return None
        _check_folder_name(folder, name, identity)
        summary = read_result(folder, identity)
        epochs = count_epochs(folder, identity_sha256(identity))
    except (BadFile, OSError) as error:
        problem = str(error)
    files = [path for path in folder.rglob("*") if path.name != LOCK_FILE and not path.is_dir()]
    sizes = [path.lstat() for path in files] or [folder.lstat()]
    waits = bool(name["again"]) and summary is not None
    if waits:
        summary = None  # it counts as the run it replaces
    return FoundRun(
        folder=folder,
        label=name["label"],
        seed=int(name["seed"]),
        identity=identity or {},
        summary=summary,
        epochs=epochs,
        num_bytes=sum(size.st_size for size in sizes),
        changed=max(size.st_mtime for size in sizes),
        is_training=summary is None and not waits and _is_locked(folder),
        is_repetition=bool(name["again"]),
        waits=waits,
        problem=problem,
    )


def _check_folder_name(folder: Path, name: re.Match[str], identity: Mapping[str, Any]) -> None:
    """Raise BadFile if a folder's name disagrees with its run.json."""
    sha256, seed = identity_sha256(identity), identity.get("seed")
    if not sha256.startswith(name["digits"]) or seed != int(name["seed"]):
        raise BadFile(
            folder / RUN_FILE,
            f"has the identity {sha256[:8]}... and seed {seed}, unlike the folder's name",
            fix=f"rm -r {quote(str(folder))}  # and train this run again",
        )


def _is_locked(folder: Path) -> bool:
    if not (folder / LOCK_FILE).exists():
        return False
    try:
        WriterLock(folder, Job()).release()
    except Busy:
        return True
    except BadFile:  # the lock is a link: no process holds it
        return False
    return False


def _digest(but: Sequence[str], identity: Mapping[str, Any]) -> str:
    return identity_sha256(without(but, identity))


def _distinctions(runs: Sequence[FoundRun]) -> dict[Path, list[str]]:
    """Return {folder: `key=value` of each setting that differs between its student's runs}."""
    students: dict[Path, list[FoundRun]] = {}
    for run in runs:
        if not run.problem:
            students.setdefault(run.folder.parent, []).append(run)
    found: dict[Path, list[str]] = {}
    for of_one in students.values():
        settings = distinct_settings([(run.label, run.identity) for run in of_one])
        several = len({run.threads for run in of_one if run.threads is not None}) > 1
        for run, own in zip(of_one, settings, strict=True):
            threads = [f"threads={run.threads}"] if several and run.threads is not None else []
            found[run.folder] = [*own, *threads]
    return found
