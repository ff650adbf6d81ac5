"""Batches of views on the training device, from images that lie there or that workers read.

Images of one size that need no work by Pillow, and that fit, are kept on the device as uint8 and
cut there. All others are read, decoded and cut by worker processes, which hand over uint8; the
device flips, erases, mixes and normalises. Both give the same bytes: see `views.augment.shown`.
Teacher outputs never travel through workers.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from configs.schema import Centre, Normalisation, ViewsConfig
from views.augment import (
    PARTNER,
    check_augmentable,
    cut_views,
    finish,
    is_cut_first,
    normalise,
    partner_shares,
    view_parameters,
    view_shape,
)
from views.seeds import choice
from views.splits import DatasetError, Ids, Split

_PART_BYTES = 4 * 2**20  # a worker hands over about so much at once
_PARTS_AHEAD = 8  # and has at most so many such parts ready
_MOST_WORKERS = 16
_RESIDENT_SHARE = 0.5  # of the free memory may be taken by images
_CALIBRATION_SAMPLES, _CALIBRATION_BATCH = 16_384, 256


@dataclass(frozen=True)
class ViewBatch:
    """One view of some samples, on the device.

    ids, labels: (B,) int64; host_ids: the ids again, in host memory. inputs: (B, C, H, W)
    float32, normalised, in channels-last memory.
    Where views are mixed, `labels` are those of the larger share, `other_labels` (B,) those of the
    smaller, and `other_shares` (B,) float32 in [0, 1/2] how large that is.
    """

    ids: Tensor
    host_ids: Tensor
    inputs: Tensor
    labels: Tensor
    other_labels: Tensor | None = None
    other_shares: Tensor | None = None


class Pixels(Protocol):
    """The views of one split."""

    shape: tuple[int, int, int]

    def __len__(self) -> int: ...

    def batches(
        self, numbers: Sequence[int], ids: Ids, batch_size: int
    ) -> Iterator[tuple[int, ViewBatch]]:
        """Views `numbers` of the samples `ids`, in their order: pairs of a view and a batch.

        All views of a batch of samples come one after the other, so an image is read once.
        """
        ...


class _Finisher:
    """What resident and streamed pixels share: parameters per view, and the last step."""

    def __init__(
        self,
        split: Split,
        views: ViewsConfig,
        normalisation: Normalisation,
        device: torch.device,
        shape: tuple[int, int, int],
    ) -> None:
        self.shape, self._views, self._normalisation = shape, views, normalisation
        self._device = device
        self._labels = torch.from_numpy(split.labels).to(device)
        self._parameters: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self._labels)

    def _keep_parameters(self, numbers: Sequence[int]) -> None:
        """Have the parameters of these views at hand, and forget those of others."""
        kept = {view: self._parameters[view] for view in numbers if view in self._parameters}
        missing = [view for view in numbers if view not in kept]
        self._parameters = {**kept, **{view: self._drawn(view) for view in missing}}

    def _drawn(self, view: int) -> Tensor:
        table = view_parameters(self._views, view, len(self), self.shape)
        return torch.from_numpy(table).to(self._device)

    def _partners(self, view: int, ids: Tensor) -> Tensor | None:
        if self._views.augment.mix is None:
            return None
        return self._parameters[view][:, PARTNER].index_select(0, ids)

    def _finished(
        self,
        view: int,
        ids: Tensor,
        host_ids: Tensor,
        images: Tensor,
        partners: Tensor | None,
        others: Tensor | None,
    ) -> ViewBatch:
        rows = self._parameters[view].index_select(0, ids)
        partner_rows = None
        if partners is not None:
            partner_rows = self._parameters[view].index_select(0, partners)
        pixels = finish(images, rows, others, partner_rows, self._views.augment)
        inputs, labels = normalise(pixels, self._normalisation), self._labels.index_select(0, ids)
        if partners is None:
            return ViewBatch(ids, host_ids, inputs, labels)
        other_labels = self._labels.index_select(0, partners)
        shares = partner_shares(rows, self.shape).float()
        is_own = shares <= 0.5
        return ViewBatch(
            ids,
            host_ids,
            inputs,
            torch.where(is_own, labels, other_labels),
            torch.where(is_own, other_labels, labels),
            torch.where(is_own, shares, 1 - shares),
        )


class ResidentPixels(_Finisher):
    """Images (N, H, W, C) uint8 on the device, cut there."""

    def __init__(
        self,
        split: Split,
        views: ViewsConfig,
        normalisation: Normalisation,
        device: torch.device,
    ) -> None:
        images = torch.from_numpy(split.images)
        height, width, channels = images.shape[1:]
        shape = (height, width, channels)
        super().__init__(split, views, normalisation, device, view_shape(shape, views.augment))
        self._images = images.to(device)

    def batches(
        self, numbers: Sequence[int], ids: Ids, batch_size: int
    ) -> Iterator[tuple[int, ViewBatch]]:
        self._keep_parameters(numbers)
        on_host = torch.from_numpy(ids)
        parts = (torch.split(each, batch_size) for each in (on_host, on_host.to(self._device)))
        for host_ids, some in zip(*parts, strict=True):
            for view in numbers:
                partners = self._partners(view, some)
                others = None if partners is None else self._images.index_select(0, partners)
                images = self._images.index_select(0, some)
                yield view, self._finished(view, some, host_ids, images, partners, others)


class StreamedPixels(_Finisher):
    """Images that `num_workers` processes read and cut, ahead of their use."""

    def __init__(
        self,
        split: Split,
        views: ViewsConfig,
        normalisation: Normalisation,
        device: torch.device,
        num_workers: int,
    ) -> None:
        shape = view_shape(split.first_shape, views.augment)
        super().__init__(split, views, normalisation, device, shape)
        self._keys = _Keys()
        self.num_workers, ahead = _fitting(num_workers)
        self._loader: DataLoader[Tensor | str] = DataLoader(
            _CutViews(split, views, shape),
            sampler=self._keys,
            batch_size=None,
            num_workers=self.num_workers,
            prefetch_factor=ahead if self.num_workers else None,
            persistent_workers=self.num_workers > 0,
            pin_memory=device.type == "cuda",
            worker_init_fn=_leave_signals_to_parent,
            generator=torch.Generator(),  # so that torch's global one is left alone
            multiprocessing_context="fork" if self.num_workers else None,
        )

    def batches(
        self, numbers: Sequence[int], ids: Ids, batch_size: int
    ) -> Iterator[tuple[int, ViewBatch]]:
        if self._views.augment.mix is not None and len(numbers) > 1:
            for view in numbers:  # each view of a sample has another partner
                yield from self.batches([view], ids, batch_size)
            return
        self._keep_parameters(numbers)
        self._keys.parts = self._parts(tuple(numbers), ids, batch_size)
        received = iter(self._loader)
        for start in range(0, len(ids), batch_size):
            some = ids[start : start + batch_size]
            images, others = self._receive(received, tuple(numbers), some)
            on_host = torch.from_numpy(some)
            on_device = on_host.to(self._device)
            for place, view in enumerate(numbers):
                partners = self._partners(view, on_device)
                cut_partners = None if others is None else others[place]
                batch = self._finished(
                    view, on_device, on_host, images[place], partners, cut_partners
                )
                yield view, batch

    def cut_parts(self, ids: Ids) -> Iterator[Tensor]:
        """View 0 of some samples, as the workers hand it over: (M, H, W, C) uint8."""
        self._keys.parts = [((0,), part) for part in _cut_up(ids, self._rows_per_part(1))]
        received = iter(self._loader)
        for _ in self._keys.parts:
            yield _next_part(received)[0]

    def _receive(
        self, received: Iterator[Tensor | str], numbers: tuple[int, ...], ids: Ids
    ) -> tuple[Tensor, Tensor | None]:
        """(V, B, H, W, C) of a batch's samples and, where views are mixed, of their partners."""
        found = []
        for _ in _cut_up(ids, self._rows_per_part(len(numbers))):
            found.append(_next_part(received).to(self._device, non_blocking=True))
        if self._views.augment.mix is None:
            return (found[0] if len(found) == 1 else torch.cat(found, dim=1)), None
        halves = [part.chunk(2, dim=1) for part in found]
        own, others = (torch.cat(some, dim=1) for some in zip(*halves, strict=True))
        return own, others

    def _parts(self, numbers: tuple[int, ...], ids: Ids, batch_size: int) -> list[_Key]:
        """What the workers are asked for, in order; partners come behind their samples."""
        keys = []
        for start in range(0, len(ids), batch_size):
            some = ids[start : start + batch_size]
            for part in _cut_up(some, self._rows_per_part(len(numbers))):
                keys.append((numbers, self._with_partners(numbers[0], part)))
        return keys

    def _with_partners(self, view: int, ids: Ids) -> Ids:
        if self._views.augment.mix is None:
            return ids
        partners = self._parameters[view][:, PARTNER].cpu().numpy()[ids]
        return np.concatenate([ids, partners])

    def _rows_per_part(self, num_views: int) -> int:
        height, width, channels = self.shape
        return max(1, _PART_BYTES // (num_views * height * width * channels))


_Key = tuple[tuple[int, ...], Ids]


class _Keys:
    """The sampler of the loader: whatever was put into `parts`."""

    def __init__(self) -> None:
        self.parts: list[_Key] = []

    def __iter__(self) -> Iterator[_Key]:
        return iter(self.parts)

    def __len__(self) -> int:
        return len(self.parts)


class _CutViews(Dataset["Tensor | str"]):
    """What a worker does. An error in the data comes back as its message."""

    def __init__(self, split: Split, views: ViewsConfig, shape: tuple[int, int, int]) -> None:
        self._split, self._views, self._shape = split, views, shape

    def __getitem__(self, key: _Key) -> Tensor | str:
        numbers, ids = key
        try:
            cut = cut_views(self._split, self._views, numbers, ids, self._shape)
        except DatasetError as error:
            return str(error)
        return torch.from_numpy(cut)


def _next_part(received: Iterator[Tensor | str]) -> Tensor:
    """Raises DatasetError for what a worker could not read, and where one has died."""
    try:
        part = next(received)
    except RuntimeError as error:
        if "worker" not in str(error):
            raise
        raise DatasetError(
            f"a process that reads images died: {error}\n"
            f"  to mend it: run again, with fewer --workers if memory was short"
        ) from None
    if isinstance(part, str):
        raise DatasetError(part)
    return part


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
    check_augmentable(split.first_shape, views.augment)
    num_bytes = len(split) * int(np.prod(split.first_shape))
    if not is_cut_first(views.augment) and num_bytes <= _RESIDENT_SHARE * free_memory(device):
        return ResidentPixels(split, views, normalisation, device)
    workers = default_workers(device) if num_workers is None else num_workers
    streamed = StreamedPixels(split, views, normalisation, device, workers)
    num_bytes = len(split) * int(np.prod(streamed.shape))
    is_always_the_same = views.augment.num_distinct_views == 1
    if is_always_the_same and num_bytes <= _RESIDENT_SHARE * free_memory(device):
        return _kept(streamed, split, views, normalisation, device)
    return streamed


def evaluation_pixels(
    split: Split,
    views: ViewsConfig,
    normalisation: Normalisation,
    device: torch.device,
    num_workers: int | None = None,
) -> Pixels:
    """A test or validation split as `views` says that such are shown; view 0 is the only one."""
    shown = ViewsConfig(augment=views.shown_at_evaluation, seed=views.seed, count=1)
    return open_pixels(split, shown, normalisation, device, num_workers)


def _kept(
    streamed: StreamedPixels,
    split: Split,
    views: ViewsConfig,
    normalisation: Normalisation,
    device: torch.device,
) -> ResidentPixels:
    """All views of an augmentation that has only one, cut once."""
    ids = np.arange(len(split))
    images = np.concatenate([part.numpy() for part in streamed.cut_parts(ids)], axis=0)
    whole = Split(split.labels, images.__getitem__, images.__getitem__, split.name_of)
    as_they_are = ViewsConfig(augment=Centre(), seed=views.seed, count=1)
    return ResidentPixels(whole, as_they_are, normalisation, device)


def calibration_batches(pixels: Pixels) -> Iterator[Tensor]:
    """View 0 of at most 16,384 samples chosen by key, normalised: (256, C, H, W) batches.

    The same batches whatever a pass's batch size.
    """
    samples = choice(0, len(pixels), min(_CALIBRATION_SAMPLES, len(pixels)))
    for _, batch in pixels.batches([0], samples, _CALIBRATION_BATCH):
        yield batch.inputs


def default_workers(device: torch.device) -> int:
    """All cores but one beside a GPU; half of them where the network needs the others."""
    cores = len(os.sched_getaffinity(0))
    return min(cores - 1 if device.type == "cuda" else cores // 2, _MOST_WORKERS)


def free_memory(device: torch.device) -> int:
    """Bytes that could be taken now on the device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def _fitting(num_workers: int) -> tuple[int, int]:
    """Workers and parts ahead of each, so that what is under way fits into shared memory."""
    if num_workers == 0:
        return 0, 0
    shared = os.statvfs("/dev/shm")
    parts = shared.f_bavail * shared.f_frsize // 2 // (2 * _PART_BYTES)
    return (
        (num_workers, min(_PARTS_AHEAD, parts // num_workers)) if parts >= num_workers else (0, 0)
    )


def _leave_signals_to_parent(worker: int) -> None:
    """Ctrl-C and `timeout` signal a whole group; whether to go on is the parent's decision.

    A worker ends when its parent tells it to (by a message, or SIGTERM of its own), or is gone.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_on_a_signal_of_the_parent, daemon=True).start()


def _end_on_a_signal_of_the_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def _cut_up(ids: Ids, rows: int) -> list[Ids]:
    return [ids[start : start + rows] for start in range(0, len(ids), rows)]
