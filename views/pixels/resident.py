"""Where the views of a split come from: images kept on the device, or read by workers.

Images of one size that need no work by Pillow, and that fit, are kept on the device as uint8 and
cut there; others are streamed. Both give the same bytes: see `views.augment.augment.view_pixels`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from teach_once.configs.schema import CenterCrop, Normalization, ViewsConfig
from teach_once.runtime.machine import resources as limits
from teach_once.views.augment.augment import check_augmentable, view_shape
from teach_once.views.datasets import Dataset
from teach_once.views.pixels.batches import AugmentedSplit, Finisher, Pixels, ViewBatch
from teach_once.views.pixels.streaming import StreamedPixels, default_workers
from teach_once.views.seeds import choice
from teach_once.views.splits import DatasetError, Digests, Ids, Split

_RESIDENT_SHARE = 0.5  # of the free memory may be taken by images
_CALIBRATION_SAMPLES, _CALIBRATION_BATCH = 16_384, 256


class ResidentPixels(Finisher):
    """Images (N, H, W, C) uint8 on the device, cut there."""

    is_streamed = False

    def __init__(self, source: AugmentedSplit, images: Tensor, digests: Digests) -> None:
        super().__init__(source, view_shape(images.shape[1:], source.config.augment))
        self.where = "on the device"
        self._images, self._digests = images, digests

    def batches(self, views: Sequence[int], ids: Ids, batch_size: int) -> Iterator[ViewBatch]:
        drawn = [self._drawn(view, ids) for view in views]
        for start in range(0, len(ids), batch_size):
            parts = [of_view.part(start, start + batch_size) for of_view in drawn]
            images = self._images.index_select(0, parts[0].ids)
            digests = self._digests[parts[0].host_ids]
            for view, part in zip(views, parts, strict=True):
                others = None
                if part.partners is not None:
                    others = self._images.index_select(0, part.partners.ids)
                yield self._finished(view, images, digests, part, others)


class VerifiedPixels:
    """Pixels that must come from bytes with the given digests (N, 16) uint8.

    `fix`: what to do where they do not.
    """

    def __init__(self, pixels: Pixels, split: Split, digests: Digests, fix: str) -> None:
        self.shape, self.where, self.is_streamed = pixels.shape, pixels.where, pixels.is_streamed
        self._pixels, self._split, self._digests, self._fix = pixels, split, digests, fix

    def __len__(self) -> int:
        return len(self._pixels)

    def batches(self, views: Sequence[int], ids: Ids, batch_size: int) -> Iterator[ViewBatch]:
        """As the pixels' own. Raises DatasetError, which names the file, where bytes differ."""
        for batch in self._pixels.batches(views, ids, batch_size):
            samples = batch.host_ids.numpy()
            differ = (batch.digests != self._digests[samples]).any(axis=1)
            if np.any(differ):
                name = self._split.name_of(int(samples[np.argmax(differ)]))
                raise changed_sample(name, self._fix)
            yield batch


def changed_sample(name: str, fix: str) -> DatasetError:
    """The error for a sample whose bytes are not those that the cache was made from."""
    return DatasetError(
        f"{name} has changed since the teacher saw it (its digest is not the cache's)", fix=fix
    )


def open_pixels(
    split: Split,
    config: ViewsConfig,
    normalization: Normalization,
    device: torch.device,
    num_workers: int | None = None,
) -> Pixels:
    """The views of a split, on the device where that can be. Raises DatasetError.

    num_workers: processes that read images that are not on the device; default by the cores.
    """
    source = AugmentedSplit(split, config, normalization, device)
    augment = config.augment
    check_augmentable(split.first_shape, augment)
    if _is_resident(split, config, device):
        images, digests = split.loaded
        return ResidentPixels(source, torch.from_numpy(images).to(device), digests)
    workers = default_workers(device) if num_workers is None else num_workers
    streamed = StreamedPixels(source, workers)
    return _loaded(streamed, source) if _is_cut_once(split, config, device) else streamed


def are_streamed(split: Split, config: ViewsConfig, device: torch.device) -> bool:
    """Return True if `open_pixels` would read and decode the images anew for every epoch."""
    return not (_is_resident(split, config, device) or _is_cut_once(split, config, device))


def _is_resident(split: Split, config: ViewsConfig, device: torch.device) -> bool:
    return not config.augment.needs_pillow and _fits(len(split), split.first_shape, device)


def _is_cut_once(split: Split, config: ViewsConfig, device: torch.device) -> bool:
    shape = view_shape(split.first_shape, config.augment)
    return config.augment.num_distinct_views == 1 and _fits(len(split), shape, device)


def _fits(num_samples: int, shape: tuple[int, ...], device: torch.device) -> bool:
    """Return True if so many images may be kept on the device."""
    return num_samples * math.prod(shape) <= _RESIDENT_SHARE * free_memory(device)


def evaluation_pixels(
    split: Split,
    config: ViewsConfig,
    normalization: Normalization,
    device: torch.device,
    num_workers: int | None = None,
) -> Pixels:
    """A test or validation split under `config`'s evaluation transform; its only view is 0."""
    evaluation = ViewsConfig(augment=config.eval_transform, seed=config.seed, count=1)
    return open_pixels(split, evaluation, normalization, device, num_workers)


def _loaded(streamed: StreamedPixels, source: AugmentedSplit) -> ResidentPixels:
    """All samples of an augmentation that has one view only, cut once, straight to the device."""
    size = (len(streamed), *streamed.shape)
    images, start = torch.empty(size, dtype=torch.uint8, device=source.device), 0
    of_parts = []
    for part, digests in streamed.cut_parts(np.arange(len(streamed))):
        images[start : start + len(part)] = part
        start += len(part)
        of_parts.append(digests)
    unchanged = ViewsConfig(augment=CenterCrop(), seed=source.config.seed, count=1)
    return ResidentPixels(replace(source, config=unchanged), images, np.concatenate(of_parts))


def calibration_batches(pixels: Pixels) -> Iterator[Tensor]:
    """View 0 of at most 16,384 samples chosen by key, normalized: (256, C, H, W) batches.

    They do not depend on a pass's batch size. None holds a single sample, which has no batch
    statistics.
    """
    count = min(_CALIBRATION_SAMPLES, len(pixels))
    if count % _CALIBRATION_BATCH == 1:
        count -= 1
    samples = choice(0, len(pixels), count)
    for batch in pixels.batches([0], samples, _CALIBRATION_BATCH):
        yield batch.inputs


def free_memory(device: torch.device) -> int:
    """Bytes of the device that this process may take now, its share among those of this machine."""
    if device.type != "cuda":
        return limits.free_memory()
    sharing = math.ceil(limits.Share.of_this_process().count / torch.cuda.device_count())
    free = int(torch.cuda.mem_get_info(device)[0])
    # Blocks that torch keeps for later are free to this process, but not to the driver.
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free // sharing + kept


class DatasetPixels(NamedTuple):
    """The views of a dataset's splits, on the device or on their way to it."""

    train: Pixels
    validation: Pixels | None  # if there is one, the best epoch is chosen on it
    test: Pixels


def open_dataset_pixels(
    dataset: Dataset,
    views: ViewsConfig,
    normalization: Normalization,
    device: torch.device,
    num_workers: int | None = None,
) -> DatasetPixels:
    """Training split as `views` augments it, the others as it shows them for evaluation.

    num_workers: processes that read images; default by the cores. Raises DatasetError.
    """
    validation = None
    if dataset.validation is not None:
        validation = evaluation_pixels(
            dataset.validation, views, normalization, device, num_workers
        )
    return DatasetPixels(
        train=open_pixels(dataset.train, views, normalization, device, num_workers),
        validation=validation,
        test=evaluation_pixels(dataset.test, views, normalization, device, num_workers),
    )
