"""Compute blocks and commit them in the background, until the work is done or a signal arrives.

Images on the device are processed block by block. For images that must be decoded, all views of the
same samples are computed together, so that each image is decoded once. Their records are spooled as
they are computed.
"""

from __future__ import annotations

import math
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor

from teach_once.nets.teacher.taps import taps_stored
from teach_once.precompute.compute.queue import BlockQueue
from teach_once.precompute.compute.spool import Spool, SpoolLayout, spooled_start
from teach_once.precompute.compute.teacher_pass import TeacherPass
from teach_once.runtime.command.progress import Progress
from teach_once.runtime.command.signals import StopRequest
from teach_once.runtime.errors import Stopped
from teach_once.store.errors import SamplesChanged
from teach_once.store.format.coding import stored_values
from teach_once.store.format.manifest import Manifest
from teach_once.store.format.spec import SAMPLE_DIGEST, Block
from teach_once.store.identity import identity_sha256
from teach_once.store.write.pending_blocks import Work

QUEUED_BLOCKS = 2  # finished blocks that may wait for the disk before the teacher waits


class BlockWriter(Protocol):
    """A writer of blocks: the cache's `CacheWriter` or `RemoteWriter`, or a node's equivalent.

    rank: rank of this process in the folder of spools.
    """

    manifest: Manifest

    @property
    def rank(self) -> int: ...

    @property
    def spool_folder(self) -> Path: ...

    def outstanding(self, group: Sequence[Work]) -> list[Work]: ...

    def write_block(self, block: Block, records: Mapping[str, NDArray[Any]]) -> None: ...

    def refuse_if_too_full(self, work: Sequence[Work]) -> None: ...

    def refusing_full(self) -> AbstractContextManager[None]: ...


class BackgroundWriter:
    """A thread that copies records to the host and writes them, in order.

    On a GPU the copies run in their own stream.
    """

    def __init__(self, writer: BlockWriter) -> None:
        self._writer = writer
        self._queue: queue.Queue[Callable[[], None] | None] = queue.Queue(QUEUED_BLOCKS)
        self._spool: Spool | None = None  # the newest one, which may remain unfinished
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="cache-writer")

    def write(self, block: Block, records: dict[str, torch.Tensor]) -> None:
        """Queue one block. Raises the error of an earlier block."""
        on_host = OnHost(records)
        self._put(lambda: self._writer.write_block(block, on_host.arrays()))

    def spool(self, spool: Spool, parts: Mapping[int, dict[str, torch.Tensor]]) -> None:
        """Queue records of the next samples of a group: view -> tap -> (M, ...)."""
        on_host = {view: OnHost(values) for view, values in parts.items()}
        self._spool = spool
        self._put(lambda: self._add(spool, on_host))

    def write_group(self, spool: Spool, group: Sequence[Work]) -> None:
        """Queue the blocks of a complete spool, which is then removed."""
        self._put(lambda: self._commit(spool, group))

    def _put(self, job: Callable[[], None]) -> None:
        if self._error is not None:
            raise self._error
        self._queue.put(job)

    def _add(self, spool: Spool, on_host: Mapping[int, OnHost]) -> None:
        stored, start = self._writer.manifest.stored, spool.layout.start + spool.rows_done
        parts = {
            view: {
                tap: stored_values(tap, stored[tap], view, start, values)
                for tap, values in records.arrays().items()
            }
            for view, records in on_host.items()
        }
        with self._writer.refusing_full():
            spool.add(parts)

    def _commit(self, spool: Spool, group: Sequence[Work]) -> None:
        try:
            for item in group:
                self._writer.write_block(item.block, spool.records(item.block.view, item.taps))
        except SamplesChanged:
            spool.remove()  # its records come from other bytes than those of the other views
            raise
        spool.remove()

    def _work(self) -> None:
        while (job := self._queue.get()) is not None:
            if self._error is None:
                try:
                    job()
                except BaseException as error:  # raised again in the main thread
                    self._error = error

    def __enter__(self) -> BackgroundWriter:
        self._thread.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Wait until all queued blocks are written, also after an error."""
        self._queue.put(None)
        self._thread.join()
        if self._spool is not None:
            self._spool.close()
        if self._error is not None and error is None:
            raise self._error


class OnHost:
    """Tensors that are copied to arrays later in another thread, without blocking the device."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self._tensors = tensors
        self._device = next(iter(tensors.values())).device
        if self._device.type == "cuda":
            self._ready = torch.cuda.current_stream(self._device).record_event()

    def arrays(self) -> dict[str, np.ndarray]:
        if self._device.type != "cuda":
            return {name: tensor.numpy() for name, tensor in self._tensors.items()}
        stream, copies = torch.cuda.Stream(self._device), {}  # type: ignore[no-untyped-call]
        with torch.cuda.stream(stream):
            stream.wait_event(self._ready)
            for name, tensor in self._tensors.items():
                copies[name] = torch.empty_like(tensor, device="cpu", pin_memory=True)
                copies[name].copy_(tensor, non_blocking=True)
        stream.synchronize()
        return {name: copy.numpy() for name, copy in copies.items()}


_SECONDS_TO_FINISH = 10.0  # a block that takes longer is abandoned when the pass is stopped


def run_blocks(
    teacher_pass: TeacherPass,
    writer: BlockWriter,
    work: Sequence[Work],
    stop: StopRequest,
    console: Console,
) -> int:
    """Compute and commit blocks; returns the number of images.

    Raises CacheError if a block cannot be written, and Stopped.
    """
    writer.refuse_if_too_full(work)
    blocks = BlockQueue(_begun_first(writer, work), teacher_pass.views_per_reading)
    total = blocks.num_images
    with Progress(total, "images", console) as progress, BackgroundWriter(writer) as behind:
        pass_ = _Pass(teacher_pass, writer, stop, progress, behind, blocks.num_blocks)
        while group := blocks.take():
            group = pass_.outstanding(group)
            if not group:
                continue
            if teacher_pass.pixels.is_streamed:
                pass_.run_group(group)
            else:
                pass_.run_block(group[0])
    return total - pass_.skipped


def _begun_first(writer: BlockWriter, work: Sequence[Work]) -> list[Work]:
    """Return the work with those blocks first for which an earlier process left records."""
    start = spooled_start(writer.spool_folder, writer.rank)
    return sorted(work, key=lambda item: item.block.start != start)


class _Pass:
    """One call of `run_blocks`."""

    def __init__(
        self,
        teacher_pass: TeacherPass,
        writer: BlockWriter,
        stop: StopRequest,
        progress: Progress,
        behind: BackgroundWriter,
        num_blocks: int,
    ) -> None:
        self._teacher_pass, self._writer, self._stop = teacher_pass, writer, stop
        self._progress, self._behind = progress, behind
        self._done, self._num_blocks = 0, num_blocks
        self.skipped = 0  # images of blocks committed by other writers in the meantime
        self._taps = taps_stored(writer.manifest.taps)

    def outstanding(self, group: Sequence[Work]) -> list[Work]:
        """Return the blocks that are not committed yet."""
        left = self._writer.outstanding(group)
        num_skipped = sum(item.block.rows for item in group) - sum(i.block.rows for i in left)
        self.skipped += num_skipped
        self._progress.skip(num_skipped)
        self._done += len(group) - len(left)
        return left

    def run_block(self, item: Work) -> None:
        """Compute one block and queue it for writing."""
        self._check_stopped()
        block, taps = item.block, self._asked(item)
        parts: list[dict[str, Tensor]] = []
        left = block.rows
        for _, values in self._teacher_pass.batches([block.view], _ids(block), self._taps):
            parts.append({tap: values[tap] for tap in taps})
            left -= len(values[taps[0]])
            self._progress.advance(len(values[taps[0]]))
            self._check_stopped(left / max(self._progress.rate, 1e-9))
        self._behind.write(block, {tap: torch.cat([p[tap] for p in parts]) for tap in taps})
        self._done += 1

    def run_group(self, group: Sequence[Work]) -> None:
        """Compute blocks of the same samples, image by image, and queue them for writing.

        Records spooled by an earlier process are not computed again.
        """
        self._check_stopped()
        block, taps = group[0].block, self._asked(group[0])
        views = [item.block.view for item in group]
        spool = Spool(self._writer.spool_folder, self._writer.rank, self._layout(group, taps))
        self._progress.skip(spool.rows_done * len(group))
        ids = _ids(block)[spool.rows_done :]
        done = spool.rows_done
        for parts in self._teacher_pass.readings(views, ids, self._taps):
            some = {view: {tap: values[tap] for tap in taps} for view, values in parts.items()}
            self._behind.spool(spool, some)
            rows = len(parts[views[0]][taps[0]])
            done += rows
            self._progress.advance(rows * len(views))
            if done < block.rows:
                self._check_stopped(saved=done)
        self._behind.write_group(spool, [Work(item.block, taps) for item in group])
        self._done += len(group)

    def _asked(self, item: Work) -> tuple[str, ...]:
        """Return the taps to compute, with the samples' digests, which are compared."""
        return tuple(dict.fromkeys((*item.taps, SAMPLE_DIGEST)))

    def _layout(self, group: Sequence[Work], taps: Sequence[str]) -> SpoolLayout:
        manifest = self._writer.manifest
        specs = ((tap, manifest.stored[tap]) for tap in taps)
        return SpoolLayout(
            identity_sha256(manifest.identity),
            group[0].block.start,
            group[0].block.rows,
            tuple(item.block.view for item in group),
            tuple((tap, spec.read_dtype, tuple(spec.shape)) for tap, spec in specs),
        )

    def _check_stopped(self, seconds_left: float = math.inf, saved: int = 0) -> None:
        if self._stop.signal_number is not None and seconds_left > _SECONDS_TO_FINISH:
            also = f", and {saved:,} samples of the next" if saved else ""
            raise Stopped(
                self._stop.signal_number,
                f"stopped after {self._done:,} of {self._num_blocks:,} blocks, which are "
                f"saved{also}; the same command resumes",
            )


def _ids(block: Block) -> np.ndarray:
    return np.arange(block.start, block.stop)
