"""Open and check what a command requests, and estimate the missing work and its cost.

Loads torch only if there is something to train.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from teach_once.configs.load import (
    check_data_exists,
    load_student,
    load_teacher,
    split_overrides,
)
from teach_once.configs.schema import StudentConfig, TeacherConfig
from teach_once.nets.networks.archs import stem_hint
from teach_once.nets.weights.source import is_downloadable, weights_file
from teach_once.runtime.command.options import Overrides, StudentName
from teach_once.runtime.formats import format_rows
from teach_once.store.errors import CacheError, CacheIncomplete
from teach_once.store.inspect.find import cache_folder
from teach_once.store.inspect.inspect import missing_records
from teach_once.store.read.mirror import shown_path
from teach_once.store.read.reader import TeacherCache
from teach_once.store.read.source import open_source
from teach_once.train.cli.options import (
    LiveBatchNorm,
    LiveTeacher,
    Method,
    PlacementOption,
    Seed,
    StudyStorage,
)
from teach_once.train.engine.idle_ranks import check_idle_ranks
from teach_once.train.errors import TrainError
from teach_once.train.method.connector_ends import check_ends
from teach_once.train.outputs.shuffle_buffer import PlacementChoice
from teach_once.train.runs.study import MOST_SEED, Run, Study, check_method_name, open_study
from teach_once.train.runs.teachers import tap_names, teacher_configs, teacher_identity
from teach_once.views.augment.augment import view_shape
from teach_once.views.datasets import load_dataset


def open_configs(name: str, overrides: list[str] | None) -> tuple[StudentConfig, TeacherConfig]:
    """Load the student's config and the config of its teacher. Raises ConfigError."""
    own, teachers = split_overrides(overrides or [])
    config = load_student(name, own)
    teacher = load_teacher(config.teacher, teachers)
    check_data_exists(teacher)
    return config, teacher


def open_named_study(
    name: str,
    overrides: list[str] | None,
    storage: StudyStorage,
    placement: PlacementChoice = "auto",
    reads_outputs: bool = True,
) -> Study:
    """Open the study of a student's config. Raises as `open_configs` and `open_study` do."""
    config, teacher = open_configs(name, overrides)
    local = storage.local()
    return open_study(
        config,
        teacher,
        caches_dir=local.caches,
        runs_dir=local.runs,
        cache_path=local.cache,
        placement=placement,
        reads_outputs=reads_outputs,
    )


@dataclass(frozen=True)
class RunRequest:
    """A command line's request for a run that trains from a cache."""

    name: StudentName
    overrides: Overrides = None
    method: Method = "cd+gkd+edt"
    seed: Seed = 0
    storage: StudyStorage = StudyStorage()
    placement: PlacementOption = "auto"

    def open_run(self, *, reads_outputs: bool = True) -> Run:
        """Open the study and the run. Raises as `open_named_study` does."""
        study = open_named_study(
            self.name, self.overrides, self.storage, self.placement, reads_outputs
        )
        return study.run(self.method, self.seed)


@dataclass(frozen=True)
class LiveRunRequest(RunRequest):
    """A request for a run that may have its teacher in the loop."""

    live_teacher: LiveTeacher = False
    live_bn: LiveBatchNorm = False

    def open_run(self, *, reads_outputs: bool = True) -> Run:
        """Open the study and the run. Raises as `open_named_study` does."""
        run = super().open_run(reads_outputs=reads_outputs)
        return run.study.run(run.method, run.seed, self.live_teacher, self.live_bn)


def parse_seeds(text: str) -> list[int]:
    """Parse distinct whole numbers of at most 64 bits. Raises TrainError."""
    words = text.split()
    if not words or not all(re.fullmatch("[0-9]{1,20}", word) for word in words):
        raise TrainError(f'--seeds {text!r}: expected whole numbers, as in "0 1 2"')
    seeds = list(dict.fromkeys(map(int, words)))
    if max(seeds) > MOST_SEED:
        raise TrainError(f"--seeds: {max(seeds)} is too large; the largest is {MOST_SEED}")
    return seeds


# ---- checks


ALL_FINISHED = "all runs are finished"


@dataclass(frozen=True)
class PlannedRuns:
    """Runs of one student that may not have a cache yet.

    teacher: the first of its teachers. storage: local folders. ranks: processes that will train a
    run together.
    """

    config: StudentConfig
    teacher: TeacherConfig
    methods: Sequence[str]
    seeds: Sequence[int]
    storage: StudyStorage
    placement: PlacementChoice
    ranks: int = 1

    def open_study(self) -> Study:
        """Open their study. Raises CacheError if a cache is missing or does not fit."""
        return open_study(
            self.config,
            self.teacher,
            caches_dir=self.storage.caches,
            runs_dir=self.storage.runs,
            cache_path=self.storage.cache,
            placement=self.placement,
        )

    def of(self, study: Study) -> list[Run]:
        """Return the runs, in the order of the methods."""
        return [study.run(method, seed) for method in self.methods for seed in self.seeds]


def check_runs(runs: PlannedRuns, device: str, *, builds_networks: bool = False) -> str:
    """Check that runs can work; returns a description of the checks.

    Without a cache, the teacher's config determines the content of the future cache, and both
    networks are built. builds_networks: build the student with a cache too. Raises
    TrainError, ArchError, TapError, DatasetError or DeviceError if a run cannot work.
    """
    config, teacher, methods = runs.config, runs.teacher, runs.methods
    for method in methods:
        check_method_name(config, method)
    study: Study | None = None
    try:
        study = runs.open_study()
    except CacheError:
        pass
    else:
        if all(run.is_finished for run in runs.of(study)):
            return ALL_FINISHED
    from teach_once.runtime.machine.devices import check_device
    from teach_once.train.runs.check_methods import (
        check_students,
        check_without_cache,
        missing_taps,
    )

    check_device(device)
    if runs.ranks > 1:
        num_samples = len(load_dataset(teacher.dataset, runs.storage.caches).train)
        check_idle_ranks(config.training, num_samples, runs.ranks)
    if study is not None:
        check_ends(study, methods)
    if study is None or any(
        missing_taps(config, methods, list(each.stages), each.cache.taps) for each in study.teachers
    ):
        check_without_cache(config, teacher, methods, runs.storage.caches)
        there = "does not exist yet" if study is None else "lacks some taps"
        return f"checked: device, images, networks, taps and losses; the cache {there}"
    checked = "device"
    if builds_networks:
        check_students(study, methods)
        checked = "device, networks, losses"
    cache = shown_path(study.cache.path)
    return f"checked: {checked}, and that {cache} has all taps that they read"


def slow_precision(
    config: StudentConfig, teacher: TeacherConfig, caches_dir: Path, device: str
) -> str:
    """Return a hint if the student's precision is slower than float32 here, otherwise "".

    Measures both if possible. Raises DeviceError, DatasetError or ArchError.
    """
    if config.training.precision == "float32":
        return ""
    from teach_once.runtime.machine.devices import pick_device
    from teach_once.train.sessions.trial import precision_hint

    return precision_hint(config, teacher, caches_dir, pick_device(device))


# ---- cost


def print_plan(
    request: RunRequest,
    device: str,
    console: Console,
    *,
    has_trial: bool,
    ranks: int = 1,
    is_missing_only: bool = False,
) -> None:
    """Check that a run can work, and print its stages with their cost.

    ranks: processes that will train it together. is_missing_only: leave out finished stages, about
    which the command that runs them prints a line. Raises as `check_runs` does.
    """
    config, teacher = open_configs(request.name, request.overrides)
    methods, seeds, local = [request.method], [request.seed], request.storage.local()
    runs = PlannedRuns(config, teacher, methods, seeds, local, request.placement, ranks)
    found = check_runs(runs, device)
    if found == ALL_FINISHED and is_missing_only:
        return
    rows, hints = plan_rows(runs, device if has_trial else None)
    shown = [(row.label, row.value) for row in rows if not (row.is_done and is_missing_only)]
    console.print(format_rows(shown), *hints, sep="\n")


class PlanRow(NamedTuple):
    """A row of a plan: a stage with its state, or a cost."""

    label: str
    value: str
    is_done: bool = False


def plan_rows(runs: PlannedRuns, device: str | None = None) -> tuple[list[PlanRow], list[str]]:
    """Return rows for the weights, the cache and a run, that it exists or its cost; and hints.

    runs: one run. device: measures the time and the memory of a few steps.
    """
    config, teacher, storage = runs.config, runs.teacher, runs.storage
    dataset = load_dataset(teacher.dataset, storage.caches)
    samples = len(dataset.train)
    teachers = teacher_configs(config, teacher)
    shape = view_shape(dataset.train.first_shape, teacher.views.augment)
    hints = [*stem_hints(config, teacher, shape), *dataset.hints]
    passes = f"{samples:,} samples x {config.training.epochs} epochs through {config.student.arch}"
    if runs.ranks > 1:
        passes += f", by {runs.ranks} processes"
    try:
        study = runs.open_study()
    except CacheError:
        if storage.cache is not None:
            raise
        absent = [row for each in teachers for row in _absent_rows(each, storage.caches)]
        return [*absent, PlanRow("student", f"to train: {passes}")], hints
    rows = []
    for number, each in enumerate(study.teachers):
        rows += _found_rows(each.config, each.cache, number > 0 or storage.cache is None)
    (run,) = runs.of(study)
    if run.is_finished:
        return [*rows, PlanRow("student", f"finished: {run.folder}", is_done=True)], []
    rows.append(PlanRow("student", f"to train: {passes}"))
    if device is not None:
        with suppress(CacheIncomplete):  # reported in the row of the cache
            costs, slower = _trial_rows(run, device)
            return [*rows, *costs], [*hints, *slower]
    return rows, hints


def stem_hints(
    config: StudentConfig, teacher: TeacherConfig, image_shape: tuple[int, int, int]
) -> list[str]:
    """Return hints about stems that are too slow for images of shape (H, W, C)."""
    ours, theirs = config.student, teacher.teacher
    hints = [
        stem_hint(theirs.arch, theirs.stem, image_shape, "teacher.stem"),
        stem_hint(ours.arch, ours.stem, image_shape, "student.stem"),
    ]
    return [hint for hint in hints if hint]


def _absent_rows(teacher: TeacherConfig, caches_dir: Path) -> list[PlanRow]:
    """Return rows for the weights and a possibly missing cache."""
    dataset = load_dataset(teacher.dataset, caches_dir)
    path = cache_folder(caches_dir, teacher.name, teacher_identity(teacher, dataset))
    return [_weights_row(teacher), _cache_row(teacher, path, len(dataset.train))]


def _found_rows(teacher: TeacherConfig, cache: TeacherCache, may_grow: bool) -> list[PlanRow]:
    """Return rows for the weights and a cache that may lack some configured taps."""
    found = PlanRow("cache", f"found: {shown_path(cache.path)}", is_done=True)
    row = _cache_row(teacher, cache.path, cache.num_samples) if may_grow else found
    if not row.is_done:
        return [_weights_row(teacher), row]
    weights = weights_file(teacher.teacher.weights)
    needed = "found" if weights.is_file() else "not needed, the cache is complete"
    return [PlanRow("teacher", f"{needed}: {weights}", is_done=True), row]


def _cache_row(teacher: TeacherConfig, path: Path, samples: int) -> PlanRow:
    """Return a row for the cache, with the images that the teacher must still process."""
    views, arch = teacher.views.num_views, teacher.teacher.arch
    every = samples * views
    try:
        missing = missing_records(open_source(path), views, tap_names(teacher))
    except CacheError:
        size = f"{samples:,} samples x {views} views = {every:,} images"
        return PlanRow("cache", f"to build: {size} through {arch}")
    if not missing.records:
        return PlanRow("cache", f"found: {shown_path(path)}", is_done=True)
    what = f"extend by {missing.growth}" if missing.growth else "finish"
    images = f"{missing.records:,} of {every:,} images"
    return PlanRow("cache", f"to {what}: {images} through {arch}, into {shown_path(path)}")


def _trial_rows(run: Run, device: str) -> tuple[list[PlanRow], list[str]]:
    """Return rows for the time and memory of a run, and a hint if its precision is slow."""
    from teach_once.runtime.formats import format_duration, format_rate
    from teach_once.runtime.machine.devices import pick_device
    from teach_once.train.sessions.trial import FASTER, format_slower, try_run

    picked = pick_device(device)
    trial = try_run(run, picked)
    study = run.study
    images = len(study.dataset.train) * study.config.training.epochs
    hours = images / max(trial.images_per_second, 1e-9) / 3600
    rate = f"{format_rate(trial.images_per_second)} images/s on {picked}"
    rows = [
        PlanRow("time", f"about {format_duration(hours)} without tests at {rate}"),
        PlanRow("memory", trial.memory.with_free()),
    ]
    if picked.type != "cpu" or run.training.precision == "float32":
        return rows, []
    in_float32 = try_run(_in_float32(run), picked).images_per_second
    if in_float32 < FASTER * trial.images_per_second:
        return rows, []
    return rows, [format_slower(run.training.precision, trial.images_per_second, in_float32)]


def _in_float32(run: Run) -> Run:
    config = run.study.config
    training = dataclasses.replace(config.training, precision="float32")
    config = dataclasses.replace(config, training=training)
    return dataclasses.replace(run, study=dataclasses.replace(run.study, config=config))


def _weights_row(teacher: TeacherConfig) -> PlanRow:
    weights = weights_file(teacher.teacher.weights)
    if weights.is_file():
        return PlanRow("teacher", f"found: {weights}", is_done=True)
    if is_downloadable(teacher.teacher.weights):
        return PlanRow("teacher", f"to download: {teacher.teacher.weights}")
    if teacher.training is None:
        return PlanRow("teacher", f"missing: {weights}, and the config has no training block")
    limit = teacher.training.max_per_class
    images = f"at most {limit:,} images per class" if limit else "all training images"
    epochs = f"{teacher.training.epochs} epochs through {teacher.teacher.arch}"
    return PlanRow("teacher", f"to train: {images} x {epochs}, into {weights}")
