"""Trains a teacher from the `training:` block of its config, where no weights exist.

It sees a fresh view in every epoch: the cache's augmentation and seed, not limited to the views
that the cache will hold.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from rich.console import Console

from configs.schema import LossTerm, TeacherConfig, TeacherTraining, as_plain
from nets.archs import check_arch
from store.identity import canonical_json, differing_fields
from store.layout import write_atomically
from views.datasets import load_dataset


class TeacherExists(ValueError):
    """The weights are there, but were trained with other settings than those asked for."""


def training_settings(config: TeacherConfig, dataset_digest: str) -> dict[str, Any]:
    """What decides the weights of a teacher trained here."""
    plain = as_plain(config)
    return {
        "arch": plain["teacher"]["arch"],
        "stem": plain["teacher"]["stem"],
        "dataset_digest": dataset_digest,
        "normalisation": plain["dataset"]["normalisation"],
        "augment": plain["views"]["augment"],
        "views_seed": plain["views"]["seed"],
        "training": plain["training"],
    }


def settings_file(weights: Path) -> Path:
    return weights.with_suffix(".json")


def existing_weights(config: TeacherConfig) -> dict[str, Any] | None:
    """None if the weights are missing; what is recorded of their training (maybe nothing) if not.

    Raises TeacherExists if they were trained here with other settings.
    """
    weights = Path(config.teacher.weights)
    if not weights.is_file():
        return None
    if not settings_file(weights).is_file():
        return {}
    recorded: dict[str, Any] = json.loads(settings_file(weights).read_text())
    settings = training_settings(config, recorded["settings"]["dataset_digest"])
    differences = differing_fields(settings, recorded["settings"])
    if differences and config.training is not None:
        lines = "\n  ".join([f"{weights} was trained with other settings:", *differences])
        raise TeacherExists(
            f"{lines}\n  to mend it: keep it by asking for those settings, or train anew with "
            f"--retrain, or set teacher.weights to another file"
        )
    return recorded


def train_teacher(config: TeacherConfig, *, device: str, console: Console) -> dict[str, Any]:
    """Train and save the weights, with a JSON file beside them that says how; returns the latter."""
    import torch

    from nets.precision import pick_device
    from nets.weights import save_atomically
    from nets.zoo import build
    from train.feed import NoTeacher
    from train.loop import EpochResult, Task, fit, make_learner, splits_on_device
    from train.progress import EpochPrinter

    training = config.training
    assert training is not None
    check_arch(config.teacher.arch)
    dataset = load_dataset(_teacher_data(config, training))
    place = pick_device(device)
    train, test = splits_on_device(dataset, place)
    task = Task(
        train=train,
        test=test,
        views=dataclasses.replace(config.views, count="all"),
        num_views=config.views.augment.num_distinct_views,
        normalisation=config.dataset.normalisation,
        training=training,
        terms=(LossTerm(loss="ce"),),
        stages={},
        seed=training.seed,
        device=place,
    )
    network = build(
        config.teacher.arch,
        num_classes=dataset.num_classes,
        in_channels=dataset.train.images.shape[3],
        stem=config.teacher.stem,
        seed=training.seed,
    )
    learner = make_learner(network, None, training, place)
    console.print(
        f"training the teacher {config.name} ({config.teacher.arch}): {training.epochs} epochs x "
        f"{len(dataset.train):,} images on {place}"
    )
    results: list[EpochResult] = []
    report = EpochPrinter(training.epochs, 1, console)

    def after_epoch(result: EpochResult) -> None:
        results.append(result)
        report(result)

    fit(task, learner, NoTeacher(), first_epoch=1, on_epoch=after_epoch)
    weights = Path(config.teacher.weights)
    record = {
        "settings": training_settings(config, dataset.digest),
        "top1_error": results[-1].errors.top1,
        "top5_error": results[-1].errors.top5,
        "seconds": sum(result.seconds for result in results),
        "torch": torch.__version__,
    }
    settings_file(weights).unlink(missing_ok=True)
    save_atomically(network.state_dict(), weights)
    write_atomically(settings_file(weights), canonical_json(record).encode() + b"\n")
    return record


def _teacher_data(config: TeacherConfig, training: TeacherTraining) -> Any:
    """The dataset with the teacher's own limit: it may have seen more than its students will."""
    return dataclasses.replace(config.dataset, limit=training.limit)
