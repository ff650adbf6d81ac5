"""Trains a teacher from the `training:` block of its config, where no weights exist.

It sees a fresh view in every epoch: the cache's augmentation and seed, not limited to the views
that the cache will hold.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from configs.schema import LossTerm, TeacherConfig, TeacherTraining, as_plain
from nets.archs import check_arch
from nets.weights_file import weights_file
from store.identity import differing_fields, file_sha256, without_nulls
from train.study import RUN_FILE, SUMMARY_FILE
from views.datasets import load_dataset


class TeacherExists(ValueError):
    """The weights are there, but were trained with other settings than those asked for."""


def training_settings(config: TeacherConfig, dataset_digest: str) -> dict[str, Any]:
    """What decides the weights of a teacher trained here."""
    plain = as_plain(config)
    training = dict(plain["training"])
    del training["evaluate_every"]  # decides nothing about the weights
    if not training["compile"]:
        del training["compile"]
    return {
        "arch": plain["teacher"]["arch"],
        "stem": plain["teacher"]["stem"],
        "dataset_digest": dataset_digest,
        "normalisation": plain["dataset"]["normalisation"],
        "augment": without_nulls(plain["views"]["augment"]),
        "views_seed": plain["views"]["seed"],
        "training": training,
    }


def training_folder(weights: Path) -> Path:
    """Where the metrics and the checkpoint of a teacher's training lie: beside its weights."""
    return weights.with_suffix(".training")


def existing_weights(config: TeacherConfig) -> dict[str, Any] | None:
    """None if the weights are missing, else the summary of their training ({} if made elsewhere).

    Raises TeacherExists if they were trained here with other settings than those asked for.
    """
    weights = weights_file(config.teacher.weights)
    if not weights.is_file():
        return None
    folder = training_folder(weights)
    try:
        recorded: dict[str, Any] = json.loads((folder / RUN_FILE).read_text())
        summary: dict[str, Any] = json.loads((folder / SUMMARY_FILE).read_text())
    except (FileNotFoundError, ValueError):
        return {}
    if config.training is None or summary.get("weights_sha256") != file_sha256(weights):
        return {}
    differences = differing_fields(training_settings(config, recorded["dataset_digest"]), recorded)
    if differences:
        lines = "\n  ".join([f"{weights} was trained with other settings:", *differences])
        raise TeacherExists(
            f"{lines}\n  fix: ask for those settings, or train anew with "
            f"python -m train teacher {config.name} --retrain, or set teacher.weights=ANOTHER_FILE"
        )
    return summary


def train_teacher(
    config: TeacherConfig, *, device: str, console: Console, num_workers: int | None = None
) -> dict[str, Any]:
    """Train, or go on training, and save the weights; returns the summary of the training."""
    import torch

    from nets.precision import pick_device
    from nets.weights import save_atomically
    from nets.zoo import build
    from store.stop import StopRequest
    from train.feed import NoTeacher
    from train.loop import EpochResult, Task, fit, make_learner, open_splits
    from train.progress import EpochPrinter
    from train.records import RunRecorder

    training = config.training
    assert training is not None
    check_arch(config.teacher.arch)
    dataset = load_dataset(_teacher_data(config, training))
    place = pick_device(device)
    is_countable = config.views.augment.num_distinct_views is not None
    fresh: int | Literal["all"] = "all" if is_countable else training.epochs
    views = dataclasses.replace(config.views, count=fresh)
    data = open_splits(dataset, views, config.dataset.normalisation, place, num_workers)
    task = Task(
        data=data,
        num_views=views.num_views,
        training=training,
        terms=(LossTerm(loss="ce"),),
        stages={},
        seed=training.seed,
        device=place,
    )
    network = build(
        config.teacher.arch,
        num_classes=dataset.num_classes,
        in_channels=data.train.shape[2],
        stem=config.teacher.stem,
        seed=training.seed,
    )
    learner = make_learner(network, None, training, place)
    console.print(
        f"training the teacher {config.name} ({config.teacher.arch}): {training.epochs} epochs x "
        f"{len(dataset.train):,} images on {place}"
    )
    weights = weights_file(config.teacher.weights)
    settings = training_settings(config, dataset.digest)
    with StopRequest() as stop:
        recorder = RunRecorder(training_folder(weights), settings, learner, stop=stop)
        report = EpochPrinter(training.epochs, recorder.first_epoch, console)

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
            save_atomically(network.state_dict(), weights)
            versions = {"weights_sha256": file_sha256(weights), "torch": torch.__version__}
            return recorder.finish(versions)
        finally:
            recorder.close()


def _teacher_data(config: TeacherConfig, training: TeacherTraining) -> Any:
    """The dataset with the teacher's own limit: it may have seen more than its students will."""
    return dataclasses.replace(config.dataset, limit=training.limit)
