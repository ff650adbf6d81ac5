"""The classification error of anything that returns logits."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ErrorRates:
    """Percentages of samples whose label is not the first class, or not among the first five.

    num_classes: with five or fewer, top5 says nothing.
    """

    top1: float
    top5: float
    num_classes: int = 1000


class ErrorCount:
    """Counts errors batch by batch; waits for the device once, when they are read."""

    def __init__(self) -> None:
        self._right: list[Tensor] = []
        self._total = self._num_classes = 0

    @torch.no_grad()
    def add(self, logits: Tensor, labels: Tensor) -> None:
        """logits: (B, K), labels: (B,), on the device of all other batches."""
        ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
        self._right.append(torch.stack([ranked[:, 0].sum(), ranked.sum()]))
        self._total, self._num_classes = self._total + len(labels), logits.shape[1]

    def rates(self, summed: Callable[[Tensor], Tensor] = lambda counts: counts) -> ErrorRates:
        """summed: makes (3,) int64 counts those of all processes that counted a part each."""
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
    """The error over batches of (logits (B, K), labels (B,)), all on one device.

    Waits for the device once, at the end. With fewer than five classes, top-5 counts them all.
    """
    count = ErrorCount()
    for logits, labels in batches:
        count.add(logits, labels)
    return count.rates()
