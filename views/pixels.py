"""Where the views of a split come from: images kept on the device, or read by workers.

Images of one size that need no work by Pillow, and that fit, are kept on the device as uint8 and
cut there; others are streamed. Both give the same bytes: see `views.augment.shown`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from configs.schema import Centre, Normalisation, ViewsConfig
from runtime import limits
from views.augment import check_augmentable, is_cut_first, view_shape
from views.batches import Finisher, Pixels, ShownSplit, ViewBatch
from views.seeds import choice
from views.splits import Checksums, DatasetError, Ids, Split
from views.streaming import StreamedPixels, default_workers

_RESIDENT_SHARE = 0.5  # of the free memory may be taken by images
_CALIBRATION_SAMPLES, _CALIBRATION_BATCH = 16_384, 256


class ResidentPixels(Finisher):
    """Images (N, H, W, C) uint8 on the device, cut there."""

    def __init__(self, shown: ShownSplit, images: Tensor, checksums: Checksums) -> None:
        height, width, channels = images.shape[1:]
        super().__init__(shown, view_shape((height, width, channels), shown.views.augment))
        self.where = "on the device"
        self._images, self._checksums = images, checksums

    def batches(self, numbers: Sequence[int], ids: Ids, batch_size: int) -> Iterator[ViewBatch]:
        self._keep_parameters(numbers)
        on_host = torch.from_numpy(ids)
        parts = (torch.split(each, batch_size) for each in (on_host, on_host.to(self._device)))
        for host_ids, some in zip(*parts, strict=True):
            for view in numbers:
                partners = self._partners(view, some)
                others = None if partners is None else self._images.index_select(0, partners)
                images = self._images.index_select(0, some)
                checksums = self._checksums[host_ids.numpy()]
                yield self._finished(view, some, host_ids, images, checksums, partners, others)


class HeldPixels:
    """Pixels that must be read from the bytes whose checksums (N,) uint32 are given.

    `fix`: what to do where they are not.
    """

    def __init__(self, pixels: Pixels, split: Split, checksums: Checksums, fix: str) -> None:
        self.shape, self.where = pixels.shape, pixels.where
        self._pixels, self._split, self._checksums, self._fix = pixels, split, checksums, fix

    def __len__(self) -> int:
        return len(self._pixels)

    def batches(self, numbers: Sequence[int], ids: Ids, batch_size: int) -> Iterator[ViewBatch]:
        """As the pixels' own. Raises DatasetError, naming the file, at the first other bytes."""
        for batch in self._pixels.batches(numbers, ids, batch_size):
            samples = batch.host_ids.numpy()
            differ = batch.checksums != self._checksums[samples]
            if np.any(differ):
                name = self._split.name_of(int(samples[np.argmax(differ)]))
                raise DatasetError(changed_sample(name, self._fix))
            yield batch


def changed_sample(name: str, fix: str) -> str:
    """The message for a sample whose bytes are not those that the cache was made from."""
    return (
        f"{name} has changed since the teacher saw it (its checksum is not the cache's)\n"
        f"  fix: {fix}"
    )


def open_pixels(
    split: Split,
    views: ViewsConfig,
    normalisation: Normalisation,
    device: torch.device,
    num_workers: int | None = None,
) -> Pixels:
    """The views of a split, resident where they can be. Raises DatasetError.

    num_workers: processes that read images, where they are not resident; default by the cores.
    """
    shown = ShownSplit(split, views, normalisation, device)
    check_augmentable(split.first_shape, views.augment)
    if not is_cut_first(views.augment) and _fits(len(split), split.first_shape, device):
        images, checksums = split.loaded
        return ResidentPixels(shown, torch.from_numpy(images).to(device), checksums)
    workers = default_workers(device) if num_workers is None else num_workers
    streamed = StreamedPixels(shown, workers)
    is_always_the_same = views.augment.num_distinct_views == 1
    if is_always_the_same and _fits(len(split), streamed.shape, device):
        return _kept(streamed, shown)
    return streamed


def _fits(num_samples: int, shape: tuple[int, ...], device: torch.device) -> bool:
    """Whether so many images may stay on the device."""
    return num_samples * math.prod(shape) <= _RESIDENT_SHARE * free_memory(device)


def evaluation_pixels(
    split: Split,
    views: ViewsConfig,
    normalisation: Normalisation,
    device: torch.device,
    num_workers: int | None = None,
) -> Pixels:
    """A test or validation split as `views` says that such are shown; view 0 is the only one."""
    shown = ViewsConfig(augment=views.eval_transform, seed=views.seed, count=1)
    return open_pixels(split, shown, normalisation, device, num_workers)


def _kept(streamed: StreamedPixels, shown: ShownSplit) -> ResidentPixels:
    """All views of an augmentation that has only one, cut once, straight to the device."""
    size = (len(streamed), *streamed.shape)
    images, start = torch.empty(size, dtype=torch.uint8, device=shown.device), 0
    sums = []
    for part, checksums in streamed.cut_parts(np.arange(len(streamed))):
        images[start : start + len(part)] = part
        start += len(part)
        sums.append(checksums)
    as_they_are = ViewsConfig(augment=Centre(), seed=shown.views.seed, count=1)
    return ResidentPixels(replace(shown, views=as_they_are), images, np.concatenate(sums))


def calibration_batches(pixels: Pixels) -> Iterator[Tensor]:
    """View 0 of at most 16,384 samples chosen by key, normalised: (256, C, H, W) batches.

    The same batches whatever a pass's batch size, and none of a single sample, of which batch norm
    could make nothing.
    """
    count = min(_CALIBRATION_SAMPLES, len(pixels))
    if count % _CALIBRATION_BATCH == 1:
        count -= 1
    samples = choice(0, len(pixels), count)
    for batch in pixels.batches([0], samples, _CALIBRATION_BATCH):
        yield batch.inputs


def free_memory(device: torch.device) -> int:
    """Bytes that this process could take now on the device, beside others of this machine."""
    if device.type != "cuda":
        return limits.free_memory()
    sharing = math.ceil(limits.Share.of_this_process().count / torch.cuda.device_count())
    return int(torch.cuda.mem_get_info(device)[0]) // sharing
