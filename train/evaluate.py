"""Test error of a student (or of a teacher in training)."""

from __future__ import annotations

from torch import Tensor, nn

from configs.schema import Normalisation
from nets.errors import Errors, count_errors
from nets.precision import arithmetic
from views.augment import normalise

_BATCH = 1024


def evaluate(
    network: nn.Module,
    images: Tensor,
    labels: Tensor,
    normalisation: Normalisation,
    precision: str,
) -> Errors:
    """images: (N, H, W, C) uint8 and labels (N,), on the network's device; no augmentation."""

    def logits_of(rows: slice) -> Tensor:
        with arithmetic(precision, images.device):
            return network(normalise(images[rows], normalisation)).float()

    was_training = network.training
    network.eval()
    try:
        return count_errors(logits_of, labels, _BATCH)
    finally:
        network.train(was_training)
