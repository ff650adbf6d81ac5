"""The views of all splits of a dataset on one device."""

from __future__ import annotations

from typing import NamedTuple

import torch

from configs.schema import Normalisation, ViewsConfig
from views.batches import Pixels
from views.datasets import Dataset
from views.pixels import evaluation_pixels, open_pixels


class DatasetPixels(NamedTuple):
    """The views of a dataset's splits, on the device or on their way to it."""

    train: Pixels
    validation: Pixels | None  # if there is one, the best epoch is chosen on it
    test: Pixels


def open_dataset_pixels(
    dataset: Dataset,
    views: ViewsConfig,
    normalisation: Normalisation,
    device: torch.device,
    num_workers: int | None = None,
) -> DatasetPixels:
    """Training split as `views` augments it, the others as it shows them for evaluation.

    num_workers: processes that read images; default by the cores. Raises DatasetError.
    """
    validation = None
    if dataset.validation is not None:
        validation = evaluation_pixels(
            dataset.validation, views, normalisation, device, num_workers
        )
    return DatasetPixels(
        train=open_pixels(dataset.train, views, normalisation, device, num_workers),
        validation=validation,
        test=evaluation_pixels(dataset.test, views, normalisation, device, num_workers),
    )
