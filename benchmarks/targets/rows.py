"""python -m benchmarks rows [--slab-mb 400] [--rounds 7] [--docs docs/benchmarks.md]

Where DistillationDataset should get single rows from: files mapped into memory, a view's slab in
memory, or whole blocks of the cache. Processor time of one process, which other work on the machine
hardly changes; files in the page cache.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from benchmarks.harness import Timing, interleaved, machine, markdown, write_json, write_section
from benchmarks.targets.read import make_cache
from teach_once.configs.load import load_teacher
from teach_once.runtime.machine.resources import Share, sharing_machine
from teach_once.store import TeacherCache
from teach_once.store.read.mapped import MappedRows
from teach_once.views.datasets import load_dataset
from teach_once.views.pixels.resident import open_pixels
from teach_once.views.seeds import choice

RECORD_BYTES, BATCH, BATCHES = 4096, 256, 16


class Figures(NamedTuple):
    """Processor time to start an epoch and to read a batch, and memory of one's own."""

    start: Timing
    batch: Timing
    own_bytes: int


def measure(view_bytes: int, rounds: int) -> dict[str, Figures]:
    """Way to read -> what it costs, for one view of `view_bytes`."""
    with tempfile.TemporaryDirectory() as folder:
        cache = TeacherCache.open(make_cache(Path(folder), RECORD_BYTES, view_bytes))
        ids = [
            np.random.default_rng(seed).permutation(choice(seed, cache.num_samples, BATCH))
            for seed in range(BATCHES)
        ]
        rows, taps = MappedRows(cache, ["logits"]), ["logits"]
        slab = cache.read_view(0, taps)["logits"]
        starts = {
            "files mapped into memory": lambda: rows.verify(0),
            "the view's slab in memory": lambda: cache.read_view(0, taps),
            "whole blocks of the cache": lambda: None,
        }
        batches = {
            "files mapped into memory": lambda: [rows.read(0, some) for some in ids],
            "the view's slab in memory": lambda: [slab[some] for some in ids],
            "whole blocks of the cache": lambda: [cache.read(some, 0, taps) for some in ids[:1]],
        }
        # One thread: what several save in seconds they take in processor time.
        with sharing_machine(Share(0, 2**10)):
            start = interleaved(
                {name: _processor_time(run) for name, run in starts.items()}, rounds
            )
            batch = interleaved(
                {name: _processor_time(run) for name, run in batches.items()}, rounds
            )
        own = {"the view's slab in memory": slab.nbytes}
        return {name: Figures(start[name], batch[name], own.get(name, 0)) for name in starts}


def measure_pixels(rounds: int) -> Timing:
    """The images of such a batch, where they cost least: 8x8 digits in memory."""
    config = load_teacher("digits-resnet20", ["dataset.limit=null"])
    train, normalisation = load_dataset(config.dataset).train, config.dataset.normalisation
    pixels = open_pixels(train, config.views, normalisation, torch.device("cpu"), 0)
    ids = choice(0, len(train), BATCH)

    def run() -> None:
        for _ in range(BATCHES):
            for batch in pixels.batches([0], ids, BATCH):
                list(zip(batch.inputs, batch.labels, strict=True))

    return interleaved({"pixels": _processor_time(run)}, rounds)["pixels"]


def _processor_time(run: Callable[[], object]) -> Callable[[], float]:
    def timed() -> float:
        started = time.process_time()
        run()
        return time.process_time() - started

    return timed


def report(figures: dict[str, Figures], pixels: Timing) -> str:
    lines = []
    for name, found in figures.items():
        batches = 1 if "blocks" in name else BATCHES
        lines.append(
            [
                name,
                f"{1e3 * found.start.median:,.0f} ms ± {100 * found.start.spread:.0f} %",
                f"{1e3 * found.batch.median / batches:,.2f} ms ± {100 * found.batch.spread:.0f} %",
                f"{found.own_bytes / 2**20:,.0f} MiB",
            ]
        )
    lines.append(
        [
            "(pixels of 256 digits, for comparison)",
            "",
            f"{1e3 * pixels.median / BATCHES:,.2f} ms ± {100 * pixels.spread:.0f} %",
            "",
        ]
    )
    header = ["rows from", "to start an epoch", f"to read {BATCH} rows", "memory of its own"]
    return markdown(header, lines)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--slab-mb", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--docs", type=Path, default=Path("docs/benchmarks.md"))
    parser.add_argument("--json", type=Path, default=Path("runs/benchmarks/rows.json"))
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    figures = measure(options.slab_mb * 2**20, options.rounds)
    table = report(figures, measure_pixels(options.rounds))
    size, rounds = options.slab_mb, options.rounds
    body = (
        f"`python -m benchmarks rows --slab-mb {size} --rounds {rounds}` on {machine()}: processor "
        f"time of one thread for a view of {size} MiB with records of {RECORD_BYTES:,} bytes in "
        f"the page cache; median of {rounds} interleaved rounds ± half the distance between the "
        f"quartiles.\n\n{table}"
    )
    print(body)
    write_section(options.docs, "Rows for a loop of one's own", body)
    write_json(options.json, {name: found.batch.median for name, found in figures.items()})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
