"""A teacher's weights: the file that contains them, and the run that trains them.

Does not import torch, so that a command with no work left ends at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from teach_once.configs.commands import teacher_command
from teach_once.configs.paths import no_weights
from teach_once.configs.schema import (
    LossTerm,
    TeacherConfig,
    TeacherTraining,
    ViewsConfig,
    as_plain,
)
from teach_once.nets.networks.archs import ArchError, has_stem
from teach_once.nets.teacher.identity import arch_source, init_identity
from teach_once.nets.weights.container import check_container, open_weights
from teach_once.nets.weights.source import check_spelling, is_downloadable, weights_file
from teach_once.runtime.errors import UserError
from teach_once.runtime.formats import counted
from teach_once.runtime.metrics import format_deciding, format_values
from teach_once.store.errors import CacheAmbiguous, CacheError
from teach_once.store.identity import differences, file_sha256, identity_sha256, told
from teach_once.store.inspect.find import find_cache
from teach_once.store.read.mirror import shown_path
from teach_once.store.read.reader import TeacherCache
from teach_once.train.errors import TrainError
from teach_once.train.runs.files import CHECKPOINT_FILE, count_epochs, read_run, read_summary
from teach_once.train.runs.study import recipe_identity
from teach_once.train.runs.teachers import require_labels, tap_names, teacher_identity
from teach_once.views.datasets import Dataset, DatasetError, load_dataset
from teach_once.views.identity import augment_identity

# Settings that affect the training, but not the use of its weights.
_OF_THE_TRAINING_ALONE = ("augment.", "views_seed", "source.")


class TeacherExists(UserError, ValueError):
    """Weights, or an unfinished training, with other settings than the requested ones."""


@dataclass(frozen=True)
class ExistingWeights:
    """Existing weights. summary: of their training; {} if made elsewhere. notes: lines to print."""

    summary: dict[str, Any]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class TeacherRun:
    """The training of a teacher: a run without a teacher of its own, next to its weights.

    It uses a new view in every epoch, with the cache's augmentation and seed but not limited to the
    cache's views. dataset: from `load_teacher_data`.
    """

    config: TeacherConfig
    dataset: Dataset

    @property
    def training(self) -> TeacherTraining:
        assert self.config.training is not None  # see `check_trainable`
        return self.config.training

    @property
    def weights(self) -> Path:
        return weights_file(self.config.teacher.weights)

    @property
    def folder(self) -> Path:
        return training_folder(self.weights)

    @cached_property
    def identity(self) -> dict[str, Any]:
        return training_settings(self.config, self.training, self.dataset.digest)

    @property
    def terms(self) -> tuple[LossTerm, ...]:
        smoothing = self.training.label_smoothing
        return (LossTerm(loss="ce", options={"label_smoothing": smoothing} if smoothing else {}),)

    @property
    def seed(self) -> int:
        return self.training.seed

    @property
    def views(self) -> ViewsConfig:
        is_countable = self.config.views.augment.num_distinct_views is not None
        fresh: int | Literal["all"] = "all" if is_countable else self.training.epochs
        return dataclasses.replace(self.config.views, count=fresh)

    @property
    def num_views(self) -> int:
        return self.views.num_views

    @property
    def has_checkpoint(self) -> bool:
        return (self.folder / CHECKPOINT_FILE).is_file()

    def __str__(self) -> str:
        return (
            f"{counted(self.training.epochs, 'epoch')} x {len(self.dataset.train):,} images "
            f"through {self.config.teacher.arch}"
        )

    def unfinished_otherwise(self) -> str:
        """Describe an unfinished training with other settings; "" if there is none."""
        if not self.has_checkpoint:
            return ""
        recorded = read_run(self.folder) or {}
        differing = differences(self.identity, recorded)
        if not differing:
            return ""
        epochs = count_epochs(self.folder, identity_sha256(recorded))
        heading = (
            f"{self.folder} contains an unfinished training with other settings, {epochs} finished "
            f"epochs:"
        )
        return "\n  ".join([heading, *told(differing)])


def load_teacher_data(config: TeacherConfig, training: TeacherTraining) -> Dataset:
    """Load the dataset with the teacher's own limit, which may exceed its students' limit.

    Raises TrainError if the images have no labels.
    """
    data = dataclasses.replace(config.dataset, max_per_class=training.max_per_class)
    dataset = load_dataset(data)
    require_labels(config, dataset)
    return dataset


def training_settings(
    config: TeacherConfig,
    recipe: TeacherTraining,
    dataset_digest: str,
    ranks: int | None = None,
) -> dict[str, Any]:
    """Return the settings that determine the weights of a teacher trained here.

    ranks: see `train.runs.study`.
    """
    plain = as_plain(config)
    training = recipe_identity(recipe, ranks) | init_identity(recipe.init)
    del training["eval_every"]  # does not affect them
    source = arch_source(config.teacher.arch)
    return {
        "arch": plain["teacher"]["arch"],
        "stem": plain["teacher"]["stem"] if has_stem(config.teacher.arch) else "cifar",
        **({"source": source} if source else {}),
        **({"options": dict(config.teacher.options)} if config.teacher.options else {}),
        "dataset_digest": dataset_digest,
        "normalization": plain["dataset"]["normalization"],
        "augment": augment_identity(config.views),
        "views_seed": plain["views"]["seed"],
        "training": training,
    }


def training_folder(weights: Path) -> Path:
    """Return the folder of a teacher's training, with its metrics and checkpoint."""
    return weights.with_suffix(".training")


def existing_weights(config: TeacherConfig) -> ExistingWeights | None:
    """Return the weights file of the config; None if it is missing.

    Weights trained here (their sha256 is in the summary next to them) must have been trained with
    the settings of the `training:` block, on these data, with this normalization, arch and stem.
    Otherwise TeacherExists lists the differences. Augmentation and the views' seed affect a
    training too, but such weights are an equally good teacher for other views: they are used, with
    a note. The same applies if the network's source file was edited, or if another file has
    replaced the trained one, unless it is damaged (ArchError). Without a `training:` block, any
    file is used.
    """
    weights = weights_file(config.teacher.weights)
    if not weights.is_file():
        return None
    if config.training is None:
        return ExistingWeights({})
    summary = read_summary(training_folder(weights), of_teacher=True) or {}
    if summary.get("weights_sha256") != file_sha256(weights):
        return ExistingWeights({}, _replaced_since(config, weights) if summary else [])
    trained = summary["settings"]
    digest, notes = _digest_to_compare(config, config.training, trained)
    settings = training_settings(config, config.training, digest, _ranks_of(trained))
    if config.training.init is not None and settings["training"]["init"] is None:
        settings["training"]["init"] = trained.get("training", {}).get("init")
        notes.append(f"cannot check its initial weights: {config.training.init} not found")
    differing = differences(settings, trained)
    if refused := [each for each in differing if not each.field.startswith(_OF_THE_TRAINING_ALONE)]:
        raise TeacherExists(
            "\n  ".join([f"{weights} was trained with other settings:", *told(refused)])
            + "\n  use those settings; or set training=null to use the file as it is, or "
            "teacher.weights=ANOTHER_FILE; or train it again",
            fix=teacher_command(config, "--retrain"),
        )
    if differing:
        notes.append(
            f"trained with other settings, but used as it is: {'; '.join(told(differing))}"
        )
    return ExistingWeights(summary, notes)


def _ranks_of(trained: Mapping[str, Any]) -> int:
    """Return the number of processes that trained it; 1 if it made no difference."""
    recipe = trained.get("training")
    ranks = recipe.get("ranks") if isinstance(recipe, dict) else None
    return ranks if isinstance(ranks, int) else 1


def _replaced_since(config: TeacherConfig, weights: Path) -> list[str]:
    """Return a note if the weights were replaced. Raises ArchError if the file is not valid."""
    try:
        with open_weights(weights, follow=True) as file:
            check_container(file, weights)
    except ArchError as error:
        raise ArchError(error.problem, fix=teacher_command(config, "--retrain")) from None
    return ["differs from the file written by its training (sha256); used as it is"]


def reason_not_to_train(config: TeacherConfig, caches: Path | None) -> str:
    """Return why there is nothing to train, to be printed; "" if there is something to train.

    caches: a complete cache of this teacher in that folder makes its weights unnecessary.
    """
    weights = config.teacher.weights
    if (existing := existing_weights(config)) is not None:
        last = existing.summary.get("last")
        error = f" (test {format_deciding(last)})" if last else ""
        there = f"{weights_file(weights)} exists{error}: nothing to do."
        return "\n  ".join([there, *existing.notes])
    if caches is not None and (cache := _cache_in_place_of(config, caches)) is not None:
        return (
            f"file {weights} not found, and not needed: {shown_path(cache.path)} is complete. "
            f"To train it anyway: {teacher_command(config)}"
        )
    return f"{weights} is downloaded when it is needed." if is_downloadable(weights) else ""


def _cache_in_place_of(teacher: TeacherConfig, caches_dir: Path) -> TeacherCache | None:
    """Return the complete cache that makes the missing weights unnecessary; None without one.

    Raises CacheAmbiguous if caches of several weights match, and ArchError if the path of the
    weights seems to be misspelled.
    """
    identity = teacher_identity(teacher, load_dataset(teacher.dataset, caches_dir))
    views = teacher.views.num_views
    try:
        taps = tap_names(teacher)
        cache = find_cache(caches_dir, teacher.name, identity, num_views=views, taps=taps)
    except CacheAmbiguous:
        raise
    except CacheError:
        return None
    check_spelling(teacher.teacher.weights, cache.identity["teacher"]["weights_sha256"])
    return cache


def check_trainable(config: TeacherConfig) -> None:
    """Raise TrainError if the config has no settings for training the teacher's weights."""
    weights = config.teacher.weights
    if is_downloadable(weights):
        raise TrainError(
            f"teacher.weights: {weights} is not trained here", fix="set teacher.weights=PATH"
        )
    if config.training is None:
        raise TrainError(
            f"{no_weights(config, weights_file(weights))}, and {config.name} has no training block",
            fix="put the file there, or set teacher.weights=PATH",
        )


def format_record(record: Mapping[str, Any], weights: Path) -> str:
    """Format a finished training as a line."""
    return (
        f"{weights}: test {format_values(record['last'])}, {record['seconds']:.0f} s "
        f"(metrics in {training_folder(weights)})"
    )


def _digest_to_compare(
    config: TeacherConfig, training: TeacherTraining, trained: Mapping[str, Any]
) -> tuple[str, list[str]]:
    """Return the digest of the training images; if they are missing, of the last training's."""
    try:
        return load_teacher_data(config, training).digest, []
    except DatasetError as error:
        problem = str(error).splitlines()[0]
        note = f"cannot check whether it was trained on these data: {problem}"
        return str(trained.get("dataset_digest")), [note]
