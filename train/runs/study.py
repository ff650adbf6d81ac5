"""Studies: the common settings of a student config's runs, and the identity of each run.

Does not import torch, so that a command with no work left ends at once.
"""

from __future__ import annotations

import glob
import shlex
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from teach_once.configs.schema import (
    LossTerm,
    StudentConfig,
    StudentNet,
    StudentTraining,
    TeacherConfig,
    Training,
    as_plain,
)
from teach_once.nets.networks.archs import has_stem
from teach_once.nets.networks.names import check_arch
from teach_once.nets.teacher.identity import arch_source, init_identity
from teach_once.runtime.command.program import program
from teach_once.runtime.command.user_code import module_sha256
from teach_once.runtime.errors import did_you_mean
from teach_once.runtime.machine.resources import num_ranks
from teach_once.runtime.safe.safe_read import BadFile
from teach_once.store.identity import identity_sha256
from teach_once.store.read.reader import TeacherCache
from teach_once.train.errors import TrainError
from teach_once.train.method.connector_ends import linear_connectors
from teach_once.train.outputs.shuffle_buffer import PlacementChoice, record_bytes, window_rows
from teach_once.train.runs.files import RUN_FILE, read_result, read_run
from teach_once.train.runs.folder import changes_since, repetition_of
from teach_once.train.runs.teachers import (
    StudyTeacher,
    explain_too_many_views,
    open_teachers,
    verified_pixels,
)
from teach_once.views.augment.augment import view_shape
from teach_once.views.datasets import Dataset, load_dataset

if TYPE_CHECKING:
    import torch

    from teach_once.train.engine.comparison import TeacherReference
    from teach_once.views.pixels.resident import DatasetPixels
    from teach_once.views.splits import Digests


def recipe_identity(training: Training, ranks: int | None = None) -> dict[str, Any]:
    """Return the parts of the recipe that determine the trained network, as plain data.

    The number of processes matters only if each one normalizes its own slice of a batch; then it is
    included as "ranks". For a single process `batch_norm` makes no difference. ranks: number of
    processes; None: as many as this process was started with.
    """
    plain = as_plain(training)
    if plain.pop("batch_norm") == "sync":
        return plain
    ranks = num_ranks() if ranks is None else ranks
    return {**plain, "batch_norm": "local", "ranks": ranks} if ranks > 1 else plain


def network_identity(net: StudentNet, linear_connectors: Sequence[str]) -> dict[str, Any]:
    """Return the student's network and connectors as plain data, with layers instead of settings.

    linear_connectors: the taps whose connectors end without ReLU. Raises TrainError if the file of
    initial weights is missing.
    """
    stem = {} if has_stem(net.arch) else {"stem": "cifar"}
    init = init_identity(net.init)
    if init.get("init", "") is None:
        raise TrainError(f"student.init: file {net.init} not found", fix="set student.init=PATH")
    plain = as_plain(net)
    plain.pop("relu_to_signed")  # it only permits the value of `connector`
    plain["connector"] = "none" if net.connector == "none" else "conv-bn-relu"
    plain["linear_connectors"] = list(linear_connectors)
    return {**plain, **stem, **init}


RUN_VERSION = 1  # increase it when the same settings would train differently
MOST_SEED = 2**64 - 1


@dataclass(frozen=True)
class Study:
    """A student config with the data and the caches of its runs.

    teachers: at least one; all have the dataset and the views of the first.
    """

    config: StudentConfig
    teachers: tuple[StudyTeacher, ...]
    dataset: Dataset
    runs_dir: Path
    placement: PlacementChoice = "auto"
    _pixels: dict[tuple[torch.device, int | None], DatasetPixels] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @property
    def teacher(self) -> TeacherConfig:
        """Config of the first teacher."""
        return self.teachers[0].config

    @property
    def cache(self) -> TeacherCache:
        """Cache of the first teacher."""
        return self.teachers[0].cache

    @property
    def caches(self) -> list[TeacherCache]:
        return [each.cache for each in self.teachers]

    @property
    def num_views(self) -> int:
        return views_used(self.config, self.teacher)

    def window_rows(self, taps: Collection[str]) -> int | None:
        """Return the number of samples per shuffle window for these taps; None: all samples."""
        if len(self.teachers) == 1:
            return window_rows(self.cache, taps, self.placement)
        if self.placement == "window":
            raise TrainError(
                "the outputs of several teachers cannot be read in windows",
                fix="set PLACEMENT=auto",
            )
        return None

    def pixels(
        self,
        device: torch.device,
        num_workers: int | None = None,
        *,
        digests: Callable[[], Digests | None] | None = None,
    ) -> DatasetPixels:
        """Return the views of all splits on a device, opened once for all runs. Loads torch.

        Reading a training sample whose bytes differ from the teacher's raises DatasetError.
        digests: returns those of the teacher's samples, or None if there are none so far; default:
        the cache's.
        """
        from teach_once.views.pixels.resident import open_dataset_pixels

        key = device, num_workers
        if key not in self._pixels:
            self._pixels.clear()  # opened on another device
            normalization = self.teacher.dataset.normalization
            pixels = open_dataset_pixels(
                self.dataset, self.teacher.views, normalization, device, num_workers
            )
            train = verified_pixels(pixels.train, self.dataset, self.cache, self.teacher, digests)
            self._pixels[key] = pixels._replace(train=train)
        return self._pixels[key]

    @cached_property
    def reference(self) -> TeacherReference | None:
        """The teachers' outputs of the test images; None if a cache has none. Loads torch."""
        from teach_once.train.runs.reference import read_reference

        return read_reference(self.teachers, self.dataset.test_digest)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of the views."""
        return view_shape(self.dataset.train.first_shape, self.teacher.views.augment)

    @property
    def folder(self) -> Path:
        return self.runs_dir / self.config.name

    def run(self, method: str, seed: int, live_teacher: bool = False, live_bn: bool = False) -> Run:
        """Return the run of a method and a seed. Raises TrainError for an unknown method."""
        check_method_name(self.config, method)
        return Run(self, method, seed, live_teacher or live_bn, live_bn)


@dataclass(frozen=True, eq=False)
class Run:
    """One student trained with one method and one seed, from the cache or with a live teacher.

    Loads torch only if the taps that its losses read must be known.
    """

    study: Study
    method: str
    seed: int
    live_teacher: bool = False
    live_bn: bool = False  # the teacher's batch norm uses batch statistics
    is_repetition: bool = False  # repeats a finished run, whose folder it replaces at the end
    ranks: int | None = None  # processes that train it; None: this process's world size

    def __str__(self) -> str:
        return f"{self.method}, seed {self.seed}"

    @property
    def name(self) -> str:
        """Name that is unique within the study's settings."""
        label = f"{self.method}-live" if self.live_teacher else self.method
        label += "-bn" * self.live_bn
        return f"{label}-seed{self.seed}"

    @property
    def terms(self) -> tuple[LossTerm, ...]:
        return self.study.config.methods[self.method]

    @property
    def training(self) -> StudentTraining:
        return self.study.config.training

    @property
    def num_views(self) -> int:
        return self.study.num_views

    @property
    def folder(self) -> Path:
        """`<runs>/<student>/<method>-seed<k>-<8 digits of the sha256>`, unique per settings."""
        if "/" in self.name or self.study.config.name in ("", ".", ".."):
            raise TrainError(f"{self.study.config.name}/{self.name} is outside the folder of runs")
        folder = self.study.folder / f"{self.name}-{self.sha256[:8]}"
        return repetition_of(folder) if self.is_repetition else folder

    @cached_property
    def sha256(self) -> str:
        return identity_sha256(self.identity)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Settings that determine the run's result; runs with equal identities are the same run."""
        study, plain = self.study, as_plain(self.study.config)
        rows = None if self.live_teacher else self.window_rows
        return {
            **({"window": rows} if rows else {}),
            "run_version": RUN_VERSION,
            "student": network_identity(study.config.student, self.linear_connectors),
            "training": recipe_identity(study.config.training, self.ranks),
            "terms": plain["methods"][self.method],
            "seed": self.seed,
            "num_views": self.num_views,
            "evaluation": as_plain(study.teacher.views.eval_transform),
            "teacher_outputs": "live" if self.live_teacher else "cache",
            **({"teacher_bn": "batch"} if self.live_bn else {}),
            "sources": self._sources(),
            "tested_digest": study.dataset.tested_digest,
            "cache": study.cache.identity,
            **self._several_teachers(),
        }

    def _several_teachers(self) -> dict[str, Any]:
        """Return each teacher's weight and all caches but the first, if there are several."""
        teachers = self.study.teachers
        if len(teachers) == 1:
            return {}
        return {
            "teacher_weights": [each.weight for each in teachers],
            "further_caches": [each.cache.identity for each in teachers[1:]],
        }

    @cached_property
    def linear_connectors(self) -> tuple[str, ...]:
        """Taps whose connectors end without ReLU; see `train.method.connector_ends`."""
        return linear_connectors(self.study, self.terms)

    def _sources(self) -> dict[str, str | None]:
        """Return {module: sha256 of its file} of the user's losses and network in the run."""
        own = [term.loss for term in self.terms if ":" in term.loss]
        modules = [name.partition(":")[0] for name in own]
        losses = {module: module_sha256(module) for module in modules}
        return losses | arch_source(self.study.config.student.arch)

    @property
    def needed_taps(self) -> list[str]:
        """Taps of the first teacher that the method's losses read, even if incomplete."""
        return self.needed_of_each[0]

    @property
    def needed_of_each(self) -> list[list[str]]:
        """Taps read from each teacher; with several, including those that determine `correct`."""
        from teach_once.train.terms import taps_of  # loads torch

        found = []
        for teacher in self.study.teachers:
            wanted = taps_of(self.terms, list(teacher.stages))
            if "correct" in wanted and len(self.study.teachers) > 1:
                wanted |= {"logits"}
            found.append([tap for tap in teacher.cache.manifest.taps if tap in wanted])
        return found

    @property
    def window_rows(self) -> int | None:
        """Number of samples per shuffle window; None: all samples.

        Loads torch only if the size of all taps does not decide this.
        """
        if self.study.window_rows(self.study.cache.manifest.taps) is None:
            return None
        return self.study.window_rows(self.needed_taps)

    @property
    def held_bytes(self) -> int:
        """Bytes of teacher outputs in memory at a time: two views or two windows."""
        return held_together([self])

    @property
    def summary(self) -> dict[str, Any] | None:
        """Result of the finished run; None if it is not finished.

        Raises BadFile if its files contradict each other or their checksums.
        """
        return read_result(self.folder, self.identity)

    @property
    def is_finished(self) -> bool:
        """True if nothing is left to train: the result is valid, and no repetition was started."""
        try:
            return self.summary is not None and not repetition_of(self.folder).is_dir()
        except BadFile:
            return False

    @property
    def repetition(self) -> Run | None:
        """The started repetition of this run (`begin_again`); None if there is none."""
        again = repetition_of(self.folder).is_dir()
        return replace(self, is_repetition=True) if again else None

    def changes(self) -> list[str]:
        """Differences of the settings from the latest run of this method and seed, one line each.

        Empty if there is no such run, or if this run has already started.
        """
        return changes_since(self.study.folder, self.name, self.folder, self.identity)


def needed_together(runs: Sequence[Run]) -> list[list[str]]:
    """Return the taps that runs of one study read from each teacher."""
    wanted = [
        {tap for taps in of_one for tap in taps}
        for of_one in zip(*(run.needed_of_each for run in runs), strict=True)
    ]
    return [
        [tap for tap in cache.manifest.taps if tap in taps]
        for cache, taps in zip(runs[0].study.caches, wanted, strict=True)
    ]


def held_together(runs: Sequence[Run]) -> int:
    """Return the bytes of teacher outputs in memory for runs of one study with shared loading."""
    study = runs[0].study
    rows = 2 * (runs[0].window_rows or study.cache.num_samples)
    return rows * sum(map(record_bytes, study.caches, needed_together(runs)))


def check_method_name(config: StudentConfig, method: str) -> None:
    """Raise TrainError if the config has no such method."""
    if method not in config.methods:
        name = config.source.name if config.source else config.name
        raise TrainError(
            f"unknown method {method!r} of {config.name}"
            f"{did_you_mean(method, config.methods, most=3)}",
            fix=shlex.join([*program("configs"), "student", name]),
        )


def open_study(
    config: StudentConfig,
    teacher: TeacherConfig,
    *,
    caches_dir: Path,
    runs_dir: Path,
    cache_path: Path | None = None,
    placement: PlacementChoice = "auto",
    reads_outputs: bool = True,
) -> Study:
    """Find the caches, check that they match the teachers and pixels, and check the config.

    Taps may be incomplete; those that a run needs are checked when the run starts
    (`train.sessions.student`). reads_outputs: False if no teacher outputs will be read, so that
    views may be missing too.

    Raises CacheError, TrainError, DatasetError or ArchError. Never runs a teacher.
    """
    check_arch(config.student.arch)
    check_arch(teacher.teacher.arch)
    dataset = load_dataset(teacher.dataset, caches_dir)
    views = views_used(config, teacher) if reads_outputs else 1
    with explain_too_many_views(views_used(config, teacher), teacher, caches_dir):
        teachers = open_teachers(config, teacher, dataset, views, caches_dir, cache_path)
    return Study(config, teachers, dataset, runs_dir, placement)


def views_used(config: StudentConfig, teacher: TeacherConfig) -> int:
    """Return the number of views that a student trains on, of those currently in its cache."""
    return config.num_views or teacher.views.num_views


def trained_by_any_number(run: Run) -> Run:
    """Find a finished run trained with another number of processes; default: the run itself.

    Raises TrainError if it was trained with several numbers of processes.
    """
    if run.training.batch_norm == "sync" or run.is_finished:
        return run
    files = run.study.folder.glob(f"{glob.escape(run.name)}-*/{RUN_FILE}")
    candidates = {path.parent: replace(run, ranks=_ranks_of(path.parent)) for path in files}
    found = [
        each for folder, each in candidates.items() if each.folder == folder and each.is_finished
    ]
    if len(found) > 1:
        folders = ", ".join(sorted(str(each.folder) for each in found))
        raise TrainError(
            f"{run} was trained with several numbers of processes, each with its own batch norms: "
            f"{folders}",
            fix="move all but one of them elsewhere",
        )
    return found[0] if found else run


def _ranks_of(folder: Path) -> int:
    """Return the number of ranks in the run's file; 1 if the file has no valid one."""
    try:
        training = (read_run(folder) or {}).get("training", {})
    except BadFile:
        return 1
    ranks = training.get("ranks")
    return ranks if isinstance(ranks, int) else 1
