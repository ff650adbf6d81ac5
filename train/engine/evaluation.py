"""Measure the metrics of a network on a split, at once or batch by batch between other work."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from teach_once.nets.networks.classifier import read_embedding
from teach_once.nets.networks.precision import autocast
from teach_once.runtime.command.run_to_end import last_of
from teach_once.train.engine.comparison import ERRORS_ONLY, Evaluator, MetricCount
from teach_once.train.engine.ranks import ALONE, Ranks
from teach_once.views.pixels.batches import Pixels, ViewBatch

_BATCH = 1024
_BATCH_VALUES = 4 * 2**20  # input values per batch: larger images are in smaller batches


def evaluate(
    network: nn.Module,
    pixels: Pixels,
    precision: str,
    device: torch.device,
    evaluator: Evaluator = ERRORS_ONLY,
) -> dict[str, float]:
    """Measure the network in evaluation mode, over view 0 of all samples: {metric: value}."""
    return last_of(evaluate_batches(network, pixels, precision, device, evaluator=evaluator))


def evaluate_batches(
    network: nn.Module,
    pixels: Pixels,
    precision: str,
    device: torch.device,
    ranks: Ranks = ALONE,
    evaluator: Evaluator = ERRORS_ONLY,
) -> Generator[None, None, dict[str, float]]:
    """Measure as `evaluate` does, one batch per step of the generator.

    Other work may be done between two batches. ranks: each rank measures a slice of the samples.
    """
    count = MetricCount(evaluator, len(pixels), ranks)
    classifiers = evaluator.classifiers if evaluator.reads_embedding else ()
    values: dict[str, Tensor] = {}
    with evaluation_mode(network), read_embedding(network, classifiers, values):
        for batch in evaluation_batches(pixels, ranks):
            outputs = compute_logits(network, batch, precision, device)
            count.add(batch, outputs, values.get("embedding"))
            yield
        return count.values(device)


def evaluation_batches(pixels: Pixels, ranks: Ranks = ALONE) -> Iterator[ViewBatch]:
    """Yield view 0 of this rank's samples in batches of a suitable size."""
    size = max(1, min(_BATCH, _BATCH_VALUES // int(np.prod(pixels.shape))))
    ids = np.arange(len(pixels))[ranks.slice_of(len(pixels))]
    return pixels.batches([0], ids, size) if len(ids) else iter(())


@torch.no_grad()
def compute_logits(
    network: nn.Module, batch: ViewBatch, precision: str, device: torch.device
) -> Tensor:
    """Return the network's logits (B, classes), or embedding (B, D), in float32."""
    with autocast(precision, device):
        logits: Tensor = network(batch.inputs)
        return logits.float()


@contextmanager
def evaluation_mode(network: nn.Module) -> Iterator[None]:
    """Put the network into evaluation mode within a context; frozen modules stay as they are."""
    modes = [(module, module.training) for module in network.modules()]  # some may be frozen
    network.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
