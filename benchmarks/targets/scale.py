"""What ImageNet's number of samples costs beyond that of 8,000.

A tree of hard links to made-up photographs in 1,000 classes, and a cache of 50 views with made-up
records, both in a temporary folder that is removed at the end, also after Ctrl-C. Takes some
minutes, a quarter of them to create and remove files; --samples uses fewer for a try.
"""

from __future__ import annotations

import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.harness import CPU, ROUNDS, Findings, Verdict, drain, interleaved, markdown
from benchmarks.synthetic.photographs import PHOTOGRAPHS, check_disk, photographs
from benchmarks.synthetic.scale_study import CHANNELS, CLASSES, ScaleStudy, make_study
from benchmarks.synthetic.studies import steps_of_epoch
from benchmarks.targets.start import ROOT, run_until, seconds_to_first_step
from teach_once.precompute.compute.queue import BlockQueue
from teach_once.store import TeacherCache
from teach_once.store.format.spec import Block
from teach_once.store.write.pending_blocks import Work
from teach_once.train.engine.train_state import capture_maps
from teach_once.train.sessions.student import open_context
from teach_once.views.images.listing import forget_listings
from teach_once.views.pixels.resident import open_pixels
from teach_once.views.seeds import permutation

TITLE = "ImageNet's number of samples"
SMALL = 8_000
BLOCKS = (94_000, 1_000_000)
BATCH_SIZE, BLOCK_ROWS, VIEWS_OF_BLOCKS = 64, 4096, 50
_UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
Sizes = tuple[ScaleStudy, ScaleStudy]  # small, large
Found = tuple[list[list[str]], list[Verdict]]  # rows of the table, verdicts


def measure(
    device: str = "auto",
    samples: int = 1_281_167,
    views: int = 50,
    images: int = 512,
    rounds: int = 5,
    seconds: float = 15.0,
) -> Findings:
    """device: unused, but an option of every target. images: read in each round. seconds: of work
    for memory.
    """
    small = min(SMALL, samples)
    if small < CLASSES:
        raise SystemExit(f"--samples must be at least {CLASSES:,}, one for each class")
    with ExitStack() as stack:
        name = stack.enter_context(tempfile.TemporaryDirectory(prefix="scale-"))
        check_disk(Path(name), samples + small, (CHANNELS + 8) * views * samples)
        contents = list(photographs(min(PHOTOGRAPHS, small)))
        sizes = (
            make_study(Path(name, "small"), small, views, contents),
            make_study(Path(name, "large"), samples, views, contents),
        )
        parts = [first_steps(sizes), epochs(sizes), reading(sizes, images, rounds)]
        parts += [opening(sizes), scheduling(), memory(sizes, seconds)]
        # Removing the files takes minutes and may be interrupted: the report is written before.
        remove_files = stack.pop_all().close
    rows = [row for some, _ in parts for row in some]
    table = markdown(["what", f"{small:,} samples", f"{samples:,} samples"], rows)
    text = (
        f": hard links to {len(contents)} made-up photographs of 500x375 in {CLASSES:,} classes; "
        f"views of 32 pixels, {views} cached. Rates: medians of {rounds} interleaved rounds "
        f"{ROUNDS}. Memory: the maximum of the process in its first {seconds:g} s of work; plans "
        f"are for a whole run with its tests.\n\n{table}"
    )
    verdicts = [verdict for _, some in parts for verdict in some]
    return Findings(text, verdicts, cleanup=remove_files)


def _row(name: str, values: list[float], digits: int) -> list[str]:
    return [name, *(f"{value:,.{digits}f}" for value in values)]


def first_steps(sizes: Sizes) -> Found:
    """`make train-student`, on a folder that was never listed, and on one that was."""
    first, again = [], []
    for size in sizes:
        make = [f"STUDENT={size.student}", "METHOD=cd", "WORKERS=1"]
        make += [f"CACHES={size.caches}", f"RUNS={size.folder}/runs"]
        forget_listings(size.caches)
        first.append(seconds_to_first_step(size.folder, make, 0))
        again.append(seconds_to_first_step(size.folder, make, 1))
    return [
        _row("`make train-student` to the first step, s: listed for the first time", first, 1),
        _row("the same, listed before", again, 1),
    ], [
        Verdict("first step, listed for the first time (s)", first[1], at_most=60),
        Verdict("first step, listed before (s)", again[1], at_most=15),
    ]


def epochs(sizes: Sizes) -> Found:
    """The median start of epochs 2 to 4; the first one also starts the workers."""
    starts = [statistics.median(seconds_to_start_epochs(size)[1:]) for size in sizes]
    verdict = Verdict("start of an epoch: large - small (s)", starts[1] - starts[0], at_most=1)
    return [_row("start of an epoch, to its first step, s", starts, 2)], [verdict]


def seconds_to_start_epochs(size: ScaleStudy) -> list[float]:
    """From the end of an epoch's steps to the end of the first step of the next, four times."""
    context = open_context(size.study().run("cd", 0), CPU, num_workers=1)
    state, seconds = context.train_state, []
    batch_size = context.run.training.batch_size
    with closing(context.teacher), capture_maps(state, context.data.train, batch_size):
        state.train()
        for epoch in range(1, 5):
            started = time.perf_counter()
            steps = steps_of_epoch(context, epoch)
            next(steps)
            seconds.append(time.perf_counter() - started)
            del steps  # the workers' prefetched batches are dropped at their next request
    return seconds


def reading(sizes: Sizes, num_images: int, rounds: int) -> Found:
    """Views per second of one worker, from the first batch that is requested to the last.

    Stage 1 reads neighbors, all views of an image from one decoding; stage 2 reads one view of
    samples from anywhere.
    """
    count = min(num_images, sizes[0].num_samples)
    readers: dict[tuple[str, int], Callable[[], object]] = {}  # both sizes of a row take turns
    for mixes, also in ((False, "not mixed"), (True, "mixed")):
        for index, size in enumerate(sizes):
            setup = size.setup(mixes)
            config, train = setup.config, setup.dataset.train
            mean_std = config.dataset.normalization
            read = open_pixels(train, config.views, mean_std, CPU, num_workers=1).batches
            near, anywhere = np.arange(count), permutation(0, 1, len(train))[:count]
            for name, num_views, ids in (
                (f"stage 1, 1 view, {also}", 1, near),
                (f"stage 1, 8 views, {also}", 8, near),
                (f"stage 2, 1 view, {also}", 1, anywhere),
            ):
                readers[name, index] = drain(partial(read, range(num_views), ids, BATCH_SIZE))
    names = list(dict.fromkeys(name for name, _ in readers))
    calls = {f"{name}|{index}": readers[name, index] for name in names for index in (0, 1)}
    timings, rows, verdicts = interleaved(calls, rounds), [], []
    for name in names:
        small, large = (timings[f"{name}|{index}"] for index in (0, 1))
        amount = count * (8 if "8 views" in name else 1)
        rates = [each.format_rate(amount) for each in (small, large)]
        rows.append([f"views/s of one worker: {name}", *rates])
        ratio = 1 / large.ratio_to(small)
        verdicts.append(Verdict(f"views/s, {name}: large ÷ small", ratio, at_least=0.97))
    return rows, verdicts


def opening(sizes: Sizes) -> Found:
    """The cache of all views; the median of three."""
    opens = {str(n): partial(TeacherCache.open, size.setup().path) for n, size in enumerate(sizes)}
    seconds = [timing.median for timing in interleaved(opens, rounds=3).values()]
    what = f"opening a cache of {sizes[0].num_views} views"
    return [_row(f"{what}, s", seconds, 2)], [Verdict(f"{what} (s)", seconds[1])]


def scheduling() -> Found:
    """With ten times the blocks O(log n) is 1.2 times as much, and the processor's cache is small.

    O(n) would be 10.6 times as much.
    """
    few, many = (min(seconds_per_block(count) for _ in range(3)) for count in BLOCKS)
    what = f"scheduling {BLOCKS[0]:,} and {BLOCKS[1]:,} blocks, µs each"
    verdict = Verdict("scheduling a block: many ÷ few", many / few, at_most=3)
    return [_row(what, [1e6 * few, 1e6 * many], 2)], [verdict]


def seconds_per_block(num_blocks: int) -> float:
    """To hand out all blocks of a pass of 50 views, eight at a time."""
    work = [
        Work(Block(view, index, index * BLOCK_ROWS, (index + 1) * BLOCK_ROWS), ("stage1",))
        for view in range(VIEWS_OF_BLOCKS)
        for index in range(num_blocks // VIEWS_OF_BLOCKS)
    ]
    queue, handed_out = BlockQueue(work, 8), 0
    started = time.perf_counter()
    while group := queue.take():
        handed_out += len(group)
    assert handed_out == len(work)
    return (time.perf_counter() - started) / len(work)


def memory(sizes: Sizes, seconds: float) -> Found:
    rows, verdicts = [], []
    for stage, planned_and_taken in (("stage 1", memory_of_pass), ("stage 2", memory_of_training)):
        found = [planned_and_taken(size, seconds) for size in sizes]
        cells = [f"{taken / 1e6:,.0f} of {planned / 1e6:,.0f}" for planned, taken in found]
        rows.append([f"memory of {stage}, MB: taken of planned", *cells])
        what, (planned, taken) = f"memory of {stage}: taken ÷ planned", found[1]
        verdicts.append(Verdict(what, taken / planned, at_most=1.1))
    return rows, verdicts


def memory_of_pass(size: ScaleStudy, seconds: float) -> tuple[float, float]:
    """Bytes planned and taken. The pass writes to another folder, in blocks so small that some are
    finished in that time.
    """
    command = ["precompute", size.teacher, "--caches", f"{size.folder}/passes"]
    command += ["--workers", "1", "--device", "cpu", "--block-rows", "128"]
    planned = planned_bytes([*command, "--plan"])
    _, taken = run_until(_program(command), size.folder, "passes/*/journal/*", seconds)
    shutil.rmtree(size.folder / "passes")
    return planned, taken


def memory_of_training(size: ScaleStudy, seconds: float) -> tuple[float, float]:
    """Bytes planned and taken."""
    common = [size.student, "--method", "cd", "--caches", str(size.caches)]
    common += ["--runs", f"{size.folder}/runs", "--device", "cpu"]
    run = _program(["train", "student", *common, "--seed", "2"])
    _, taken = run_until(run, size.folder, "runs/*/*-seed2-*/metrics.jsonl", seconds)
    return planned_bytes(["train", "plan", *common]), taken


def planned_bytes(plan: list[str]) -> float:
    """The memory that a printed plan contains, in bytes."""
    done = subprocess.run(_program(plan), cwd=ROOT, check=True, capture_output=True, text=True)
    pattern = r"at most about ([\d.,]+) (B|kB|MB|GB|TB) of RAM"
    if (found := re.search(pattern, " ".join(done.stdout.split()))) is None:
        raise RuntimeError(f"the plan does not contain the memory it takes: {done.stdout}")
    return float(found[1].replace(",", "")) * _UNITS[found[2]]


def _program(words: list[str]) -> list[str]:
    return [sys.executable, "-m", *words]
