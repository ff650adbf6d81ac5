"""What grows with the number of samples: reading, epochs, scheduling, opening, memory."""

from __future__ import annotations

import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.harness import Timing, interleaved
from benchmarks.synthetic.scale_study import ScaleStudy
from teach_once.precompute.compute.blocks import Groups
from teach_once.store import TeacherCache
from teach_once.store.format.spec import Block
from teach_once.store.write.pending_blocks import Work
from teach_once.train.engine.step import active_terms, epoch_steps, start_epoch
from teach_once.train.engine.train_state import capture_maps
from teach_once.train.sessions.student import open_context
from teach_once.views.augment.parameters import view_of_epoch
from teach_once.views.pixels.batches import Pixels
from teach_once.views.pixels.resident import open_pixels
from teach_once.views.seeds import permutation

ROOT = Path(__file__).parent.parent.parent
CPU = torch.device("cpu")
BATCH_SIZE = 64
_DEADLINE_SECONDS = 300.0
BLOCK_ROWS = 4096
_UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
Sizes = tuple[ScaleStudy, ScaleStudy]  # small, large


def worker_rates(sizes: Sizes, num_images: int, rounds: int) -> dict[str, tuple[Timing, Timing]]:
    """Seconds for a window of `num_images` samples: stage, views, mixing -> (small, large).

    Stage 1 reads neighbours, all views of an image from one decoding; stage 2 samples from anywhere
    and one view. One worker; from the first batch that is asked for to the last.
    """
    rows: dict[str, Callable[[], object]] = {}
    for mixes in (False, True):
        also = "mixed" if mixes else "not mixed"
        for index, size in enumerate(sizes):
            setup = size.setup(mixes)
            config, train = setup.config, setup.dataset.train
            pixels = open_pixels(
                train, config.views, config.dataset.normalisation, CPU, num_workers=1
            )
            count = min(num_images, len(train))
            anywhere = permutation(0, 1, len(train))[:count]

            rows[f"{index} stage 1, 1 view, {also}"] = _reader(pixels, 1, np.arange(count))
            rows[f"{index} stage 1, 8 views, {also}"] = _reader(pixels, 8, np.arange(count))
            rows[f"{index} stage 2, 1 view, {also}"] = _reader(pixels, 1, anywhere)
    timings = interleaved(_side_by_side(rows), rounds)
    return {name[2:]: (timings[name], timings[f"1 {name[2:]}"]) for name in rows if name[0] == "0"}


def _reader(pixels: Pixels, num_views: int, ids: NDArray[np.int64]) -> Callable[[], None]:
    def run() -> None:
        for _ in pixels.batches(range(num_views), ids, BATCH_SIZE):
            pass

    return run


def _side_by_side(rows: dict[str, Callable[[], object]]) -> dict[str, Callable[[], object]]:
    """Both sizes of a row one after the other."""
    return dict(sorted(rows.items(), key=lambda row: (row[0][2:], row[0])))


def seconds_to_start_epochs(size: ScaleStudy, epochs: range) -> list[float]:
    """From the end of an epoch's steps to the end of the first step of the next one."""
    run = size.study().run("cd", 0)
    context, seconds = open_context(run, CPU, num_workers=1), []
    train_state, batch_size = context.train_state, run.training.batch_size
    with closing(context.teacher), capture_maps(train_state, context.data.train, batch_size):
        train_state.train()
        for epoch in epochs:
            started = time.perf_counter()
            steps = epoch_steps(
                context, epoch, start_epoch(context, epoch), active_terms(run.terms, epoch)
            )
            next(steps)
            seconds.append(time.perf_counter() - started)
            del steps  # what its workers have ready is dropped when they are asked again
            assert view_of_epoch(epoch, run.num_views) == epoch - 1
    return seconds


def seconds_per_block(num_blocks: int) -> float:
    """To hand out all blocks of a pass of 50 views, eight at a time."""
    per_view = num_blocks // 50
    work = [
        Work(Block(view, index, index * BLOCK_ROWS, (index + 1) * BLOCK_ROWS), ("stage1",))
        for view in range(50)
        for index in range(per_view)
    ]
    groups, handed_out = Groups(work), 0
    started = time.perf_counter()
    while group := groups.next(8):
        handed_out += len(group)
    assert handed_out == len(work)
    return (time.perf_counter() - started) / len(work)


def seconds_to_open(size: ScaleStudy) -> float:
    """To open the cache of all views; the median of three."""
    seconds = []
    path = size.setup().path
    for _ in range(3):
        started = time.perf_counter()
        assert TeacherCache.open(path).num_views == size.num_views
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def planned_and_taken(
    plan: list[str], work: list[str], has_begun: Callable[[], bool], seconds: float
) -> tuple[float, float]:
    """Bytes of memory that a command's plan says, and the most that it took in its first `seconds`.

    They count from when `has_begun` says so. The command is killed afterwards.
    """
    told = subprocess.run(
        [sys.executable, "-m", *plan], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    found = re.search(r"at most about ([\d.,]+) (B|kB|MB|GB|TB) of memory", " ".join(told.split()))
    if found is None:
        raise RuntimeError(f"the plan does not say what memory it takes: {told}")
    planned = float(found[1].replace(",", "")) * _UNITS[found[2]]
    process = subprocess.Popen(
        [sys.executable, "-m", *work], cwd=ROOT, stdout=subprocess.DEVNULL, process_group=0
    )
    try:
        return planned, max(_peaks(process, has_begun, seconds))
    finally:
        process.send_signal(signal.SIGKILL)  # its workers end with it
        process.wait()


def _peaks(
    process: subprocess.Popen[bytes], has_begun: Callable[[], bool], seconds: float
) -> Iterator[int]:
    """The most memory that the process has taken so far, again and again while it runs."""
    until = time.monotonic() + _DEADLINE_SECONDS
    while time.monotonic() < until and process.poll() is None:
        if has_begun():
            until, has_begun = time.monotonic() + seconds, lambda: False
        status = Path(f"/proc/{process.pid}/status").read_text()
        yield from (int(kb) * 1024 for kb in re.findall(r"VmHWM:\s+(\d+) kB", status))
        time.sleep(0.2)
    if process.poll() not in (None, 0):
        raise RuntimeError(f"the command failed with {process.returncode}")
