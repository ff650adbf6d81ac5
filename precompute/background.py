"""Commits blocks in the background, so that the teacher waits neither for copies nor the disk."""

from __future__ import annotations

import queue
import threading

import numpy as np
import torch

from store import CacheWriter
from store.layout import Block

QUEUED_BLOCKS = 2  # finished blocks that may wait for the disk before the teacher waits too


class BackgroundWriter:
    """A thread that copies blocks to the host and commits them, in the order given.

    On a GPU the copies run in a stream of their own.
    """

    def __init__(self, writer: CacheWriter) -> None:
        self._writer = writer
        self._queue: queue.Queue[tuple[Block, OnHost] | None] = queue.Queue(QUEUED_BLOCKS)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._commit_all, name="cache-writer")

    def write(self, block: Block, records: dict[str, torch.Tensor]) -> None:
        """Queue one block; raises the error of an earlier one."""
        if self._error is not None:
            raise self._error
        self._queue.put((block, OnHost(records)))

    def _commit_all(self) -> None:
        while (item := self._queue.get()) is not None:
            if self._error is None:
                block, records = item
                try:
                    self._writer.write_block(block, records.arrays())
                except BaseException as error:  # handed to the main thread
                    self._error = error

    def __enter__(self) -> BackgroundWriter:
        self._thread.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Wait until everything queued is committed, also after an error."""
        self._queue.put(None)
        self._thread.join()
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
