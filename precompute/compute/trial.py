"""Measure the rate of a pass on a few batches, and find the fastest batch size."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from rich.console import Console

from teach_once.nets.teacher.taps import taps_stored
from teach_once.precompute.compute.teacher_pass import TeacherPass
from teach_once.runtime.command.cost import measured_rate
from teach_once.runtime.formats import counted
from teach_once.store import TeacherCache
from teach_once.store.format.certificate import (
    RECORDS,
    Comparison,
    certificate_in,
    certified_blocks,
    is_reduced,
)

_SMALLEST_BATCH = 64
_LARGEST_BATCH, _LARGEST_ON_CPU = 8192, 256  # larger batches take memory, without gain on a CPU
_WORTHWHILE_GAIN = 1.03


def pass_rate(teacher_pass: TeacherPass) -> float:
    """Measure images per second at the pass's batch size."""
    return measured_rate(_batch_sizes(teacher_pass))


def fastest_batch(teacher_pass: TeacherPass) -> tuple[int, float]:
    """Find the batch size with the highest rate; returns it with its rate in images per second.

    The size is doubled (on a CPU up to 256 images) while the gain exceeds 3 % and the GPU's memory
    suffices. The pass keeps the last size tried.
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
    """Run batches of view 0 endlessly, as a pass would; yields the number of images in each."""
    every = np.arange(len(teacher_pass.pixels))
    while True:
        for _, values in teacher_pass.batches([0], every, teacher_pass.setup.taps):
            first = next(iter(values.values()))
            yield len(first.reshape(len(first), -1)[:, :1].cpu())  # synchronizes the device


def certificate(
    teacher_pass: TeacherPass, cache: TeacherCache, console: Console
) -> dict[str, float]:
    """Measure the certificate of a complete cache; {} if nothing that the config requests is
    reduced.

    An existing certificate of as many records as would be compared now is kept.
    """
    asked = {tap: cache.taps[tap] for tap in teacher_pass.setup.tap_names}
    reduced = {tap: spec for tap, spec in asked.items() if is_reduced(spec)}
    if not reduced:
        return {}
    blocks = certified_blocks(cache.manifest.blocks(cache.num_views))
    num_records = sum(block.rows for block in blocks)
    before = certificate_in(cache.measured)
    if before.get(RECORDS, 0) >= num_records:
        return before
    console.print(f"comparing {counted(num_records, 'stored record')} with the full outputs")
    comparison, taps = Comparison(), taps_stored(reduced)
    for block in blocks:
        full = teacher_pass.records(block.view, np.arange(block.start, block.stop), taps)
        whole = cache.manifest.block(block.view, block.index)
        comparison.add(
            {tap: full[tap].float().cpu().numpy() for tap in reduced},
            {tap: each[: block.rows] for tap, each in cache.read_block(whole, [*reduced]).items()},
        )
    return before | comparison.figures()
