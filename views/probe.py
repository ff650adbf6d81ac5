"""The images of a config's probe: labeled images that measure an embedding."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from teach_once.configs.schema import TeacherConfig
from teach_once.views.datasets import Dataset
from teach_once.views.images.folders import labeled_folders
from teach_once.views.splits import DatasetError, Split

NEIGHBORS = 20


def load_probe(
    config: TeacherConfig, dataset: Dataset, kept_in: Path | None = None
) -> tuple[Dataset, Dataset] | None:
    """Return the training and test images of the probe, each as `train` of a dataset.

    Returns None if the config has no probe. dataset: the config's. kept_in: as in `load_dataset`.

    Raises DatasetError if the images have no labels or a single class, if there are fewer training
    images than neighbors, or if an image is in both parts.
    """
    if (probe := config.probe) is None:
        return None
    if probe.train is None or probe.test is None:
        train = dataset
        test = dataclasses.replace(dataset, train=dataset.test, digest=dataset.test_digest)
    else:
        for key, folder in (("train", probe.train), ("test", probe.test)):
            if not Path(folder).is_dir():
                raise DatasetError(
                    f"probe.{key}: folder {folder} not found", fix=f"set probe.{key}=FOLDER"
                )
        source = labeled_folders(Path(probe.train), Path(probe.test), kept_in=kept_in)
        every = np.arange(len(source.train))
        train = dataclasses.replace(
            dataset,
            name=source.name,
            class_names=source.class_names,
            train=source.train,
            digest=source.digest_of(every),
            check_headers=source.check_headers,
        )
        test = dataclasses.replace(train, train=source.test, digest=source.test_digest())
    _check(train.train, test.train, train.class_names)
    return train, test


def _check(train: Split, test: Split, class_names: Sequence[str] | None) -> None:
    if class_names is None or train.labels is None or test.labels is None:
        raise DatasetError(
            "probe: the dataset's own images have no labels",
            fix="set probe.train and probe.test to folders with a folder of images per class",
        )
    if len(np.unique(train.labels)) < 2:
        raise DatasetError(
            f"probe: all {len(train):,} training images belong to one class, expected several"
        )
    if len(train) < NEIGHBORS:
        raise DatasetError(
            f"probe: {len(train):,} training images are too few for {NEIGHBORS} nearest neighbors",
            fix="add images to probe.train",
        )


def check_disjoint(train: Split, test: Split) -> None:
    """Raise DatasetError, which names the files, if an image is in both parts of a probe.

    Reads every image.
    """
    ours, theirs = (each.read_digests(np.arange(len(each))) for each in (train, test))
    own = {digest.tobytes(): number for number, digest in enumerate(ours)}
    for number, digest in enumerate(theirs):
        if (first := own.get(digest.tobytes())) is not None:
            raise DatasetError(
                f"probe: {train.name_of(first)} and {test.name_of(number)} are the same image, so "
                f"the test images would be too easy",
                fix="remove one of them",
            )
