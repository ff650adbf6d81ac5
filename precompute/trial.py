"""Measures the rate of a pass on a few batches, and finds the fastest batch size."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from precompute.teacher_pass import TeacherPass
from runtime.cost import measured_rate

_SMALLEST_BATCH = 64
_LARGEST_BATCH, _LARGEST_ON_CPU = 8192, 256  # more takes memory, and a CPU gains nothing from it
_WORTHWHILE_GAIN = 1.03


def pass_rate(teacher_pass: TeacherPass) -> float:
    """Images per second, at the pass's batch size."""
    return measured_rate(_batch_sizes(teacher_pass))


def fastest_batch(teacher_pass: TeacherPass) -> tuple[int, float]:
    """The batch size with the highest rate, and that rate in images per second.

    Doubles the size, on a CPU up to 256 images, while that gains more than 3 % and the GPU's memory
    suffices. Leaves the pass at the last size tried.
    """
    best, best_rate = _SMALLEST_BATCH, 0.0
    on_cpu = teacher_pass.options.device.type == "cpu"
    for size in _batch_sizes_up_to(_LARGEST_ON_CPU if on_cpu else _LARGEST_BATCH):
        if size > len(teacher_pass.pixels) and best_rate:
            break
        teacher_pass.batch_size = size
        try:
            rate = pass_rate(teacher_pass)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            break
        if rate < best_rate * _WORTHWHILE_GAIN:
            break
        best, best_rate = size, rate
    return best, best_rate


def _batch_sizes_up_to(largest: int) -> Iterator[int]:
    size = _SMALLEST_BATCH
    while size <= largest:
        yield size
        size *= 2


def _batch_sizes(teacher_pass: TeacherPass) -> Iterator[int]:
    """Runs batches of view 0 endlessly, as a pass would; yields the number of images of each."""
    every = np.arange(len(teacher_pass.pixels))
    while True:
        for _, values in teacher_pass.batches([0], every, teacher_pass.setup.taps):
            first = next(iter(values.values()))
            yield len(first.reshape(len(first), -1)[:, :1].cpu())  # waits for the device
