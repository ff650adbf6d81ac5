"""Test error of a student (or of a teacher in training)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from nets.error_rates import ErrorRates, count_errors
from nets.precision import autocast
from views.batches import Pixels

_BATCH = 1024
_BATCH_VALUES = 4 * 2**20  # of input numbers: larger images come in smaller batches


def evaluate(
    network: nn.Module, pixels: Pixels, precision: str, device: torch.device
) -> ErrorRates:
    """Of the network, in evaluation mode and on `device`, over view 0 of all samples."""
    was_training = network.training
    network.eval()
    try:
        return count_errors(outputs_and_labels(network, pixels, precision, device))
    finally:
        network.train(was_training)


def outputs_and_labels(
    network: nn.Module, pixels: Pixels, precision: str, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """(B, classes) float32 and (B,) of one batch of view 0 after another, as large as is good."""
    size = max(1, min(_BATCH, _BATCH_VALUES // int(np.prod(pixels.shape))))
    for batch in pixels.batches([0], np.arange(len(pixels)), size):
        with autocast(precision, device):
            yield network(batch.inputs).float(), batch.labels
