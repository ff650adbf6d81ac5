"""python -m benchmarks scale [--samples 1281167]

What ImageNet's number of samples costs beyond that of 8,000: a tree of hard links to made-up
photographs in 1,000 classes, and a cache of 50 views with made-up records, both in a temporary
folder that is removed at the end, also after Ctrl-C. Takes some minutes, a quarter of them for
making and removing files; --samples takes fewer for a try.
"""

from __future__ import annotations

import shutil
import signal
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import NoReturn

from benchmarks.harness import Verdict, machine, markdown, parser_of, publish
from benchmarks.synthetic.linked_tree import CLASSES, refuse_small_disk, some_photographs
from benchmarks.synthetic.photographs import origin
from benchmarks.synthetic.scale_study import CHANNELS, ScaleStudy, make_study
from benchmarks.targets.scale_measures import (
    Sizes,
    planned_and_taken,
    seconds_per_block,
    seconds_to_open,
    seconds_to_start_epochs,
    worker_rates,
)
from benchmarks.targets.start import seconds_to_first_step
from teach_once.views.images.listing import forget_listings

SMALL = 8_000
BLOCKS = (94_000, 1_000_000)
Row = list[str]
Commands = tuple[list[str], list[str], Callable[[], bool]]  # plan, work, whether that has begun


def first_steps(sizes: Sizes) -> tuple[list[Row], list[Verdict]]:
    """`make train-student`, where the folder was never listed, and where it was."""
    first, again = [], []
    for size in sizes:
        make = [f"STUDENT={size.student}", "METHOD=cd", "WORKERS=1"]
        make += [f"CACHES={size.caches}", f"RUNS={size.folder}/runs"]
        forget_listings(size.caches)
        first.append(seconds_to_first_step(size.folder, make, 0))
        again.append(seconds_to_first_step(size.folder, make, 1))
    rows = [
        _row("`make train-student` to the first step, s: listed for the first time", first, 1),
        _row("the same, listed before", again, 1),
    ]
    return rows, [
        Verdict("first step, listed for the first time (s)", first[1], "≤ 60", lambda x: x <= 60),
        Verdict("first step, listed before (s)", again[1], "≤ 15", lambda x: x <= 15),
    ]


def reading(sizes: Sizes, images: int, rounds: int) -> tuple[list[Row], list[Verdict]]:
    rows, verdicts = [], []
    count = min(images, sizes[0].num_samples)
    for name, (small, large) in worker_rates(sizes, images, rounds).items():
        views = count * (8 if "8 views" in name else 1)
        rates = [f"{views / each.median:,.0f} ± {each.spread:.0%}" for each in (small, large)]
        rows.append([f"views/s of one worker: {name}", *rates])
        ratio = 1 / large.ratio_to(small)
        verdicts.append(
            Verdict(f"views/s, {name}: large ÷ small", ratio, "≥ 0.97", lambda x: x >= 0.97)
        )
    return rows, verdicts


def epochs(sizes: Sizes) -> tuple[list[Row], list[Verdict]]:
    """The first epoch also starts the workers, so it is left out."""
    starts = [statistics.median(seconds_to_start_epochs(size, range(1, 5))[1:]) for size in sizes]
    more = starts[1] - starts[0]
    return [_row("start of an epoch, to its first step, s", starts, 2)], [
        Verdict("start of an epoch: large - small (s)", more, "≤ 1", lambda x: x <= 1)
    ]


def scheduling() -> tuple[list[Row], list[Verdict]]:
    """With ten times the blocks O(log n) is 1.2 times as much, and the processor's cache is small.

    O(n) would be 10.6 times as much.
    """
    few, many = (min(seconds_per_block(count) for _ in range(3)) for count in BLOCKS)
    row = [f"scheduling {BLOCKS[0]:,} and {BLOCKS[1]:,} blocks, µs each"]
    return [[*row, f"{few * 1e6:.2f}", f"{many * 1e6:.2f}"]], [
        Verdict("scheduling a block: many ÷ few", many / few, "≤ 3", lambda x: x <= 3)
    ]


def opening(sizes: Sizes) -> tuple[list[Row], list[Verdict]]:
    seconds = [seconds_to_open(size) for size in sizes]
    views = sizes[0].num_views
    return [_row(f"opening a cache of {views} views, s", seconds, 2)], [
        Verdict(f"opening a cache of {views} views (s)", seconds[1])
    ]


def memory(sizes: Sizes, seconds: float) -> tuple[list[Row], list[Verdict]]:
    stages = {"stage 1": _pass_commands, "stage 2": _training_commands}
    rows, verdicts = [], []
    for stage, commands in stages.items():
        found = [planned_and_taken(*commands(size), seconds) for size in sizes]
        for size in sizes:
            shutil.rmtree(size.folder / "passes", ignore_errors=True)
        cells = [f"{taken / 1e6:,.0f} of {planned / 1e6:,.0f}" for planned, taken in found]
        rows.append([f"memory of {stage}, MB: taken of planned", *cells])
        planned, taken = found[1]
        verdicts.append(
            Verdict(
                f"memory of {stage}: taken ÷ planned",
                taken / planned,
                "≤ 1.1",
                lambda x: x <= 1.1,
            )
        )
    return rows, verdicts


def _pass_commands(size: ScaleStudy) -> Commands:
    """Into another folder of caches, as this one holds everything already.

    Blocks are so small that some are finished in the time.
    """
    common = ["precompute", size.teacher, "--caches", f"{size.folder}/passes"]
    common += ["--workers", "1", "--device", "cpu", "--block-rows", "128"]
    has_begun = _exists(size.folder, "passes/*/journal/*")
    return [*common, "--plan"], common, has_begun


def _exists(folder: Path, pattern: str) -> Callable[[], bool]:
    return lambda: next(folder.glob(pattern), None) is not None


def _training_commands(size: ScaleStudy) -> Commands:
    common = [size.student, "--method", "cd", "--caches", str(size.caches)]
    common += ["--runs", f"{size.folder}/runs", "--device", "cpu"]
    has_begun = _exists(size.folder, "runs/*/*-seed2-*/metrics.jsonl")
    return ["train", "plan", *common], ["train", "student", *common, "--seed", "2"], has_begun


def _row(name: str, values: list[float], digits: int) -> Row:
    return [name, *(f"{value:,.{digits}f}" for value in values)]


def main(arguments: list[str]) -> int:
    parser = parser_of("scale", __doc__)
    parser.add_argument("--samples", type=int, default=1_281_167)
    parser.add_argument("--views", type=int, default=50)
    parser.add_argument("--images", type=int, default=512, help="read in each round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=15.0, help="of work, for memory")
    options = parser.parse_args(arguments)
    small = min(SMALL, options.samples)
    if small < CLASSES:
        parser.error(f"--samples must be at least {CLASSES:,}, one for each class")
    signal.signal(signal.SIGTERM, _end)
    with tempfile.TemporaryDirectory(prefix="scale-") as name:
        cache_bytes = (CHANNELS + 8) * options.views * options.samples
        refuse_small_disk(Path(name), options.samples + small, cache_bytes)
        contents = some_photographs(small)
        sizes = tuple(
            make_study(Path(name) / word, count, options.views, contents)
            for word, count in (("small", small), ("large", options.samples))
        )
        assert len(sizes) == 2
        parts = [
            first_steps(sizes),
            epochs(sizes),
            reading(sizes, options.images, options.rounds),
            opening(sizes),
            scheduling(),
            memory(sizes, options.seconds),
        ]
        # Published before the files are removed, which takes minutes and may be interrupted.
        rows = [row for some, _ in parts for row in some]
        verdicts = [verdict for _, some in parts for verdict in some]
        table = markdown(["what", f"{small:,} samples", f"{options.samples:,} samples"], rows)
        text = (
            f"`python -m benchmarks scale {' '.join(arguments)}` on {machine()}: hard links to "
            f"{len(contents)} photographs of 500x375 ({origin()}) in {CLASSES:,} classes; views of "
            f"32 pixels, {options.views} cached. Rates: medians of {options.rounds} interleaved "
            f"rounds ± half the distance between the quartiles. Memory: the most that the process "
            f"took in its first {options.seconds:g} s of work; plans are for a whole run with its "
            f"tests.\n\n{table}"
        )
        publish(options, "ImageNet's number of samples", text, verdicts)
    return 0


def _end(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)  # so that the temporary folder is removed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
