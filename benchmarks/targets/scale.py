"""The cost of ImageNet's number of samples, compared with 8,000 samples.

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
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.harness import CPU, ROUNDS, Findings, Verdict, drain, interleaved, markdown
from benchmarks.synthetic.caches import fill_with_noise
from benchmarks.synthetic.photographs import (
    PHOTOGRAPHS,
    check_disk,
    photograph_folder,
    photographs,
)
from benchmarks.synthetic.studies import StudyFiles, steps_of_epoch, write_study
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
SMALL, CLASSES = 8_000, 1000
BLOCKS = (94_000, 1_000_000)
BATCH_SIZE, BLOCK_ROWS, VIEWS_OF_BLOCKS = 64, 4096, 50
_CHANNELS = 16  # of the one stage that is stored
_TEACHER = (
    "teacher.arch=resnet8",
    "taps={logits: null, channel_means: uint8, stages: [layer1]}",
)
_STUDENT = (
    "student={arch: resnet8, stages: [layer1]}",
    *("training.batch_size=128", "methods={cd: [{loss: ce}, {loss: cd}]}"),
)
_PYTHON = [sys.executable, "-m"]
_UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
Sizes = tuple[StudyFiles, StudyFiles]  # small, large


class SizesRow(NamedTuple):
    """A row of the table: the values of both sizes, their format, and a verdict."""

    what: str
    values: Sequence[float | str]
    verdict: Verdict
    form: str = "{}"


def measure(
    device: str = "auto",
    samples: int = 1_281_167,
    views: int = 50,
    images: int = 512,
    rounds: int = 5,
    seconds: float = 15.0,
) -> Findings:
    """Measure both sizes.

    device: unused, but an option of every target. images: images read in each round.
    seconds: length of the work whose memory is measured.
    """
    small = min(SMALL, samples)
    if small < CLASSES:
        raise SystemExit(f"--samples must be at least {CLASSES:,}, one for each class")
    with ExitStack() as stack:
        name = stack.enter_context(tempfile.TemporaryDirectory(prefix="scale-"))
        check_disk(Path(name), samples + small, (_CHANNELS + 8) * views * samples)
        contents = list(photographs(min(PHOTOGRAPHS, small)))
        sizes = (
            make_study(Path(name, "small"), small, views, contents),
            make_study(Path(name, "large"), samples, views, contents),
        )
        lines = [*first_steps(sizes), *epochs(sizes)]
        lines += reading(sizes, min(images, small), rounds)
        lines += [*opening(sizes), *scheduling(), *memory(sizes, seconds)]
        # Removing the files takes minutes and may be interrupted: the report is written before.
        remove_files = stack.pop_all().close
    rows = [[line.what, *map(line.form.format, line.values)] for line in lines]
    table = markdown(["what", f"{small:,} samples", f"{samples:,} samples"], rows)
    text = (
        f": hard links to {len(contents)} made-up photographs of 500x375 in {CLASSES:,} classes; "
        f"views of 32 pixels, {views} cached. Rates: medians of {rounds} interleaved rounds "
        f"{ROUNDS}. Memory: the maximum of the process in its first {seconds:g} s of work; plans "
        f"are for a whole run with its tests.\n\n{table}"
    )
    return Findings(text, [line.verdict for line in lines], cleanup=remove_files)


def make_study(folder: Path, num_samples: int, num_views: int, contents: list[bytes]) -> StudyFiles:
    """Write an image folder, the configs, and a complete cache of made-up records."""
    digests = photograph_folder(folder / "tree", num_samples, contents, CLASSES)
    views = ["views.augment={type: random-resized-crop, size_px: 32}", f"views.count={num_views}"]
    data = {"type": "imagefolder", "root": str(folder / "tree")}
    files = write_study(folder, data, [*_TEACHER, *views], _STUDENT, classes=CLASSES)
    fill_with_noise(files.setup(), lambda ids: digests[ids])
    return files


def first_steps(sizes: Sizes) -> Iterator[SizesRow]:
    """Time `make train-student` on a folder that was never listed, then on a listed folder."""
    first, again = [], []
    for size in sizes:
        make = [*size.make_variables, "METHOD=cd", "WORKERS=1"]
        forget_listings(size.caches)
        first.append(seconds_to_first_step(size.folder, make, 0))
        again.append(seconds_to_first_step(size.folder, make, 1))
    what = "`make train-student` to the first step, s: listed for the first time"
    verdict = Verdict("first step, listed for the first time (s)", first[1], at_most=60)
    yield SizesRow(what, first, verdict, "{:.1f}")
    verdict = Verdict("first step, listed before (s)", again[1], at_most=15)
    yield SizesRow("the same, listed before", again, verdict, "{:.1f}")


def epochs(sizes: Sizes) -> Iterator[SizesRow]:
    """Take the median start of epochs 2 to 4; the first epoch also starts the workers."""
    starts = [statistics.median(seconds_to_start_epochs(size)[1:]) for size in sizes]
    verdict = Verdict("start of an epoch: large - small (s)", starts[1] - starts[0], at_most=1)
    yield SizesRow("start of an epoch, to its first step, s", starts, verdict, "{:.2f}")


def seconds_to_start_epochs(size: StudyFiles) -> list[float]:
    """Time the start of four epochs, each up to the end of its first step."""
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
            del steps  # the workers' prefetched batches are dropped at the next request
    return seconds


def reading(sizes: Sizes, count: int, rounds: int) -> Iterator[SizesRow]:
    """Measure views per second of one worker, from the first requested batch to the last.

    Stage 1 reads neighbors, all views of an image from one decoding; stage 2 reads one view of
    samples from anywhere.
    """
    calls: dict[str, Callable[[], object]] = {}
    for also, overrides in (("not mixed", []), ("mixed", ["views.augment.mix={type: mixup}"])):
        for index, size in enumerate(sizes):
            setup = size.setup(*overrides)
            config, train = setup.config, setup.dataset.train
            mean_std = config.dataset.normalization
            read = open_pixels(train, config.views, mean_std, CPU, num_workers=1).batches
            near, anywhere = np.arange(count), permutation(0, 1, len(train))[:count]
            for stage, num_views, ids in ((1, 1, near), (1, 8, near), (2, 1, anywhere)):
                name = f"stage {stage}, {num_views} view{'s' * (num_views > 1)}, {also}|{index}"
                calls[name] = drain(partial(read, range(num_views), ids, BATCH_SIZE))
    order = sorted(calls, key=lambda name: name.partition("|")[0])  # both sizes take turns
    timings = interleaved({name: calls[name] for name in order}, rounds)
    for name in dict.fromkeys(name.partition("|")[0] for name in calls):
        small, large = (timings[f"{name}|{index}"] for index in (0, 1))
        amount = count * (8 if "8 views" in name else 1)
        ratio = Verdict(f"views/s, {name}: large ÷ small", 1 / large.ratio_to(small), at_least=0.97)
        rates = [each.format_rate(amount) for each in (small, large)]
        yield SizesRow(f"views/s of one worker: {name}", rates, ratio)


def opening(sizes: Sizes) -> Iterator[SizesRow]:
    """Time opening the cache of all views: the median of three."""
    setups = [size.setup() for size in sizes]
    opens = {str(n): partial(TeacherCache.open, setup.path) for n, setup in enumerate(setups)}
    seconds = [timing.median for timing in interleaved(opens, rounds=3).values()]
    what = f"opening a cache of {setups[0].config.views.num_views} views"
    yield SizesRow(f"{what}, s", seconds, Verdict(f"{what} (s)", seconds[1]), "{:.2f}")


def scheduling() -> Iterator[SizesRow]:
    """Time scheduling a block with few and with ten times as many blocks.

    O(log n) would take 1.2 times as long, and O(n) 10.6 times; the processor's cache is small.
    """
    few, many = (min(seconds_per_block(count) for _ in range(3)) for count in BLOCKS)
    what = f"scheduling {BLOCKS[0]:,} and {BLOCKS[1]:,} blocks, µs each"
    verdict = Verdict("scheduling a block: many ÷ few", many / few, at_most=3)
    yield SizesRow(what, [1e6 * few, 1e6 * many], verdict, "{:.2f}")


def seconds_per_block(num_blocks: int) -> float:
    """Time handing out all blocks of a pass of 50 views, eight at a time."""
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


def memory(sizes: Sizes, seconds: float) -> Iterator[SizesRow]:
    for stage, bytes_of in (("stage 1", memory_of_pass), ("stage 2", memory_of_training)):
        found = [bytes_of(size, seconds) for size in sizes]
        cells = [f"{taken / 1e6:,.0f} of {planned / 1e6:,.0f}" for planned, taken in found]
        planned, taken = found[1]
        verdict = Verdict(f"memory of {stage}: taken ÷ planned", taken / planned, at_most=1.1)
        yield SizesRow(f"memory of {stage}, MB: taken of planned", cells, verdict)


def memory_of_pass(size: StudyFiles, seconds: float) -> tuple[float, float]:
    """Return bytes planned and used by a pass to another folder, in blocks that finish in time."""
    words = ["precompute", size.teacher, "--caches", f"{size.folder}/passes"]
    words += ["--workers", "1", "--device", "cpu", "--block-rows", "128"]
    planned = planned_bytes([*words, "--plan"])
    _, taken = run_until([*_PYTHON, *words], size.folder, "passes/*/journal/*", seconds)
    shutil.rmtree(size.folder / "passes")
    return planned, taken


def memory_of_training(size: StudyFiles, seconds: float) -> tuple[float, float]:
    """Return bytes planned and used."""
    words = [size.student, "--method", "cd", "--caches", str(size.caches)]
    words += ["--runs", str(size.runs), "--device", "cpu"]
    command = [*_PYTHON, "train", "student", *words, "--seed", "2"]
    _, taken = run_until(command, size.folder, "runs/*/*-seed2-*/metrics.jsonl", seconds)
    return planned_bytes(["train", "plan", *words]), taken


def planned_bytes(plan: list[str]) -> float:
    """Run a command that prints a plan; return the bytes of memory in it."""
    done = subprocess.run([*_PYTHON, *plan], cwd=ROOT, check=True, capture_output=True, text=True)
    return ram_bytes(done.stdout)


def ram_bytes(plan: str) -> float:
    pattern = r"at most about ([\d.,]+) (B|kB|MB|GB|TB) of RAM"
    if (found := re.search(pattern, " ".join(plan.split()))) is None:
        raise RuntimeError(f"the plan does not contain its memory: {plan}")
    return float(found[1].replace(",", "")) * _UNITS[found[2]]
