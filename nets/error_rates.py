"""The classification error of anything that returns logits."""

from __future__ import annotations

from collections.abc import Iterable
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


@torch.no_grad()
def count_errors(batches: Iterable[tuple[Tensor, Tensor]]) -> ErrorRates:
    """The error over batches of (logits (B, K), labels (B,)), all on one device.

    Waits for the device once, at the end. With fewer than five classes, top-5 counts them all.
    """
    right: list[Tensor] = []
    total = num_classes = 0
    for logits, labels in batches:
        ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
        right.append(torch.stack([ranked[:, 0].sum(), ranked.sum()]))
        total, num_classes = total + len(labels), logits.shape[1]
    top1, top5 = torch.stack(right).sum(dim=0).tolist()
    return ErrorRates(100.0 * (total - top1) / total, 100.0 * (total - top5) / total, num_classes)
