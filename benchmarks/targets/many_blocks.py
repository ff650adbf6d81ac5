"""python -m benchmarks many_blocks [--blocks 1000000] [--views 50]

The cost of a pass of very many blocks without its teacher. Blocks of one byte go through the queue
of a Ray cluster of this machine's cores, and workers commit each to an object store in memory
(`synthetic.object_server`) as in a pass. Then the driver lists the stored objects, puts the whole
journal, and opens the cache. Needs Ray; a million blocks take some ten minutes on two cores, and
about 2 GB for the store.
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

from benchmarks.harness import Findings, markdown
from benchmarks.synthetic.caches import content_of, no_digests
from benchmarks.synthetic.object_server import object_server
from teach_once.precompute.compute.queue import BlockQueue
from teach_once.precompute.ray_driver import BlockTasks
from teach_once.runtime.command.progress import Progress
from teach_once.runtime.command.ray import Cluster
from teach_once.runtime.command.signals import StopRequest
from teach_once.runtime.machine.urls import path_or_url
from teach_once.store import TapSpec, TeacherCache
from teach_once.store.identity import identity_sha256
from teach_once.store.write import destination
from teach_once.store.write.pending_blocks import Work

TITLE = "A pass of very many blocks"
Result = TypeVar("Result")
_IDENTITY: dict[str, object] = {"empty": True}
_TAPS = {"correct": TapSpec((), "uint8")}


def measure(blocks: int = 1_000_000, views: int = 50) -> Findings:
    rows: list[list[str]] = []
    with (
        object_server() as url,
        tempfile.TemporaryDirectory() as folder,
        Cluster("local", Console(file=io.StringIO()), cpus=1, gpus=0) as cluster,
    ):
        workers = cluster.format_workers()
        simulate(cluster, url, blocks, views, Path(folder), rows)
    header = ["", "seconds", "of the driver's CPU", "blocks/s", "driver's memory so far, MB"]
    text = f": {blocks:,} blocks of one byte in tasks of {views}; {workers} on this machine, which "
    text += f"also runs the driver and the store.\n\n{markdown(header, rows)}"
    return Findings(text, content=rows)


def commit_empty(folder: Path, handout: destination.Handout, group: list[Work]) -> list[Any]:
    """Commit blocks of zeros: a worker's task."""
    writer = destination.writer_on_node(handout, group, folder)
    for item in group:
        zeros = {"correct": np.zeros(item.block.rows, np.uint8)}
        writer.write_block(item.block, {**zeros, **no_digests(item)})
    return []


def do_nothing(group: list[Work]) -> list[Any]:
    """Return nothing: a worker's task that measures only the queue."""
    return []


def simulate(
    cluster: Cluster, url: str, num_blocks: int, num_views: int, folder: Path, rows: list[list[str]]
) -> None:
    """Simulate the pass of one cache and append a row for each part to `rows`."""

    def timed(what: str, call: Callable[[], Result]) -> Result:
        started, cpu_started = time.perf_counter(), time.process_time()
        result = call()
        seconds, cpu = time.perf_counter() - started, time.process_time() - cpu_started
        megabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        rate = num_blocks / seconds
        rows.append([what, f"{seconds:,.1f}", f"{cpu:,.1f}", f"{rate:,.0f}", f"{megabytes:,.0f}"])
        print(rows[-1], file=sys.stderr)
        return result

    def run(function: Callable[..., list[Any]], *given: object) -> None:
        work, console = writer.work, Console(stderr=True)
        with Progress(len(work), "blocks", console) as progress, StopRequest() as stop:
            tasks = BlockTasks(cluster, function, given, writer)
            tasks.run(BlockQueue(work, num_views), progress, stop)

    path = path_or_url(f"{url}/caches/bench-{identity_sha256(_IDENTITY)[:8]}")
    content = content_of(_TAPS, num_blocks // num_views, num_views, 1, _IDENTITY)
    writer = timed(
        "open the writer, list all blocks",
        lambda: destination.open_destination(path, content, spool_folder=folder, block_rows=1),
    )
    with writer:
        timed("queue alone", lambda: run(do_nothing))
        handout = destination.handout_of(writer)
        timed("queue and commit", lambda: run(commit_empty, folder, handout))
        left = timed("read every line, put the whole journal", writer.left_over)
        assert not left, f"{len(left)} blocks are missing"
    cache = timed("open the finished cache", lambda: TeacherCache.open(path))
    assert cache.num_views == num_views
