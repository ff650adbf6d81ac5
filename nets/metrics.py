"""Top-1 and top-5 classification error, from logits and labels."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from teach_once.runtime.metrics import TOP1_ERROR, TOP5_ERROR


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

    def rates(self, summed: Callable[[Tensor], Tensor] = lambda counts: counts) -> dict[str, float]:
        """Return the errors (%) of all batches by metric name.

        With five classes or fewer there is no top-5 error: it would always be zero.

        summed: sums the (3,) int64 counts over processes; by default there is one process.
        """
        device = self._right[0].device if self._right else None
        counts = torch.zeros(3, dtype=torch.int64, device=device)
        if self._right:
            counts[:2] = torch.stack(self._right).sum(dim=0)
        counts[2] = self._total
        top1, top5, total = summed(counts).tolist()
        errors = {TOP1_ERROR.name: 100.0 * (total - top1) / total}
        if self._num_classes > 5:
            errors[TOP5_ERROR.name] = 100.0 * (total - top5) / total
        return errors


@torch.no_grad()
def count_errors(batches: Iterable[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Return the errors over batches of (logits (B, K), labels (B,)) on one device, as `rates`.

    The device is synchronized once, at the end.
    """
    count = ErrorCount()
    for logits, labels in batches:
        count.add(logits, labels)
    return count.rates()
