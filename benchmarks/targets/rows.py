"""python -m benchmarks rows [--slab-mb 400] [--rounds 7] [--docs docs/development/benchmarks.md]

Where DistillationDataset should get single rows from: files mapped into memory, a view's slab in
memory, or whole blocks of the cache. Processor time of one process, which other work on the machine
hardly changes; files in the page cache.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarks.harness import CPU, ROUNDS, Findings, interleaved, markdown, timed
from benchmarks.synthetic.caches import logits_cache
from teach_once.configs.load import load_teacher
from teach_once.runtime.machine.resources import Share, sharing_machine
from teach_once.store import TeacherCache
from teach_once.store.read.mapped import MappedRows
from teach_once.views.datasets import load_dataset
from teach_once.views.pixels.resident import open_pixels
from teach_once.views.seeds import choice

TITLE = "Rows for a loop of one's own"
RECORD_BYTES, BATCH, BATCHES = 4096, 256, 16
MAPPED = "files mapped into memory"
SLAB = "the view's slab in memory"
BLOCKS = "whole blocks of the cache"
Calls = dict[str, Callable[[], float]]
_processor_time = partial(timed, clock=time.process_time)


def measure(slab_mb: int = 400, rounds: int = 7) -> Findings:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        cache = TeacherCache.open(logits_cache(Path(folder), RECORD_BYTES, slab_mb * 2**20))
        starts, batches, view_bytes = row_readers(cache)
        # One thread: what several save in seconds they take in processor time.
        with sharing_machine(Share(0, 2**10)):
            start, batch = (interleaved(calls, rounds) for calls in (starts, batches))
    pixels = interleaved({"pixels": pixel_reader()}, rounds)["pixels"]
    lines = [
        [
            name,
            start[name].format_ms(0),
            batch[name].format_ms(2, 1 if name == BLOCKS else BATCHES),
            f"{(view_bytes if name == SLAB else 0) / 2**20:,.0f} MiB",
        ]
        for name in start
    ]
    read_pixels = pixels.format_ms(2, BATCHES)
    lines.append([f"(pixels of {BATCH} digits, for comparison)", "", read_pixels, ""])
    header = ["rows from", "to start an epoch", f"to read {BATCH} rows", "memory of its own"]
    text = (
        f": processor time of one thread for a view of {slab_mb} MiB with records of "
        f"{RECORD_BYTES:,} bytes in the page cache; median of {rounds} interleaved rounds {ROUNDS}."
    )
    found = {name: timing.median for name, timing in batch.items()}
    return Findings(f"{text}\n\n{markdown(header, lines)}", content=found)


def row_readers(cache: TeacherCache) -> tuple[Calls, Calls, int]:
    """Way to read -> how an epoch starts, and how batches are read; bytes of the view's slab."""
    ids = [
        np.random.default_rng(seed).permutation(choice(seed, cache.num_samples, BATCH))
        for seed in range(BATCHES)
    ]
    rows, taps = MappedRows(cache, ["logits"]), ["logits"]
    slab = cache.read_view(0, taps)["logits"]
    starts = {
        MAPPED: _processor_time(lambda: rows.verify(0)),
        SLAB: _processor_time(lambda: cache.read_view(0, taps)),
        BLOCKS: _processor_time(lambda: None),
    }
    batches = {
        MAPPED: _processor_time(lambda: [rows.read(0, some) for some in ids]),
        SLAB: _processor_time(lambda: [slab[some] for some in ids]),
        BLOCKS: _processor_time(lambda: [cache.read(some, 0, taps) for some in ids[:1]]),
    }
    return starts, batches, slab.nbytes


def pixel_reader() -> Callable[[], float]:
    """Reads the images of such batches, where they cost least: 8x8 digits in memory."""
    config = load_teacher("digits-resnet20", ["dataset.limit=null"])
    train, normalisation = load_dataset(config.dataset).train, config.dataset.normalisation
    pixels = open_pixels(train, config.views, normalisation, CPU, 0)
    ids = choice(0, len(train), BATCH)

    def run() -> None:
        for _ in range(BATCHES):
            for batch in pixels.batches([0], ids, BATCH):
                list(zip(batch.inputs, batch.labels, strict=True))

    return _processor_time(run)
