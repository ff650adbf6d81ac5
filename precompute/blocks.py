"""Computes blocks and commits them behind the compute, until the work is done or a signal comes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from nets.taps import taps_stored
from precompute.background import BackgroundWriter
from precompute.teacher_pass import TeacherPass
from runtime.errors import Stopped
from runtime.progress import Progress
from runtime.signals import StopRequest
from store import CacheWriter
from store.layout import SAMPLE_CRC
from store.work import Work

MOST_VIEWS_PER_READING = 8  # more would gain little and hold more blocks in memory
GROUP_SECONDS = 60.0
_SECONDS_TO_FINISH = 10.0  # a block that needs longer is given up when the pass is stopped


def run_blocks(
    teacher_pass: TeacherPass,
    writer: CacheWriter,
    work: Sequence[Work],
    stop: StopRequest,
    console: Console,
) -> int:
    """Compute and commit these blocks; returns the number of images. Raises Stopped, CacheError."""
    writer.refuse_if_too_full(work)
    total = sum(item.block.rows for item in work)
    done = 0
    with Progress(total, "images", console) as progress, BackgroundWriter(writer) as behind:

        def refuse_if_stopped(seconds_left: float = math.inf) -> None:
            if stop.signal_number is not None and seconds_left > _SECONDS_TO_FINISH:
                raise Stopped(
                    stop.signal_number,
                    f"stopped after {done:,} of {len(work):,} blocks, which are saved; "
                    f"the same command resumes",
                )

        waiting = list(work)
        while waiting:
            refuse_if_stopped()
            group = next_group(teacher_pass, waiting, progress.rate)
            blocks = _group_records(teacher_pass, writer, group, progress, refuse_if_stopped)
            for item, records in zip(group, blocks, strict=True):
                behind.write(item.block, records)
                waiting.remove(item)
                done += 1
    return total


def next_group(teacher_pass: TeacherPass, waiting: Sequence[Work], rate: float) -> list[Work]:
    """The first block of `waiting`; where images must be decoded, with more views of its samples.

    As many views as take about a minute at `rate` images per second, at most eight: that much is
    lost when the pass is killed, and only an eighth of the decoding remains.
    """
    first = waiting[0]
    if not teacher_pass.pixels.is_streamed:
        return [first]
    same = [
        item for item in waiting if (item.block.start, item.taps) == (first.block.start, first.taps)
    ]
    affordable = int(GROUP_SECONDS * rate / first.block.rows)
    return same[: min(max(affordable, 1), MOST_VIEWS_PER_READING)]


def _group_records(
    teacher_pass: TeacherPass,
    writer: CacheWriter,
    group: Sequence[Work],
    progress: Progress,
    refuse_if_stopped: Callable[[float], None],
) -> list[dict[str, Tensor]]:
    """The taps of each block that are to be written, on the device."""
    block, taps, stored = group[0].block, group[0].taps, taps_stored(writer.manifest.taps)
    if writer.manifest.sample_crc32c and SAMPLE_CRC not in taps:
        taps = (*taps, SAMPLE_CRC)  # so that they are compared
    parts: dict[int, list[dict[str, Tensor]]] = {item.block.view: [] for item in group}
    ids = np.arange(block.start, block.start + block.rows)
    left = len(group) * block.rows
    for view, values in teacher_pass.batches(list(parts), ids, stored):
        parts[view].append({tap: values[tap] for tap in taps})
        left -= len(values["correct"])
        progress.advance(len(values["correct"]))
        refuse_if_stopped(left / max(progress.rate, 1e-9))
    return [
        {tap: torch.cat([part[tap] for part in of_view]) for tap in taps}
        for of_view in parts.values()
    ]
