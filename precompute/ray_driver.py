"""Fill a cache on a Ray cluster: nodes compute blocks, and this process, the driver, commits them.

With a cache on an object store, each node commits its own blocks, and the driver counts them.

A task is a group of blocks: some views of the same samples. Enough tasks are queued to keep every
worker busy. Only the driver has the cache's lock and appends to its journal. If a process dies or a
block is computed twice, committed blocks stay intact, and the same command continues from them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console

from teach_once.precompute import ray_worker as on_node
from teach_once.precompute.compute.queue import BlockQueue, Rounds
from teach_once.precompute.compute.setup import Setup
from teach_once.precompute.compute.spool import remove_spools
from teach_once.precompute.compute.teacher_pass import PassOptions, TeacherPass
from teach_once.precompute.plan import Plan, planned
from teach_once.precompute.ray_worker import Pace, PassRecipe
from teach_once.precompute.run_pass import (
    TRIAL_RECORDS,
    check_disk_space,
    naming_changed_files,
    open_filled,
    without_carried,
)
from teach_once.runtime.command.progress import Progress
from teach_once.runtime.command.ray import Cluster, Ref, raise_failure
from teach_once.runtime.command.signals import StopRequest
from teach_once.runtime.errors import Stopped
from teach_once.store import CacheContent, CacheWriter, TeacherCache
from teach_once.store.write.destination import Destination, handout_of, open_destination
from teach_once.store.write.pending_blocks import Work
from teach_once.store.write.staging import Written

_QUEUED_PER_WORKER = 2  # tasks: one running, one waiting
_POLL_SECONDS = 0.2
_SECONDS_TO_FINISH = 10.0  # a task that takes longer is abandoned when the pass is stopped


class ClusterFill:
    """A pass on a cluster.

    options: its device is the device of this process, which computes little. device: of the
    workers.
    """

    def __init__(
        self, setup: Setup, options: PassOptions, cluster: Cluster, device: str, console: Console
    ) -> None:
        self._setup, self._options, self._cluster = setup, options, cluster
        self._console = console
        if device == "auto" and not cluster.resources.gpus:
            device = "cpu"
        self._recipe = PassRecipe(
            setup.config,
            setup.path.parent,
            setup.identity,
            device,
            options.num_workers,
            options.spool,
        )
        self._teacher_pass = TeacherPass(setup, options)
        self._pace = Pace(self._teacher_pass.batch_size)

    def plan(self) -> Plan:
        """Plan what `run` would do; writes nothing."""
        return self._planned(self._teacher_pass.content())

    def run(self) -> TeacherCache:
        """Create, resume and complete the cache; returns it open.

        Raises ClusterError, also for an error of a worker; CacheError, DatasetError or Stopped.
        """
        setup, content = self._setup, self._teacher_pass.content()
        plan = self._planned(content)
        self._console.print(plan.table(setup.path))
        check_disk_space(plan, setup)
        with (
            StopRequest() as stop,
            open_destination(
                setup.path,
                content,
                spool_folder=self._teacher_pass.folder,
                block_rows=self._options.block_rows,
                check_every_byte=self._options.check_every_byte,
            ) as writer,
            naming_changed_files(setup),
        ):
            started, images = time.perf_counter(), 0
            if isinstance(writer, CacheWriter):
                remove_spools(
                    writer.path, nobody_resumes=True
                )  # spools of an earlier driver's workers
            own = without_carried(self._teacher_pass, writer, self._console)
            for work in Rounds(setup.path, writer, own):
                images += self._run_blocks(writer, work, stop)
            seconds = time.perf_counter() - started
            last = writer.manifest.measured.get("images_per_second", 0.0)
            rate = images / seconds or last
            task = self._cluster.submit(on_node.measured_of_pass, self._recipe, rate)
            writer.finish(self._cluster.wait_for(task))
            if isinstance(writer, CacheWriter):
                writer.remove_asides()
            for folder in writer.unused_spool_folders():
                remove_spools(folder)
        return open_filled(setup)

    def _planned(self, content: CacheContent) -> Plan:
        device = self._cluster.format_workers()
        return planned(self._teacher_pass, content, self._measured_rate, device)

    def _measured_rate(self, num_records: int) -> float:
        """Return the images per second of all workers, measured by one of them."""
        size = self._options.batch_size
        if size is None and num_records < TRIAL_RECORDS:
            size = self._pace.batch_size
        task = self._cluster.submit(on_node.measured_pace, self._recipe, size)
        self._pace = self._cluster.wait_for(task)
        return self._pace.images_per_second * self._cluster.num_workers

    def _run_blocks(self, writer: Destination, work: Sequence[Work], stop: StopRequest) -> int:
        """Let workers compute these blocks and commit them; returns the number of images."""
        writer.refuse_if_too_full(work)
        blocks = BlockQueue(work, self._teacher_pass.views_per_reading)
        given = (self._recipe, handout_of(writer), self._pace)
        tasks = BlockTasks(self._cluster, on_node.compute, given, writer)
        with Progress(blocks.num_images, "images", self._console) as progress:
            tasks.run(blocks, progress, stop)
        return blocks.num_images


class BlockTasks:
    """Tasks of a cluster that compute the blocks of a queue.

    compute: called in a worker with the arguments `given` and a group of blocks; returns the blocks
    that `writer` must commit.
    """

    def __init__(
        self,
        cluster: Cluster,
        compute: Callable[..., list[Written]],
        given: tuple[Any, ...],
        writer: Destination,
    ) -> None:
        self._cluster, self._writer = cluster, writer
        self._compute, self._given = compute, given
        self._queued: dict[Ref, list[Work]] = {}
        self._done = 0

    def run(self, blocks: BlockQueue, progress: Progress, stop: StopRequest) -> None:
        """Keep all workers busy until every group is committed."""
        try:
            while True:
                progress.note = f" on {self._cluster.format_workers()}"
                self._fill_up(blocks)
                if not self._queued:
                    return
                self._commit_done(progress)
                if stop.signal_number is not None:
                    self._stop(stop.signal_number, blocks.num_blocks, progress)
        finally:
            self._cluster.cancel(self._queued, at_once=True)

    def _fill_up(self, blocks: BlockQueue) -> None:
        most = _QUEUED_PER_WORKER * max(self._cluster.num_workers, 1)
        while len(self._queued) < most and (group := blocks.take()):
            task = self._cluster.submit(self._compute, *self._given, group)
            self._queued[task] = group

    def _commit_done(self, progress: Progress) -> None:
        for task in self._cluster.done(self._queued, _POLL_SECONDS):
            group = self._queued.pop(task)
            for written in raise_failure(self._cluster.result(task)):
                assert isinstance(self._writer, CacheWriter)
                self._writer.commit_written(written)
            self._done += len(group)
            progress.advance(sum(item.block.rows for item in group))

    def _stop(self, signal_number: int, num_blocks: int, progress: Progress) -> None:
        """Commit blocks that finish within a few seconds. Raises Stopped."""
        until = time.monotonic() + _SECONDS_TO_FINISH
        while self._queued and time.monotonic() < until:
            self._commit_done(progress)
        raise Stopped(
            signal_number,
            f"stopped after {self._done:,} of {num_blocks:,} blocks, which are saved; the "
            f"same command resumes",
        )
