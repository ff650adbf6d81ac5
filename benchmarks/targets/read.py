"""python -m benchmarks read [--slab-mb 400] [--rounds 7] [--docs docs/development/benchmarks.md]

How fast a cache is read: one view's slab, 256 random rows, and a check of every byte; next to
memcpy, np.memmap, plain zarr slicing, h5py and `cat`, from the page cache.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import h5py
import numpy as np
import torch
import zarr
from numpy.typing import NDArray

from benchmarks.harness import ROUNDS, Findings, Timing, interleaved, mark, markdown
from benchmarks.synthetic.caches import logits_cache
from teach_once.store import TeacherCache
from teach_once.store.move.hdf5 import export_cache
from teach_once.train.outputs.device_copies import gather_rows
from teach_once.views.seeds import choice

TITLE = "Reading a cache"
RECORD_BYTES = (2048, 4096, 8192)
ROWS = 256
MANY, FEW = 128, 2  # batches per timing, of the fast methods and of the slow ones
RESIDENT = "the resident slab (the feed's gather)"
OURS, ZARR = "read_view (checksums verified)", "zarr slicing (checksums verified)"
Calls = dict[str, Callable[[], object]]
# What is read -> its unit, and the units of a GB or of one.
UNITS = {"slab": ("GB/s", 1e9), "256 rows": ("records/s", 1.0), "check": ("GB/s", 1e9)}


def measure(slab_mb: int = 400, rounds: int = 7) -> Findings:
    found: dict[tuple[str, int], dict[str, Timing]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for record_bytes in RECORD_BYTES:
            calls = calls_of(Path(folder), record_bytes, slab_mb * 2**20)
            for what, rows in calls.items():
                found[what, record_bytes] = interleaved(rows, rounds)
    results = [
        {
            **{"what": what, "record_bytes": size, "method": name, "seconds": timing.median},
            **{"spread": timing.spread, "per_second": amount / timing.median},
            "unit": "records" if what == "256 rows" else "bytes",
        }
        for (what, size), timings in found.items()
        for name, timing in timings.items()
        for amount in [_amount(what, name, size, slab_mb * 2**20)]
    ]
    tables = [_table(what, results) for what in UNITS]
    text = f", zarr {zarr.__version__}, h5py {h5py.__version__}; files in the page cache; median "
    text += f"of {rounds} interleaved rounds {ROUNDS}.\n\n"
    return Findings(text + "\n".join([*tables, targets_table(results)]), content=results)


def _amount(what: str, method: str, record_bytes: int, view_bytes: int) -> int:
    """Records or bytes that a call of a row reads."""
    batches = MANY if method in (RESIDENT, "np.memmap") else FEW
    return ROWS * batches if what == "256 rows" else view_bytes // record_bytes * record_bytes


def calls_of(folder: Path, record_bytes: int, view_bytes: int) -> dict[str, Calls]:
    """What is read -> ways to read it."""
    path, exported = logits_cache(folder, record_bytes, view_bytes), folder / "cache.h5"
    cache = TeacherCache.open(path)
    export_cache(path, exported)
    slab = cache.read_view(0, ["logits"])["logits"]
    slab.tofile(folder / "raw")
    mapped = np.memmap(folder / "raw", dtype=np.float16, mode="r", shape=slab.shape)
    array = zarr.open_array(path / "teacher.zarr" / "logits", mode="r")
    batches = [
        np.random.default_rng(seed).permutation(choice(seed, cache.num_samples, ROWS))
        for seed in range(MANY)
    ]
    resident, ids_of_batches = torch.from_numpy(slab), [torch.from_numpy(ids) for ids in batches]
    buffer = resident[:ROWS].clone()
    files = [str(file) for file in sorted((path / "teacher.zarr" / "logits").glob("c.*"))]

    def from_h5py(ids: NDArray[np.int64] | None = None) -> NDArray[np.float16]:
        with h5py.File(exported) as file:
            if ids is None:
                return np.asarray(file["logits"][0])
            order = np.argsort(ids)
            return np.asarray(file["logits"][0, ids[order]][np.argsort(order)])

    def cat() -> None:
        with open("/dev/null", "wb") as null:
            subprocess.run(["cat", *files], stdout=null, check=True)

    return {
        "slab": {
            OURS: lambda: cache.read_view(0, ["logits"]),
            "memcpy": slab.copy,
            "np.memmap": lambda: np.array(mapped),
            ZARR: lambda: array[0],
            "h5py contiguous": from_h5py,
        },
        "256 rows": {
            RESIDENT: lambda: [gather_rows(resident, ids, buffer) for ids in ids_of_batches],
            "np.memmap": lambda: [mapped[ids] for ids in batches],
            "h5py": lambda: [from_h5py(ids) for ids in batches[:FEW]],
            "cache.read": lambda: [cache.read(ids, 0, ["logits"]) for ids in batches[:FEW]],
            "zarr": lambda: [array.oindex[0, ids] for ids in batches[:FEW]],
        },
        "check": {"store check": cache.faults, "cat": cat},
    }


def _table(what: str, results: list[dict[str, object]]) -> str:
    unit, scale = UNITS[what]
    rows: dict[str, list[str]] = {}
    for found in results:
        if found["what"] == what:
            rate = _number(found, "per_second") / scale
            cell = f"{rate:,.{2 if scale > 1 else 0}f} ± {_number(found, 'spread'):.0%}"
            rows.setdefault(str(found["method"]), []).append(cell)
    header = [f"{what}, {unit}", *(f"{size // 1024} KB records" for size in RECORD_BYTES)]
    return markdown(header, [[method, *cells] for method, cells in rows.items()])


def _number(found: Mapping[str, object], key: str) -> float:
    return float(str(found[key]))


def targets_table(results: list[dict[str, object]]) -> str:
    """The targets, with a mark on each that was missed."""
    rate = {
        (each["what"], each["record_bytes"], each["method"]): _number(each, "per_second")
        for each in results
    }
    lines = []
    for size in RECORD_BYTES:
        ours, resident = rate["slab", size, OURS], rate["256 rows", size, RESIDENT]
        ratio = ours / rate["slab", size, ZARR]
        check = rate["check", size, "store check"] / rate["check", size, "cat"]
        is_fast = mark(ours >= 3e9 or ratio >= 2)
        lines.append(
            [
                f"{size // 1024} KB",
                f"{ours / 1e9:.2f} GB/s, {ratio:.1f} x zarr {is_fast}",
                f"{resident / 1e6:.2f} M/s {mark(resident >= 1e6)}",
                f"{check:.2f} {mark(check >= 0.7)}",
            ]
        )
    titles = ["records of", "slab: ≥ 3 GB/s or ≥ 2 x zarr", "resident rows: ≥ 1 M/s"]
    return markdown([*titles, "check / cat: ≥ 0.7"], lines)
