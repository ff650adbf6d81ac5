"""Top-1 and top-5 classification error, from logits and labels."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ErrorRates:
    """Top-1 and top-5 error in percent.

    num_classes: number of classes; with five or fewer, top5 is always zero.
    """

    top1: float
    top5: float
    num_classes: int = 1000


class ErrorCount:
    """Error counts kept on the device; it is synchronized once, in `rates`."""

    def __init__(self) -> None:
        self._right: list[Tensor] = []
        self._total = self._num_classes = 0

    @torch.no_grad()
    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Add a batch: logits (B, K) and labels (B,), on the same device as all other batches."""
        ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
        self._right.append(torch.stack([ranked[:, 0].sum(), ranked.sum()]))
        self._total, self._num_classes = self._total + len(labels), logits.shape[1]

    def rates(self, summed: Callable[[Tensor], Tensor] = lambda counts: counts) -> ErrorRates:
        """Return the error rates of all batches.

        summed: sums the (3,) int64 counts over processes; by default there is one process.
        """
        device = self._right[0].device if self._right else None
        counts = torch.zeros(3, dtype=torch.int64, device=device)
        if self._right:
            counts[:2] = torch.stack(self._right).sum(dim=0)
        counts[2] = self._total
        top1, top5, total = summed(counts).tolist()
        return ErrorRates(
            100.0 * (total - top1) / total, 100.0 * (total - top5) / total, self._num_classes
        )


@torch.no_grad()
def count_errors(batches: Iterable[tuple[Tensor, Tensor]]) -> ErrorRates:
    """Return the error rates over batches of (logits (B, K), labels (B,)) on one device.

    The device is synchronized once, at the end. With fewer than five classes, top-5 uses them all.
    """
    count = ErrorCount()
    for logits, labels in batches:
        count.add(logits, labels)
    return count.rates()
