"""Copy the teacher's outputs to the training device without blocking a training step.

A GPU copies from page-locked ("pinned") memory while it computes, but from other memory only
between computations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

_BUFFERS = 8  # batches being copied to a GPU at the same time


class Buffers:
    """Host memory in which batches are gathered, reused from step to step.

    For a GPU it is pinned and has several buffers, so that one batch can be copied while the next
    is gathered. Nothing blocks unless the GPU is that many batches behind.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._is_cuda = device, device.type == "cuda"
        self._slots: list[dict[str, Tensor]] = [{} for _ in range(_BUFFERS if self._is_cuda else 1)]
        self._sent: list[torch.cuda.Event | None] = [None] * len(self._slots)
        self._turn = 0

    def send(self, parts: Sequence[tuple[dict[str, Tensor], Tensor]]) -> dict[str, Tensor]:
        """Send rows of one or more slabs to the device: name -> (B, ...).

        parts: slabs, and the requested rows of each, on the host.
        """
        self._turn = (self._turn + 1) % len(self._slots)
        if (event := self._sent[self._turn]) is not None:
            event.synchronize()
        slot, num_rows = self._slots[self._turn], sum(len(rows) for _, rows in parts)
        rows_by_tap = {}
        for tap, values in parts[0][0].items():
            if tap not in slot or len(slot[tap]) < num_rows:
                empty = torch.empty((num_rows, *values.shape[1:]), dtype=values.dtype)
                slot[tap] = pin(empty, self._device)
            start = 0
            for slab, rows in parts:
                stop = start + len(rows)
                torch.index_select(slab[tap], 0, rows, out=slot[tap][start:stop])
                start = stop
            rows_by_tap[tap] = slot[tap][:num_rows].to(self._device, non_blocking=True)
        if self._is_cuda:
            sent = torch.cuda.current_stream(self._device).record_event()
            self._sent[self._turn] = sent
        return rows_by_tap


def pin(values: Tensor, device: torch.device) -> Tensor:
    """Return the tensor in page-locked memory if the device is a GPU; otherwise unchanged."""
    return values.pin_memory() if device.type == "cuda" else values


def copy_in_background(values: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Copy host tensors to the device from a background thread; returns when they have arrived.

    On a GPU the copy uses page-locked memory and its own stream. In the default stream, copies
    would wait for queued training steps, and steps for copies. Code that uses the tensors in
    another stream must call `mark_as_used` first.
    """
    if device.type != "cuda":
        return {tap: each.to(device) for tap, each in values.items()}
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        copies = {
            tap: pin(each, device).to(device, non_blocking=True) for tap, each in values.items()
        }
    stream.synchronize()
    return copies


def mark_as_used(values: Mapping[str, Tensor]) -> None:
    """Prevent the reuse of these copies' memory while the current stream still reads it."""
    for each in values.values():
        if each.is_cuda:
            each.record_stream(torch.cuda.current_stream(each.device))


def gather_rows(slab: Tensor, sample_ids: Tensor, buffer: Tensor) -> Tensor:
    """Gather rows of (N, ...) into a reused buffer; returns a view (B, ...) of it.

    Page faults of newly allocated memory would cost more than the copy. The next call overwrites
    the rows, so they must not be used after the step.
    """
    if len(buffer) < len(sample_ids):
        buffer.resize_(len(sample_ids), *slab.shape[1:])
    return torch.index_select(slab, 0, sample_ids, out=buffer[: len(sample_ids)])
