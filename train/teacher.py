"""Trains a teacher from the `training:` block of its config, where no weights exist.

It sees a fresh view in every epoch: the cache's augmentation and seed, not limited to the views
that the cache will hold.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console

from configs.commands import teacher_command
from configs.paths import no_weights
from configs.schema import LossTerm, TeacherConfig, TeacherTraining, as_plain
from nets.archs import check_arch, has_stem
from nets.source import arch_source
from nets.weights_file import is_downloadable, weights_file
from runtime.errors import UserError
from store.differences import differences
from store.identity import (
    file_sha256,
    identity_sha256,
)
from train.run_files import CHECKPOINT_FILE, METRICS_FILE, RUN_FILE, SUMMARY_FILE
from train.study import TrainError, cache_in_place_of_weights
from views.datasets import Dataset, DatasetError, load_dataset
from views.identity import augment_identity

if TYPE_CHECKING:
    import torch

    from train.loop import Learner, Task

# Settings that decide a training, and not how its weights are to be used.
_OF_THE_TRAINING_ALONE = ("augment.", "views_seed", "source.")


class TeacherExists(UserError, ValueError):
    """Weights, or an unfinished training of them, of other settings than those asked for."""


@dataclass(frozen=True)
class FoundWeights:
    """summary: of their training, {} where they were made elsewhere. notes: what to say of them."""

    summary: dict[str, Any]
    notes: list[str] = field(default_factory=list)


def training_settings(config: TeacherConfig, dataset_digest: str) -> dict[str, Any]:
    """What decides the weights of a teacher trained here."""
    plain = as_plain(config)
    training = dict(plain["training"])
    del training["evaluate_every"]  # decides nothing about the weights
    if not training["compile"]:
        del training["compile"]
    source = arch_source(config.teacher.arch)
    return {
        "arch": plain["teacher"]["arch"],
        "stem": plain["teacher"]["stem"] if has_stem(config.teacher.arch) else "cifar",
        **({"source": source} if source else {}),
        "dataset_digest": dataset_digest,
        "normalisation": plain["dataset"]["normalisation"],
        "augment": augment_identity(config.views),
        "views_seed": plain["views"]["seed"],
        "training": training,
    }


def training_folder(weights: Path) -> Path:
    """Where the metrics and the checkpoint of a teacher's training lie: beside its weights."""
    return weights.with_suffix(".training")


def existing_weights(config: TeacherConfig) -> FoundWeights | None:
    """The weights file that the config names; None if it is missing.

    Weights trained here (their sha256 is in the summary beside them) must have been trained as the
    `training:` block says, on these data, normalised as here, with this arch and stem: otherwise
    they are not what the config promises, and TeacherExists names the differences. Augmentation and
    the views' seed decide a training too, but such weights are as good a teacher on other views:
    they are used, with a note. So are those whose network's file has been edited. A config without
    a `training:` block takes any file as it is.
    """
    weights = weights_file(config.teacher.weights)
    if not weights.is_file():
        return None
    summary = _read_json(training_folder(weights) / SUMMARY_FILE)
    if config.training is None or summary.get("weights_sha256") != file_sha256(weights):
        return FoundWeights({})
    trained = _trained_with(summary, training_folder(weights))
    digest, notes = _digest_to_compare(config, config.training, trained)
    differing = differences(training_settings(config, digest), trained)
    if refused := [each for each in differing if not each.field.startswith(_OF_THE_TRAINING_ALONE)]:
        raise TeacherExists(
            "\n  ".join([f"{weights} was trained with other settings:", *map(str, refused)])
            + "\n  use those settings; or set training=null to use the file as it is, or "
            "teacher.weights=ANOTHER_FILE; or train it again",
            fix=teacher_command(config, "--retrain"),
        )
    if differing:
        notes.append(
            f"trained with other settings, but used as it is: {'; '.join(map(str, differing))}"
        )
    return FoundWeights(summary, notes)


def reason_not_to_train(config: TeacherConfig, caches: Path | None) -> str:
    """Why there is nothing to train, to be printed; empty if there is something.

    caches: a complete cache of this teacher in that folder makes its weights unnecessary.
    """
    weights = config.teacher.weights
    if (existing := existing_weights(config)) is not None:
        last = existing.summary.get("last")
        error = f": test error {last['top1_error']:.2f} % top-1" if last else ""
        there = f"{weights_file(weights)} exists{error}: nothing to do."
        return "\n  ".join([there, *existing.notes])
    if caches is not None and (cache := cache_in_place_of_weights(config, caches)) is not None:
        return (
            f"{weights} is missing, but not needed: {cache.path} is complete. To train it anyway: "
            f"{teacher_command(config)}"
        )
    return f"{weights} is downloaded when it is needed." if is_downloadable(weights) else ""


def refuse_untrainable(config: TeacherConfig) -> None:
    """Raise TrainError where the config does not say how to train the teacher's weights."""
    weights = config.teacher.weights
    if is_downloadable(weights):
        raise TrainError(
            f"teacher.weights: {weights} is not trained here", fix="set teacher.weights=PATH"
        )
    if config.training is None:
        raise TrainError(
            f"{no_weights(config, weights_file(weights))}, and {config.name} has no training "
            f"block to train it with",
            fix="put the file there, or set teacher.weights=PATH",
        )


def format_record(record: Mapping[str, Any], weights: Path) -> str:
    """A finished training in one line."""
    last = record["last"]
    top5 = f", {last['top5_error']:.2f} % top-5" if record["num_classes"] > 5 else ""
    return (
        f"{weights}: test error {last['top1_error']:.2f} % top-1{top5}, {record['seconds']:.0f} s "
        f"(metrics in {training_folder(weights)})"
    )


def _digest_to_compare(
    config: TeacherConfig, training: TeacherTraining, trained: Mapping[str, Any]
) -> tuple[str, list[str]]:
    """The digest of the images to train on; without them that of those it was trained on, told."""
    try:
        return load_dataset(_teacher_data(config, training)).digest, []
    except DatasetError as error:
        problem = str(error).splitlines()[0]
        note = f"cannot tell whether it was trained on these data: {problem}"
        return str(trained.get("dataset_digest")), [note]


def _trained_with(summary: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The settings of the training that the summary is of; {} where nobody knows them any more.

    Older summaries do not hold them; then they are in run.json, unless a later training that was
    interrupted has put its own there.
    """
    if "settings" in summary:
        return dict(summary["settings"])
    recorded = _read_json(folder / RUN_FILE)
    return recorded if summary.get("run_sha256") == identity_sha256(recorded) else {}


def _read_json(path: Path) -> dict[str, Any]:
    """{} where there is no such file, or none that can be read."""
    try:
        content: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content


def _other_unfinished(folder: Path, settings: Mapping[str, Any]) -> str:
    """An unfinished training in `folder` of other settings, in words; empty if there is none."""
    if not (folder / CHECKPOINT_FILE).is_file():
        return ""
    differing = differences(settings, _read_json(folder / RUN_FILE))
    if not differing:
        return ""
    metrics = folder / METRICS_FILE
    epochs = len(metrics.read_text().splitlines()) if metrics.is_file() else 0
    heading = (
        f"{folder} holds an unfinished training with other settings, {epochs} finished epochs:"
    )
    return "\n  ".join([heading, *map(str, differing)])


def train_teacher(
    config: TeacherConfig,
    *,
    device: str,
    console: Console,
    num_workers: int | None = None,
    retrain: bool = False,
    limit_hours: float | None = None,
) -> dict[str, Any]:
    """Train, or resume training, and save the weights; returns the summary of the training.

    An unfinished training with other settings is discarded by `retrain`, else refused with
    TeacherExists. limit_hours: a new training that takes longer, estimated from a few steps,
    is refused with TrainError; None: no trial.
    """
    from runtime.devices import pick_device
    from runtime.formats import format_duration

    assert config.training is not None
    dataset = load_dataset(_teacher_data(config, config.training))
    weights = weights_file(config.teacher.weights)
    folder, settings = training_folder(weights), training_settings(config, dataset.digest)
    if unfinished := _other_unfinished(folder, settings):
        if not retrain:
            raise TeacherExists(
                f"{unfinished}\n  those settings resume it; --retrain discards it",
                fix=teacher_command(config, "--retrain"),
            )
        console.print(f"discarded: {unfinished}")
    place = pick_device(device)
    what = f"{_size(config, dataset)} on {place}"
    console.print(f"training the teacher {config.name} into {weights}: {what}")
    task, learner = _assemble(config, dataset, place, num_workers)
    if limit_hours is not None and not (folder / CHECKPOINT_FILE).is_file():
        hours = _hours(task, learner)
        if hours > limit_hours:
            raise TrainError(
                f"{no_weights(config, weights)}, and training it takes about "
                f"{format_duration(hours)}: {what}\n  correct teacher.weights, or agree to the "
                f"training once (with make: TRAIN_TEACHER=1)",
                fix=teacher_command(config, "--train-teacher"),
            )
        console.print(f"about {format_duration(hours)} without tests, estimated from a few steps")
        task, learner = _assemble(config, dataset, place, num_workers)
    summary = _fitted(task, learner, weights, settings, console)
    return {**summary, "num_classes": dataset.num_classes}


def _fitted(
    task: Task, learner: Learner, weights: Path, settings: Mapping[str, Any], console: Console
) -> dict[str, Any]:
    """Train to the end, from the checkpoint if there is one, and save; returns the summary."""
    import torch

    from nets.weights import save_atomically
    from runtime.signals import StopRequest
    from train.feed import NoTeacher
    from train.loop import EpochResult, fit
    from train.progress import EpochPrinter
    from train.records import RunRecorder

    with StopRequest() as stop:
        recorder = RunRecorder(training_folder(weights), settings, learner, stop=stop)
        report = EpochPrinter(task.training.epochs, recorder.first_epoch, console)

        def after_epoch(result: EpochResult) -> None:
            recorder.epoch_done(result)
            report(result)

        try:
            fit(
                task,
                learner,
                NoTeacher(),
                first_epoch=recorder.first_epoch,
                on_epoch=after_epoch,
                partial=recorder.partial,
                pause=recorder,
            )
            save_atomically(learner.network.state_dict(), weights)
            known = {"weights_sha256": file_sha256(weights), "torch": torch.__version__}
            return recorder.finish({**known, "settings": settings})
        finally:
            recorder.close()


def _hours(task: Task, learner: Learner) -> float:
    """How long the training takes without its tests; spends the learner on a few steps."""
    from runtime.cost import measured_rate
    from train.feed import NoTeacher
    from train.trial import trial_steps

    rate = measured_rate(trial_steps(task, learner, NoTeacher(), {}))
    return len(task.data.train) * task.training.epochs / max(rate, 1e-9) / 3600


def _size(config: TeacherConfig, dataset: Dataset) -> str:
    assert config.training is not None
    images = len(dataset.train)
    return f"{config.training.epochs:,} epochs x {images:,} images through {config.teacher.arch}"


def _assemble(
    config: TeacherConfig, dataset: Dataset, device: torch.device, num_workers: int | None
) -> tuple[Task, Learner]:
    """A new network and the images that it is to learn from."""
    from nets.zoo import build
    from train.loop import Task, make_learner, open_splits

    training = config.training
    assert training is not None
    check_arch(config.teacher.arch)
    is_countable = config.views.augment.num_distinct_views is not None
    fresh: int | Literal["all"] = "all" if is_countable else training.epochs
    views = dataclasses.replace(config.views, count=fresh)
    data = open_splits(dataset, views, config.dataset.normalisation, device, num_workers)
    task = Task(
        data=data,
        num_views=views.num_views,
        training=training,
        terms=(LossTerm(loss="ce"),),
        stages={},
        seed=training.seed,
        device=device,
    )
    network = build(
        config.teacher.arch,
        num_classes=dataset.num_classes,
        in_channels=data.train.shape[2],
        stem=config.teacher.stem,
        seed=training.seed,
    )
    return task, make_learner(network, None, training, device)


def _teacher_data(config: TeacherConfig, training: TeacherTraining) -> Any:
    """The dataset with the teacher's own limit: it may have seen more than its students will."""
    return dataclasses.replace(config.dataset, limit=training.limit)
