"""Writes records behind the compute: the teacher waits neither for copies nor for the disk."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from precompute.spool import Spool
from store.encode import stored_values
from store.errors import SamplesChanged
from store.layout import Block
from store.manifest import Manifest
from store.work import Work

QUEUED_BLOCKS = 2  # finished blocks that may wait for the disk before the teacher waits too


class BlockWriter(Protocol):
    """Takes blocks: the cache's `CacheWriter` or `RemoteWriter`, or what a node has for it.

    rank: of this process in the folder of spools.
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
    """A thread that copies records to the host and writes them, in the order given.

    On a GPU the copies run in a stream of their own.
    """

    def __init__(self, writer: BlockWriter) -> None:
        self._writer = writer
        self._queue: queue.Queue[Callable[[], None] | None] = queue.Queue(QUEUED_BLOCKS)
        self._spool: Spool | None = None  # the newest, which may stay unfinished
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="cache-writer")

    def write(self, block: Block, records: dict[str, torch.Tensor]) -> None:
        """Queue one block; raises the error of an earlier one."""
        on_host = OnHost(records)
        self._put(lambda: self._writer.write_block(block, on_host.arrays()))

    def spool(self, spool: Spool, parts: Mapping[int, dict[str, torch.Tensor]]) -> None:
        """Queue records of the next samples of a group: view -> tap -> (M, ...)."""
        on_host = {view: OnHost(values) for view, values in parts.items()}
        self._spool = spool
        self._put(lambda: self._add(spool, on_host))

    def write_group(self, spool: Spool, group: Sequence[Work]) -> None:
        """Queue the blocks of a spool that is complete; it is removed behind them."""
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
            spool.remove()  # its records are of bytes that the other views were not computed from
            raise
        spool.remove()

    def _work(self) -> None:
        while (job := self._queue.get()) is not None:
            if self._error is None:
                try:
                    job()
                except BaseException as error:  # handed to the main thread
                    self._error = error

    def __enter__(self) -> BackgroundWriter:
        self._thread.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Wait until everything queued is written, also after an error."""
        self._queue.put(None)
        self._thread.join()
        if self._spool is not None:
            self._spool.close()
        if self._error is not None and error is None:
            raise self._error


class OnHost:
    """Tensors that become arrays later, in another thread, without delaying the device."""

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
