"""Classification error of anything that gives logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Errors:
    """Percentages of samples whose label is not the first, or not among the first five."""

    top1: float
    top5: float


@torch.no_grad()
def count_errors(logits_of: Callable[[slice], Tensor], labels: Tensor, batch_size: int) -> Errors:
    """`logits_of` maps a range of samples to (B, K); labels is (N,), on the same device.

    With fewer than five classes top-5 counts all of them.
    """
    top1 = torch.zeros((), dtype=torch.int64, device=labels.device)
    top5 = torch.zeros_like(top1)
    for start in range(0, len(labels), batch_size):
        rows = slice(start, start + batch_size)
        logits = logits_of(rows)
        ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[rows, None]
        top1 += ranked[:, 0].sum()
        top5 += ranked.sum()
    total = len(labels)
    return Errors(100.0 * (total - top1.item()) / total, 100.0 * (total - top5.item()) / total)
