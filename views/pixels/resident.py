"""Choose the source of a split's views: images kept on the device, or read by workers.

Images of one size that need no Pillow operation and fit into memory are kept on the device as uint8
and cropped there. Others are streamed. Both give the same bytes: see
`views.augment.augment.view_pixels`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
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

_RESIDENT_SHARE = 0.5  # fraction of the free memory that images may use
_CALIBRATION_SAMPLES, _CALIBRATION_BATCH = 16_384, 256


class ResidentPixels(Finisher):
    """Images (N, H, W, C) uint8 kept and cropped on the device."""

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
    """Pixels whose source bytes must have the given digests (N, 16) uint8.

    digests: or a function that is called before an epoch and returns None as long as there are
    none. fix: the fix if they differ.
    """

    def __init__(
        self,
        pixels: Pixels,
        split: Split,
        digests: Digests | Callable[[], Digests | None],
        fix: str,
    ) -> None:
        self.shape, self.where, self.is_streamed = pixels.shape, pixels.where, pixels.is_streamed
        self._pixels, self._split, self._digests, self._fix = pixels, split, digests, fix

    def __len__(self) -> int:
        return len(self._pixels)

    def batches(self, views: Sequence[int], ids: Ids, batch_size: int) -> Iterator[ViewBatch]:
        """Yield as the wrapped pixels. Raises DatasetError, naming the file, if bytes differ."""
        expected = self._digests() if callable(self._digests) else self._digests
        for batch in self._pixels.batches(views, ids, batch_size):
            if expected is None:
                yield batch
                continue
            samples = batch.host_ids.numpy()
            differ = (batch.digests != expected[samples]).any(axis=1)
            if np.any(differ):
                name = self._split.name_of(int(samples[np.argmax(differ)]))
                raise changed_sample(name, self._fix)
            yield batch


def changed_sample(name: str, fix: str) -> DatasetError:
    """Return the error for a sample whose bytes differ from those the cache was made from."""
    return DatasetError(
        f"{name} has changed since the cache was filled (its digest differs)", fix=fix
    )


def open_pixels(
    split: Split,
    config: ViewsConfig,
    normalization: Normalization,
    device: torch.device,
    num_workers: int | None = None,
) -> Pixels:
    """Open the views of a split, on the device if possible.

    num_workers: processes that read images that are not on the device; default: from the number of
    cores. Raises DatasetError if the images cannot be used.
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
    """Return True if `open_pixels` would read and decode the images in every epoch."""
    return not (_is_resident(split, config, device) or _is_cut_once(split, config, device))


def _is_resident(split: Split, config: ViewsConfig, device: torch.device) -> bool:
    return not config.augment.needs_pillow and _fits(len(split), split.first_shape, device)


def _is_cut_once(split: Split, config: ViewsConfig, device: torch.device) -> bool:
    shape = view_shape(split.first_shape, config.augment)
    return config.augment.num_distinct_views == 1 and _fits(len(split), shape, device)


def _fits(num_samples: int, shape: tuple[int, ...], device: torch.device) -> bool:
    """Return True if `num_samples` images may be kept on the device."""
    return num_samples * math.prod(shape) <= _RESIDENT_SHARE * free_memory(device)


def evaluation_pixels(
    split: Split,
    config: ViewsConfig,
    normalization: Normalization,
    device: torch.device,
    num_workers: int | None = None,
) -> Pixels:
    """Open a test or validation split under `config`'s evaluation transform; its only view is 0."""
    evaluation = ViewsConfig(augment=config.eval_transform, seed=config.seed, count=1)
    return open_pixels(split, evaluation, normalization, device, num_workers)


def _loaded(streamed: StreamedPixels, source: AugmentedSplit) -> ResidentPixels:
    """Load all samples of an augmentation with one view to the device, cropped once."""
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
    """Yield view 0 of at most 16,384 samples chosen by key: normalized (256, C, H, W) batches.

    Batches do not depend on a pass's batch size. No batch has a single sample, which has no batch
    statistics.
    """
    count = min(_CALIBRATION_SAMPLES, len(pixels))
    if count % _CALIBRATION_BATCH == 1:
        count -= 1
    samples = choice(0, len(pixels), count)
    for batch in pixels.batches([0], samples, _CALIBRATION_BATCH):
        yield batch.inputs


def free_memory(device: torch.device) -> int:
    """Return free bytes of the device, divided among the processes of this machine."""
    if device.type != "cuda":
        return limits.free_memory()
    sharing = math.ceil(limits.Share.of_this_process().count / torch.cuda.device_count())
    free = int(torch.cuda.mem_get_info(device)[0])
    # Blocks cached by torch are free for this process, but not for the driver.
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free // sharing + kept


class DatasetPixels(NamedTuple):
    """The views of a dataset's splits."""

    train: Pixels
    validation: Pixels | None  # the best epoch is chosen on it, if any
    test: Pixels


def open_dataset_pixels(
    dataset: Dataset,
    views: ViewsConfig,
    normalization: Normalization,
    device: torch.device,
    num_workers: int | None = None,
) -> DatasetPixels:
    """Open the training split with its augmentation, and the others with the evaluation transform.

    num_workers: processes that read images; default: from the number of cores. Raises DatasetError
    if the images cannot be used.
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
