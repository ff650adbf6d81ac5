"""The part of a cache's identity that describes the teacher's images."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from teach_once.configs.schema import TeacherConfig, ViewsConfig, as_plain
from teach_once.views.augment.augment import view_pixels
from teach_once.views.datasets import Dataset
from teach_once.views.splits import Split


def views_identity(config: TeacherConfig, dataset: Dataset) -> dict[str, Any]:
    """Return the blocks "dataset" and "views" of a cache's identity.

    A selection that leaves out no sample counts as unset. A packed file counts as the original
    dataset.
    """
    data = config.dataset
    selection = {
        **({} if data.max_samples is None else {"max_samples": data.max_samples}),
        **({} if data.train_fraction == 1 else {"train_fraction": data.train_fraction}),
    }
    return {
        "dataset": {
            "type": dataset.type or data.type,
            "split": "train",
            "max_per_class": data.max_per_class if dataset.is_reduced else None,
            **(selection if dataset.is_reduced else {}),
            "validation_fraction": data.validation_fraction,
            "digest": dataset.digest,
            "normalization": as_plain(data.normalization),
        },
        "views": {
            "augment": augment_identity(config.views),
            "seed": config.views.seed,
        },
    }


def augment_identity(views: ViewsConfig) -> dict[str, Any]:
    """Return the augmentation without disabled settings, so that new settings keep caches valid."""
    return {key: value for key, value in as_plain(views.augment).items() if value is not None}


_MOST_VIEWS = 12


def preview_views(split: Split, config: ViewsConfig) -> NDArray[np.uint8]:
    """Return the first n <= 12 views of sample 0: (n, H, W, C) uint8."""
    num_views = min(_MOST_VIEWS, config.augment.num_distinct_views or _MOST_VIEWS)
    sample = np.array([0])
    return np.concatenate([view_pixels(split, config, v, sample) for v in range(num_views)])
