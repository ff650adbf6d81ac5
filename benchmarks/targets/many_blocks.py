"""python -m benchmarks many_blocks [--blocks 1000000] [--views 50]

What a pass of very many blocks costs without its teacher: a cache of so many blocks with nothing in
them goes through the queue of a Ray cluster of this machine's cores, and each is committed to an
object store in memory (`synthetic.object_server`) as a pass commits it. Then the driver looks at
what is there, puts the whole journal, and the cache is opened. Needs Ray; a million blocks take
some ten minutes on two cores, and about 2 GB for the store.
"""

from __future__ import annotations

import io
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from rich.console import Console

from benchmarks.harness import machine, markdown, parser_of, write_json, write_section
from benchmarks.synthetic.object_server import object_server
from teach_once.precompute.compute.blocks import Groups
from teach_once.precompute.ray_driver import Queue
from teach_once.runtime.command.progress import Progress
from teach_once.runtime.command.ray import Cluster
from teach_once.runtime.command.signals import StopRequest
from teach_once.runtime.machine.urls import path_or_url
from teach_once.store import CacheContent, TapSpec, TeacherCache
from teach_once.store.identity import identity_sha256
from teach_once.store.write.destination import (
    Destination,
    Handout,
    handout_of,
    open_destination,
    writer_on_node,
)
from teach_once.store.write.pending_blocks import Work

Result = TypeVar("Result")
Row = list[str]
_TITLE = "A pass of very many blocks"
_IDENTITY = {"empty": True}


def commit_empty(folder: Path, handout: Handout, group: list[Work]) -> list[Any]:
    """A worker's task: commit blocks of zeros."""
    writer = writer_on_node(handout, group, folder)
    for item in group:
        writer.write_block(item.block, {"correct": np.zeros(item.block.rows, np.uint8)})
    return []


def do_nothing(group: list[Work]) -> list[Any]:
    """A worker's task that costs only the queue."""
    return []


def content(num_blocks: int, num_views: int) -> CacheContent:
    """Of blocks of one sample and one byte."""
    return CacheContent(
        teacher="empty",
        identity=_IDENTITY,
        taps={"correct": TapSpec((), "uint8")},
        labels=np.zeros(num_blocks // num_views, np.int64),
        num_views=num_views,
        class_names=["0"],
        canary={},
        preview=np.zeros((1, 1, 1, 1), np.uint8),
        versions={},
    )


def timed(call: Callable[[], Result]) -> tuple[Result, float, float]:
    """The result, seconds, and CPU seconds of this process."""
    started, cpu = time.perf_counter(), time.process_time()
    result = call()
    return result, time.perf_counter() - started, time.process_time() - cpu


def megabytes() -> float:
    """The most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class Simulation:
    """One cache, from its begin to being opened. rows: what was measured, for the table."""

    def __init__(self, url: str, num_blocks: int, num_views: int, folder: Path) -> None:
        name = f"empty-{identity_sha256(_IDENTITY)[:8]}"
        self._path = path_or_url(f"{url}/caches/{name}")
        self._content = content(num_blocks, num_views)
        self._num_blocks, self._num_views, self._folder = num_blocks, num_views, folder
        self.rows: list[Row] = []

    def run(self, cluster: Cluster) -> None:
        writer, *times = timed(
            lambda: open_destination(
                self._path, self._content, spool_folder=self._folder, block_rows=1
            )
        )
        self._note("open the writer, list all blocks", times)
        with writer:
            self._queue(cluster, writer, "queue alone", do_nothing)
            given = (self._folder, handout_of(writer))
            self._queue(cluster, writer, "queue and commit", commit_empty, *given)
            left, *times = timed(writer.left_over)
            assert not left, f"{len(left)} blocks are missing"
            self._note("read every line, put the whole journal", times)
        cache, *times = timed(lambda: TeacherCache.open(self._path))
        assert cache.num_views == self._num_views
        self._note("open the finished cache", times)

    def _queue(
        self, cluster: Cluster, writer: Destination, what: str, function: Any, *given: Any
    ) -> None:
        work = writer.work
        queue = Queue(cluster, function, given, writer, len(work))
        groups = Groups(work)

        def run() -> None:
            with (
                Progress(len(work), "blocks", Console(stderr=True)) as progress,
                StopRequest() as stop,
            ):
                queue.run(iter(lambda: groups.next(self._num_views), []), progress, stop)

        _, *times = timed(run)
        self._note(what, times)

    def _note(self, what: str, times: list[float]) -> None:
        seconds, cpu = times
        rate = self._num_blocks / seconds
        self.rows.append(
            [what, f"{seconds:,.1f}", f"{cpu:,.1f}", f"{rate:,.0f}", f"{megabytes():,.0f}"]
        )
        print(self.rows[-1], file=sys.stderr)


def main(arguments: list[str]) -> int:
    parser = parser_of("many_blocks", __doc__)
    parser.add_argument("--blocks", type=int, default=1_000_000)
    parser.add_argument("--views", type=int, default=50)
    options = parser.parse_args(arguments)
    quiet = Console(file=io.StringIO())
    with object_server() as url, tempfile.TemporaryDirectory() as folder:
        simulation = Simulation(url, options.blocks, options.views, Path(folder))
        with Cluster("local", quiet, cpus=1, gpus=0) as cluster:
            workers = cluster.format_workers()
            simulation.run(cluster)
    header = ["", "seconds", "of the driver's CPU", "blocks/s", "driver's memory so far, MB"]
    text = (
        f"`python -m benchmarks many_blocks`: {options.blocks:,} blocks of one byte in tasks of "
        f"{options.views}; {workers} on {machine()}, "
        f"which also runs the driver and the store.\n\n{markdown(header, simulation.rows)}"
    )
    print(text)
    write_section(options.docs, _TITLE, text)
    write_json(options.json, simulation.rows)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
