"""Fill a cache view by view while a student trains on it.

The blocks, the writer, the evaluation cache and the measurements are those of a pass, so the
finished cache equals a pass's, beyond float rounding in the teacher. The first block of view 0 is
computed before the training starts: students are built from its records. The writer's lock is held
only while blocks are committed. If another process holds it, the view is read as soon as that
process has committed it, or added when the lock is free.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor

from teach_once.nets.teacher.taps import taps_stored
from teach_once.precompute.compute.blocks import run_blocks
from teach_once.precompute.compute.setup import Setup, open_evaluated
from teach_once.precompute.compute.spool import remove_spools
from teach_once.precompute.compute.teacher_pass import PassOptions, TeacherPass
from teach_once.precompute.run_pass import fill_evaluation, measured, naming_changed_files
from teach_once.runtime.command.signals import StopRequest
from teach_once.runtime.errors import Stopped
from teach_once.runtime.machine.resources import free_memory
from teach_once.store import CacheContent, TeacherCache
from teach_once.store.errors import (
    CacheBusy,
    CacheError,
    CacheIncomplete,
    CacheMissing,
    UnknownTap,
    UnknownView,
)
from teach_once.store.format.manifest import Manifest
from teach_once.store.format.spec import SAMPLE_DIGEST, TapSpec
from teach_once.store.read.source import open_source
from teach_once.store.write.destination import Destination, open_destination
from teach_once.store.write.pending_blocks import Work
from teach_once.views.pixels.batches import ViewBatch

_POLL_SECONDS = 0.5  # between two attempts while another process writes
_MEMORY_FRACTION = 0.25  # fraction of the free memory that the records of one view may use


class CacheFiller:
    """Adds views to one cache: a `train.outputs.filling_teacher.ViewFiller`."""

    def __init__(self, setup: Setup, options: PassOptions, console: Console) -> None:
        self._setup, self._options, self._console = setup, options, console
        self._pass: TeacherPass | None = None
        self._content: CacheContent | None = None
        self._manifest: Manifest | None = None
        self._collected: CollectedView | None = None
        self._digests: NDArray[np.uint8] | None = None
        self._is_started = False
        self._images, self._seconds = 0, 0.0

    @property
    def path(self) -> Path:
        return self._setup.path

    def start(self) -> None:
        """Create the cache, or resume it: repair its complete views, and add its first block.

        Also computes the teacher's outputs of the test images. If another process does all that,
        waits for it. Raises CacheError, DatasetError, ArchError or Stopped.
        """
        try:
            num_views = open_source(self.path).coverage.num_complete_views()
        except CacheError:
            num_views = 0
        self._write(min(num_views, self._setup.config.views.num_views) - 1)
        self._is_started = True

    @property
    def taps(self) -> dict[str, TapSpec]:
        """The taps of every view that is added."""
        assert self._manifest is not None
        return {tap: self._manifest.taps[tap] for tap in self._setup.tap_names}

    def digests(self) -> NDArray[np.uint8] | None:
        """Return the digests of all samples, (N, 16) uint8; None until view 0 is complete."""
        if self._digests is None and (cache := self.opened(0)) is not None:
            self._digests = cache.sample_digest
        return self._digests

    def opened(self, view: int) -> TeacherCache | None:
        """Return the cache with views 0 to `view`; None if it lacks one."""
        try:
            return TeacherCache.open(self.path, num_views=view + 1, taps=self._setup.tap_names)
        except (CacheMissing, CacheIncomplete, UnknownTap, UnknownView):
            return None

    def complete(self, view: int) -> TeacherCache:
        """Commit everything that views 0 to `view` lack; returns the cache with these views.

        Raises CacheError, DatasetError or Stopped.
        """
        self._write(view)
        self._collected = None
        return TeacherCache.open(self.path, num_views=view + 1, taps=self._setup.tap_names)

    def begin(self, view: int, taps: Sequence[str]) -> bool:
        """Start to collect a view batch by batch; returns False if that is impossible.

        taps: taps that the run reads. Their values as stored must not depend on other samples.
        """
        assert self._manifest is not None
        specs = self._manifest.taps
        if any(specs[tap].scale or specs[tap].top for tap in taps):
            return False
        if CollectedView.num_bytes(self._manifest) > _MEMORY_FRACTION * free_memory():
            return False
        self._collected = CollectedView(view, self._manifest)
        return True

    def outputs(self, batch: ViewBatch) -> Mapping[str, Tensor]:
        """Run the teacher on a batch of the view and keep its outputs; returns them as stored."""
        assert self._collected is not None
        assert self._manifest is not None
        specs = self._manifest.taps
        teacher = self._teacher_pass().teacher
        values = teacher.outputs(batch.inputs, batch.labels, taps_stored(specs))
        self._collected.add(batch, {tap: each.cpu().numpy() for tap, each in values.items()})
        return {
            tap: each.to(getattr(torch, specs[tap].read_dtype), copy=True)  # not an inference one
            for tap, each in values.items()
        }

    def _teacher_pass(self) -> TeacherPass:
        if self._pass is None:
            self._pass = TeacherPass(self._setup, self._options)
        return self._pass

    def _write(self, view: int) -> None:
        """Commit the first block and what views 0 to `view` lack, unless another process does.

        view: -1 for the first block only.
        """
        teacher_pass, is_waiting = self._teacher_pass(), False
        self._content = content = self._content or teacher_pass.content()
        with StopRequest() as stop, naming_changed_files(self._setup):
            while True:
                try:
                    with open_destination(
                        self.path,
                        content,
                        spool_folder=teacher_pass.folder,
                        block_rows=self._options.block_rows,
                        check_every_byte=self._options.check_every_byte and not self._is_started,
                    ) as writer:
                        self._commit(writer, view, stop)
                        return
                except CacheBusy:
                    if self._is_written(view):
                        return
                    if not is_waiting:
                        self._console.print(f"waiting for another process, which fills {self.path}")
                    is_waiting = True
                if stop.signal_number is not None:
                    raise Stopped(stop.signal_number, "stopped while another process fills a view")
                time.sleep(_POLL_SECONDS)

    def _is_written(self, view: int) -> bool:
        """Return True if another process has committed views 0 to `view`, and at least view 0.

        At the start, it must also have added the teacher's outputs of the test images.
        """
        if (cache := self.opened(max(view, 0))) is None:
            return False
        self._manifest = cache.manifest
        return self._is_started or open_evaluated(self._setup, every_byte=False) is not None

    def _commit(self, writer: Destination, view: int, stop: StopRequest) -> None:
        """Commit the first block and the views up to `view`; finish the cache with the last one."""
        teacher_pass, self._manifest = self._teacher_pass(), writer.manifest
        if not self._is_started:
            writer.refuse_if_too_full(writer.work)
        work = [
            item
            for item in writer.work
            if item.block.view <= view or (item.block.view, item.block.index) == (0, 0)
        ]
        computed = [item for item in work if not self._has_collected(item)]
        started = time.perf_counter()
        if computed:
            self._images += run_blocks(teacher_pass, writer, computed, stop, self._console)
            self._seconds += time.perf_counter() - started
        for item in work:
            if self._collected is not None and self._has_collected(item):
                writer.write_block(item.block, self._collected.records(item, teacher_pass))
        if not self._is_started:
            fill_evaluation(teacher_pass, stop, self._console)
        if len(work) == len(writer.work):
            rate = self._images / max(self._seconds, 1e-9)
            last = writer.manifest.measured.get("images_per_second", 0.0)
            writer.finish(measured(teacher_pass, rate or last, stop, self._console))
            for folder in writer.unused_spool_folders():
                remove_spools(folder)
            self._pass = None  # the teacher is not needed any more

    def _has_collected(self, item: Work) -> bool:
        return self._collected is not None and self._collected.view == item.block.view


class CollectedView:
    """The records of one view in host memory, collected in any order of samples."""

    def __init__(self, view: int, manifest: Manifest) -> None:
        self.view, self._taps = view, taps_stored(manifest.taps)
        self._records: dict[str, NDArray[Any]] = {
            tap: np.empty((manifest.num_samples, *spec.shape), spec.read_dtype)
            for tap, spec in manifest.stored.items()
        }
        self._is_there = np.zeros(manifest.num_samples, bool)

    @staticmethod
    def num_bytes(manifest: Manifest) -> int:
        """Return the bytes of one view's records as they are read."""
        return manifest.num_samples * sum(
            np.dtype(spec.read_dtype).itemsize * math.prod(spec.shape)
            for spec in manifest.stored.values()
        )

    def add(self, batch: ViewBatch, values: Mapping[str, NDArray[Any]]) -> None:
        """Keep the taps of a batch: name -> (B, ...) on the host."""
        assert batch.view == self.view
        assert batch.digests is not None
        self._keep(batch.host_ids.numpy(), {**values, SAMPLE_DIGEST: batch.digests})

    def records(self, item: Work, teacher_pass: TeacherPass) -> dict[str, NDArray[Any]]:
        """Return the records of a block; computes those of samples that no batch contained."""
        ids = np.arange(item.block.start, item.block.stop)
        lacking = ids[~self._is_there[ids]]
        if len(lacking):
            found = teacher_pass.records(self.view, lacking, self._taps)
            self._keep(lacking, {tap: each.cpu().numpy() for tap, each in found.items()})
        return {tap: self._records[tap][ids] for tap in item.taps}

    def _keep(self, ids: NDArray[np.int64], values: Mapping[str, NDArray[Any]]) -> None:
        with np.errstate(over="ignore"):  # the writer rejects values that are not finite
            for tap, each in values.items():
                self._records[tap][ids] = each
        self._is_there[ids] = True
