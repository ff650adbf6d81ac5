"""How fast a cache is read: one view's slab, 256 random rows, and a check of every byte.

Compared with memcpy, np.memmap, plain zarr slicing, h5py and `cat`, from the page cache.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import h5py
import numpy as np
import torch
import zarr
from numpy.typing import NDArray

from benchmarks.harness import ROUNDS, Findings, Timing, Verdict, interleaved, markdown
from benchmarks.synthetic.caches import logits_cache
from teach_once.store import TeacherCache
from teach_once.store.move.hdf5 import export_cache
from teach_once.store.read.mapped import MappedRows
from teach_once.train.outputs.device_copies import gather_rows
from teach_once.views.seeds import choice

TITLE = "Reading a cache"
RECORD_BYTES = (2048, 4096, 8192)
ROWS = 256
MANY, FEW = 128, 2  # batches per timing, of the fast methods and of the slow ones
RESIDENT, MAPPED = "slab in memory (training)", "mapped files (DistillationDataset)"
OURS, ZARR = "read_view (checksums verified)", "zarr slicing (checksums verified)"
FAST = (RESIDENT, MAPPED, "np.memmap")
Calls = dict[str, Callable[[], object]]
UNITS = {"slab": "GB/s", "256 rows": "records/s", "check": "GB/s"}


def measure(slab_mb: int = 400, rounds: int = 7) -> Findings:
    timings: dict[str, dict[str, dict[str, Timing]]] = {what: {} for what in UNITS}
    sizes = [f"{record_bytes // 1024} KB records" for record_bytes in RECORD_BYTES]
    with tempfile.TemporaryDirectory() as folder:
        for size, record_bytes in zip(sizes, RECORD_BYTES, strict=True):
            for what, calls in calls_of(Path(folder), record_bytes, slab_mb << 20).items():
                timings[what][size] = interleaved(calls, rounds)
    gigabytes = (slab_mb << 20) / 1e9
    tables = []
    for what, unit in UNITS.items():
        rows = [
            [method, *(timings[what][size][method].format_rate(amount, digits) for size in sizes)]
            for method in timings[what][sizes[0]]
            for amount, digits in [(_records(method), 0) if what == "256 rows" else (gigabytes, 2)]
        ]
        tables.append(markdown([f"{what}, {unit}", *sizes], rows))
    text = f", zarr {zarr.__version__}, h5py {h5py.__version__}; files in the page cache; median "
    text += f"of {rounds} interleaved rounds {ROUNDS}.\n\n"
    verdicts = [each for size in sizes for each in verdicts_of(size, timings, gigabytes)]
    return Findings(text + "\n".join(tables), verdicts)


def _records(method: str) -> int:
    return ROWS * (MANY if method in FAST else FEW)


def verdicts_of(
    size: str, timings: dict[str, dict[str, dict[str, Timing]]], gigabytes: float
) -> list[Verdict]:
    slab, rows, check = (timings[what][size] for what in UNITS)
    rate, of_rows = gigabytes / slab[OURS].median, _records(RESIDENT) / rows[RESIDENT].median
    # Either suffices: 3 GB/s, or twice zarr's rate.
    best = max(rate / 3, slab[ZARR].ratio_to(slab[OURS]) / 2)
    fast = f"{size}: slab, {rate:.2f} GB/s ÷ the lower of 3 GB/s and twice zarr's"
    return [
        Verdict(fast, best, at_least=1),
        Verdict(f"{size}: million resident rows/s", of_rows / 1e6, at_least=1),
        Verdict(f"{size}: check ÷ cat", check["cat"].ratio_to(check["store check"]), at_least=0.7),
    ]


def calls_of(folder: Path, record_bytes: int, view_bytes: int) -> dict[str, Calls]:
    """Return the calls of each table: table -> method -> call."""
    path, exported = logits_cache(folder, record_bytes, view_bytes), folder / "cache.h5"
    cache, taps = TeacherCache.open(path), ["logits"]
    export_cache(path, exported)
    slab = cache.read_view(0, taps)["logits"]
    slab.tofile(folder / "raw")
    mapped = np.memmap(folder / "raw", dtype=np.float16, mode="r", shape=slab.shape)
    array = zarr.open_array(path / "teacher.zarr" / "logits", mode="r")
    batches = [
        np.random.default_rng(seed).permutation(choice(seed, cache.num_samples, ROWS))
        for seed in range(MANY)
    ]
    resident, rows_of_files = torch.from_numpy(slab), MappedRows(cache, taps)
    rows_of_files.verify(0)
    buffer = resident[:ROWS].clone()
    chunks = sorted((path / "teacher.zarr" / "logits").glob("c.*"))

    def from_h5py(ids: NDArray[np.int64] | None = None) -> NDArray[np.float16]:
        with h5py.File(exported) as file:
            if ids is None:
                return np.asarray(file["logits"][0])
            order = np.argsort(ids)
            return np.asarray(file["logits"][0, ids[order]][np.argsort(order)])

    rows: dict[str, Callable[[NDArray[np.int64]], object]] = {
        RESIDENT: lambda ids: gather_rows(resident, torch.from_numpy(ids), buffer),
        MAPPED: lambda ids: rows_of_files.read(0, ids),
        "np.memmap": lambda ids: mapped[ids],
        "h5py": from_h5py,
        "cache.read": lambda ids: cache.read(ids, 0, taps),
        "zarr": lambda ids: array.oindex[0, ids],
    }

    def read_batches(name: str) -> None:
        for ids in batches[: _records(name) // ROWS]:
            rows[name](ids)

    return {
        "slab": {
            OURS: lambda: cache.read_view(0, taps),
            "memcpy": slab.copy,
            "np.memmap": lambda: np.array(mapped),
            ZARR: lambda: array[0],
            "h5py contiguous": from_h5py,
        },
        "256 rows": {name: partial(read_batches, name) for name in rows},
        "check": {
            "store check": cache.faults,
            "cat": partial(subprocess.run, ["cat", *chunks], stdout=subprocess.DEVNULL, check=True),
        },
    }
