"""Check that every process of a student has samples in every step.

Does not import torch, so that it can run before a teacher.
"""

from __future__ import annotations

from teach_once.configs.schema import Training
from teach_once.train.errors import TrainError


def check_idle_ranks(training: Training, num_samples: int, world: int) -> None:
    """Raise TrainError if one of `world` processes would get too few samples of a batch.

    num_samples: samples in an epoch. A process needs one sample of each part of a batch, or two if
    it normalizes its own slice, because batch norm computes the slice's variance.
    """
    if world == 1 or _all_busy(training, training.batch_size, num_samples, world):
        return
    larger = range(training.batch_size + 1, num_samples + 1)
    better = next((n for n in larger if _all_busy(training, n, num_samples, world)), None)
    parts = (
        f" and training.gradient_accumulation {training.gradient_accumulation}"
        if training.gradient_accumulation > 1
        else ""
    )
    least = _least(training)
    needs = "a sample" if least == 1 else f"{least} samples, for its own batch norm,"
    raise TrainError(
        f"training.batch_size is {training.batch_size}{parts}, and the epoch of {num_samples:,} "
        f"samples has a batch without {needs} for each of {world} processes",
        fix=f"set training.batch_size={better}, or use fewer processes"
        if better
        else "use fewer processes or more images",
    )


def _least(training: Training) -> int:
    return 2 if training.batch_norm == "local" else 1


def _all_busy(training: Training, batch_size: int, num_samples: int, world: int) -> bool:
    """Return True if whole batches and the smaller last batch have enough samples for all."""
    sizes = (min(batch_size, num_samples), num_samples % batch_size)
    least = world * _least(training)
    return all(size // training.gradient_accumulation >= least for size in sizes if size)
