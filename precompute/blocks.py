"""Computes blocks and commits them behind the compute, until the work is done or a signal comes.

Images on the device: block by block. Images that must be decoded: all views of the same samples
together, so that each image is decoded once; their records are spooled as they come.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from nets.taps import taps_stored
from precompute.background import BackgroundWriter, BlockWriter
from precompute.groups import Groups
from precompute.spool import Layout, Spool, spooled_start
from precompute.teacher_pass import TeacherPass
from runtime.errors import Stopped
from runtime.progress import Progress
from runtime.signals import StopRequest
from store.identity import identity_sha256
from store.layout import SAMPLE_CRC, Block
from store.work import Work

_SECONDS_TO_FINISH = 10.0  # a block that needs longer is given up when the pass is stopped


def run_blocks(
    teacher_pass: TeacherPass,
    writer: BlockWriter,
    work: Sequence[Work],
    stop: StopRequest,
    console: Console,
) -> int:
    """Compute and commit these blocks; returns the number of images. Raises Stopped, CacheError."""
    writer.refuse_if_too_full(work)
    total = sum(item.block.rows for item in work)
    groups, views = Groups(_begun_first(writer, work)), teacher_pass.views_per_reading
    with Progress(total, "images", console) as progress, BackgroundWriter(writer) as behind:
        pass_ = _Pass(teacher_pass, writer, stop, progress, behind, len(work))
        while group := groups.next(views):
            group = pass_.outstanding(group)
            if not group:
                continue
            if teacher_pass.pixels.is_streamed:
                pass_.run_group(group)
            else:
                pass_.run_block(group[0])
    return total - pass_.skipped


def _begun_first(writer: BlockWriter, work: Sequence[Work]) -> list[Work]:
    """The same, those first of which an earlier process has left records here."""
    start = spooled_start(writer.spool_folder, writer.rank)
    return sorted(work, key=lambda item: item.block.start != start)


class _Pass:
    """One call of `run_blocks`."""

    def __init__(
        self,
        teacher_pass: TeacherPass,
        writer: BlockWriter,
        stop: StopRequest,
        progress: Progress,
        behind: BackgroundWriter,
        num_blocks: int,
    ) -> None:
        self._teacher_pass, self._writer, self._stop = teacher_pass, writer, stop
        self._progress, self._behind = progress, behind
        self._done, self._num_blocks = 0, num_blocks
        self.skipped = 0  # images of blocks that other writers have committed meanwhile
        self._taps = taps_stored(writer.manifest.taps)

    def outstanding(self, group: Sequence[Work]) -> list[Work]:
        """Those blocks that are still to be computed."""
        left = self._writer.outstanding(group)
        num_skipped = sum(item.block.rows for item in group) - sum(i.block.rows for i in left)
        self.skipped += num_skipped
        self._progress.skip(num_skipped)
        self._done += len(group) - len(left)
        return left

    def run_block(self, item: Work) -> None:
        """Compute one block and queue it for writing."""
        self._refuse_if_stopped()
        block, taps = item.block, self._asked(item)
        parts: list[dict[str, Tensor]] = []
        left = block.rows
        for _, values in self._teacher_pass.batches([block.view], _ids(block), self._taps):
            parts.append({tap: values[tap] for tap in taps})
            left -= len(values[taps[0]])
            self._progress.advance(len(values[taps[0]]))
            self._refuse_if_stopped(left / max(self._progress.rate, 1e-9))
        self._behind.write(block, {tap: torch.cat([p[tap] for p in parts]) for tap in taps})
        self._done += 1

    def run_group(self, group: Sequence[Work]) -> None:
        """Compute blocks of the same samples, image by image, and queue them for writing.

        What an earlier process spooled of them is not computed again.
        """
        self._refuse_if_stopped()
        block, taps = group[0].block, self._asked(group[0])
        views = [item.block.view for item in group]
        spool = Spool(self._writer.spool_folder, self._writer.rank, self._layout(group, taps))
        self._progress.skip(spool.rows_done * len(group))
        ids = _ids(block)[spool.rows_done :]
        done = spool.rows_done
        for parts in self._teacher_pass.readings(views, ids, self._taps):
            some = {view: {tap: values[tap] for tap in taps} for view, values in parts.items()}
            self._behind.spool(spool, some)
            rows = len(parts[views[0]][taps[0]])
            done += rows
            self._progress.advance(rows * len(views))
            if done < block.rows:
                self._refuse_if_stopped(saved=done)
        self._behind.write_group(spool, [Work(item.block, taps) for item in group])
        self._done += len(group)

    def _asked(self, item: Work) -> tuple[str, ...]:
        """The taps to compute; with the samples' checksums, so that they are compared."""
        if self._writer.manifest.sample_crc32c and SAMPLE_CRC not in item.taps:
            return (*item.taps, SAMPLE_CRC)
        return item.taps

    def _layout(self, group: Sequence[Work], taps: Sequence[str]) -> Layout:
        manifest = self._writer.manifest
        specs = ((tap, manifest.stored[tap]) for tap in taps)
        return Layout(
            identity_sha256(manifest.identity),
            group[0].block.start,
            group[0].block.rows,
            tuple(item.block.view for item in group),
            tuple((tap, spec.read_dtype, tuple(spec.shape)) for tap, spec in specs),
        )

    def _refuse_if_stopped(self, seconds_left: float = math.inf, saved: int = 0) -> None:
        if self._stop.signal_number is not None and seconds_left > _SECONDS_TO_FINISH:
            also = f", and {saved:,} samples of the next" if saved else ""
            raise Stopped(
                self._stop.signal_number,
                f"stopped after {self._done:,} of {self._num_blocks:,} blocks, which are "
                f"saved{also}; the same command resumes",
            )


def _ids(block: Block) -> np.ndarray:
    return np.arange(block.start, block.stop)
