"""Read, decode and crop images ahead of their use in worker processes.

Workers send uint8 views, several views of a sample at once during a pass. Teacher outputs are never
sent through workers. The bytes do not depend on the number of workers.
"""

from __future__ import annotations

import multiprocessing.queues
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from teach_once.configs.schema import ViewsConfig
from teach_once.runtime.machine.resources import Share, usable_cores
from teach_once.views.augment.augment import cut_views, view_shape
from teach_once.views.pixels.batches import AugmentedSplit, Drawn, Finisher, ViewBatch
from teach_once.views.splits import DIGEST_BYTES, DatasetError, Digests, Ids, Split

PART_BYTES = 4 * 2**20  # approximate size of a message from a worker
MOST_PART_BYTES = 2 * PART_BYTES  # limit, unless eight views of a sample are larger
WINDOW_SAMPLES = 16_384  # samples whose parameters are drawn at once
_PARTS_AHEAD = 8  # most finished parts per worker
_MOST_WORKERS = 16
_SHARED_MEMORY = "/dev/shm"  # through which workers send images


class StreamedPixels(Finisher):
    """Images that `num_workers` processes read and crop ahead of their use; 0: this process."""

    is_streamed = True

    def __init__(self, source: AugmentedSplit, num_workers: int) -> None:
        split, config = source.split, source.config
        shape = view_shape(split.first_shape, config.augment)
        super().__init__(source, shape)
        self._keys = _Keys()
        self.num_workers, ahead = _fitting(num_workers)
        workers = "a worker" if self.num_workers == 1 else f"{self.num_workers} workers"
        self.where = f"read by {workers}" if ahead else "read by this process"
        if num_workers and not ahead:
            self.where += f": {_SHARED_MEMORY} is too small for worker batches"
        self._parts_ahead = ahead
        self._cut_views = _CutViews(split, config, shape, shares_memory=self.num_workers > 0)
        self._loader = self._new_loader()

    def _new_loader(self) -> DataLoader[_Part]:
        """Return a loader that starts its workers when it is first iterated."""
        return DataLoader(
            self._cut_views,
            sampler=self._keys,
            batch_size=None,
            num_workers=self.num_workers,
            prefetch_factor=self._parts_ahead if self.num_workers else None,
            persistent_workers=self.num_workers > 0,
            pin_memory=self._device.type == "cuda",
            worker_init_fn=_begin_worker,
            generator=torch.Generator(),  # leaves torch's global generator unchanged
            multiprocessing_context="fork" if self.num_workers else None,
        )

    def _iterate(self) -> Iterator[_Part]:
        """Iterate over the parts of `self._keys`.

        torch installs a SIGCHLD handler that raises in the main thread, for example in a training
        step, when a worker dies. The handler is removed: the loader also notices a dead worker
        while waiting, where the error can be explained.
        """
        before = signal.getsignal(signal.SIGCHLD)
        received = iter(self._loader)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, before)
        return received

    def _next_part(self, received: Iterator[_Part]) -> tuple[Tensor, Digests]:
        """Return the next part: (V, M, H, W, C) uint8 views and (M, 16) uint8 digests.

        Raises DatasetError if a worker cannot read its samples or has died. The next call of
        `batches` then starts new workers, since a loader cannot replace a dead worker.
        """
        try:
            part = next(received)
        except RuntimeError as error:
            if "worker" not in str(error):
                raise
            self._loader = self._new_loader()
            raise DatasetError(
                f"a worker process that reads images died: {error}",
                fix="run the command again; use fewer --workers if memory ran out",
            ) from None
        if isinstance(part, str):
            raise DatasetError(part)
        images, digests = part
        return images, np.frombuffer(digests, dtype=np.uint8).reshape(-1, DIGEST_BYTES)

    def batches(self, views: Sequence[int], ids: Ids, batch_size: int) -> Iterator[ViewBatch]:
        drawn: deque[list[Drawn]] = deque()  # of windows already requested from workers
        window = max(1, WINDOW_SAMPLES // batch_size) * batch_size
        windows = _cut_up(ids, window)
        self._keys.parts = self._parts(tuple(views), windows, batch_size, drawn)
        received = self._iterate()
        for in_window in windows:
            for start in range(0, len(in_window), batch_size):
                some = in_window[start : start + batch_size]
                images, digests, others = self._receive(received, tuple(views), some)
                for index, view in enumerate(views):
                    part = drawn[0][index].part(start, start + batch_size)
                    cut_partners = None if others is None else others[index]
                    yield self._finished(view, images[index], digests, part, cut_partners)
            drawn.popleft()

    def cut_parts(self, ids: Ids) -> Iterator[tuple[Tensor, Digests]]:
        """Yield view 0 of samples, as sent by workers: (M, H, W, C) uint8 and digests."""
        parts = [_Key((0,), part, []) for part in _cut_up(ids, self._rows_per_part(1))]
        self._keys.parts = parts
        received = self._iterate()
        for _ in parts:
            (images,), digests = self._next_part(received)
            yield images, digests

    def _receive(
        self, received: Iterator[_Part], views: tuple[int, ...], ids: Ids
    ) -> tuple[Tensor, Digests, Tensor | None]:
        """Receive a batch: views (V, B, H, W, C), digests, and the partners' views or None.

        The third is (V, B, H, W, C) too, if views are mixed.
        """
        parts, of_parts = [], []
        for _ in range(0, len(ids), self._rows_per_part(len(views))):
            images, digests = self._next_part(received)
            parts.append(images.to(self._device, non_blocking=True))
            of_parts.append(digests)
        digests = np.concatenate(of_parts)
        if self._augment.mix is None:
            return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)), digests, None
        halves = [part.chunk(2, dim=1) for part in parts]
        own, others = (torch.cat(some, dim=1) for some in zip(*halves, strict=True))
        return own, digests, others

    def _parts(
        self,
        views: tuple[int, ...],
        windows: Sequence[Ids],
        batch_size: int,
        drawn: deque[list[Drawn]],
    ) -> Iterator[_Key]:
        """Yield the keys that are requested from workers, in order.

        drawn: receives each window's parameters before its first part is requested.
        """
        for ids in windows:
            drawn.append([self._drawn(view, ids) for view in views])
            partners = [of_view.partners for of_view in drawn[-1]]
            for start in range(0, len(ids), batch_size):
                rows = np.arange(start, min(start + batch_size, len(ids)))
                for part in _cut_up(rows, self._rows_per_part(len(views))):
                    theirs = [each.host_ids[part] for each in partners if each is not None]
                    yield _Key(views, ids[part], theirs)

    def _rows_per_part(self, num_views: int) -> int:
        height, width, channels = self.shape
        return max(1, PART_BYTES // (num_views * height * width * channels))


class _Key(NamedTuple):
    """A request to a worker; partners: of the samples in each view, if views are mixed."""

    views: tuple[int, ...]
    ids: Ids
    partners: Sequence[Ids]


_Part = tuple[Tensor, bytes] | str  # bytes, since a second tensor would take a file descriptor


class _Keys:
    """The sampler of the loader: yields the keys put into `parts`."""

    def __init__(self) -> None:
        self.parts: Iterable[_Key] = []

    def __iter__(self) -> Iterator[_Key]:
        return iter(self.parts)


class _CutViews(Dataset["_Part"]):
    """The work of a worker. An error in the data, or lack of memory, is returned as a message.

    shares_memory: move a part to shared memory here. Otherwise the sending thread would do so, and
    drop the part if there is not enough memory.
    """

    def __init__(
        self, split: Split, config: ViewsConfig, shape: tuple[int, int, int], *, shares_memory: bool
    ) -> None:
        self._split, self._config, self._shape = split, config, shape
        self._shares_memory = shares_memory

    def __getitem__(self, key: _Key) -> _Part:
        views, ids, partners = key
        try:
            cut, digests = self._cut(views, ids)
            theirs = [self._cut([v], p)[0] for v, p in zip(views, partners, strict=False)]
        except DatasetError as error:
            return str(error)
        if theirs:
            cut = np.concatenate([cut, np.concatenate(theirs)], axis=1)
        images = torch.from_numpy(cut)
        if self._shares_memory:
            try:
                cast(Any, images).share_memory_()
            except RuntimeError as error:
                return str(_no_room(error))
        return images, digests.tobytes()

    def _cut(self, views: Sequence[int], ids: Ids) -> tuple[NDArray[np.uint8], Digests]:
        return cut_views(self._split, self._config, views, ids, self._shape)


def _no_room(error: Exception) -> DatasetError:
    return DatasetError(
        f"{_SHARED_MEMORY} has no space for a worker's images: {error}",
        fix=f"use fewer --workers, or a larger {_SHARED_MEMORY} (docker run --shm-size=1g)",
    )


def default_workers(device: torch.device) -> int:
    """Return all usable cores but one with a GPU, half of them if the network also needs cores."""
    cores = usable_cores()
    return min(cores - 1 if device.type == "cuda" else cores // 2, _MOST_WORKERS)


def _fitting(num_workers: int) -> tuple[int, int]:
    """Return workers and parts per worker, so that all parts fit into shared memory.

    This process may use its fraction of half of the free shared memory. Returns (0, 0) if not even
    one part per worker fits, or if there is no shared memory.
    """
    try:
        shared = os.statvfs(_SHARED_MEMORY)
    except OSError:
        return 0, 0
    free = shared.f_bavail * shared.f_frsize // Share.of_this_process().count
    parts = free // 2 // (2 * PART_BYTES)
    if num_workers == 0 or parts < num_workers:
        return 0, 0
    return num_workers, min(_PARTS_AHEAD, parts // num_workers)


def _begin_worker(worker: int) -> None:
    _leave_signals_to_parent()
    # By default a part that cannot be sent is dropped, and the parent would wait for it endlessly.
    on_error = staticmethod(_end_on_an_unsent_part)
    multiprocessing.queues.Queue._on_queue_feeder_error = on_error  # type: ignore[attr-defined]


def _end_on_an_unsent_part(error: Exception, part: object) -> None:
    print(f"a worker process could not send images: {error}", file=sys.stderr, flush=True)
    os._exit(1)


def _leave_signals_to_parent() -> None:
    """Ignore signals to the process group, such as Ctrl-C; the parent decides whether to continue.

    A worker ends when its parent tells it to (by a message or SIGTERM) or is gone.
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
