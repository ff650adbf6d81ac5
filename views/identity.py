"""What of a cache's identity says which images the teacher saw."""

from __future__ import annotations

from typing import Any

from configs.schema import TeacherConfig, ViewsConfig, as_plain
from views.augment import AUGMENT_VERSION
from views.datasets import Dataset


def views_identity(config: TeacherConfig, dataset: Dataset) -> dict[str, Any]:
    """The blocks "dataset" and "views" of a cache's identity.

    A limit that leaves no sample out counts as unset. A packed file counts as the dataset it was
    packed from.
    """
    return {
        "dataset": {
            "type": dataset.type or config.dataset.type,
            "split": "train",
            "limit": config.dataset.limit if dataset.limit_cuts else None,
            "validation_fraction": config.dataset.validation_fraction,
            "digest": dataset.digest,
            "normalisation": as_plain(config.dataset.normalisation),
        },
        "views": {
            "augment": augment_identity(config.views),
            "augment_version": AUGMENT_VERSION,
            "seed": config.views.seed,
        },
    }


def augment_identity(views: ViewsConfig) -> dict[str, Any]:
    """The augmentation without settings that are off: a new setting leaves old caches valid."""
    return {key: value for key, value in as_plain(views.augment).items() if value is not None}
