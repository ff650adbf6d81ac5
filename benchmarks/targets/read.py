"""python -m benchmarks read [--slab-mb 400] [--rounds 7] [--docs docs/benchmarks.md]

How fast a cache is read: one view's slab, 256 random rows, and a check of every byte; beside
memcpy, np.memmap, plain zarr slicing, h5py and `cat`, from the page cache.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import torch
import zarr
from numpy.typing import NDArray

from benchmarks.harness import Timing, interleaved, machine, markdown, write_json, write_section
from teach_once.store import CacheContent, CacheWriter, TapSpec, TeacherCache
from teach_once.store.move.hdf5 import export_cache
from teach_once.train.outputs.device_copies import gather_rows
from teach_once.views.seeds import choice

RECORD_BYTES = (2048, 4096, 8192)
ROWS = 256
MANY, FEW = 128, 2  # batches per timing, of the fast methods and of the slow ones
RESIDENT = "the resident slab (the feed's gather)"
TARGET_GBS, TARGET_RATIO, TARGET_RECORDS, TARGET_CHECK = 3.0, 2.0, 1e6, 0.7


def make_cache(folder: Path, record_bytes: int, view_bytes: int) -> Path:
    """One view of random float16 logits of that size."""
    num_samples = view_bytes // record_bytes
    taps = {"logits": TapSpec((record_bytes // 2,), "float16")}
    content = CacheContent(
        teacher="bench",
        identity={"record_bytes": record_bytes},
        taps=taps,
        labels=np.zeros(num_samples, dtype=np.int64),
        num_views=1,
        class_names=list(map(str, range(record_bytes // 2))),
        canary={},
        preview=np.zeros((1, 1, 1, 1), dtype=np.uint8),
        versions={},
    )
    rng = np.random.default_rng(0)
    path = folder / f"cache-{record_bytes}"
    with CacheWriter.open(path, content) as writer:
        for item in writer.work:
            shape = (item.block.rows, record_bytes // 2)
            values = rng.integers(0, 2**14, shape, dtype=np.uint16).view(np.float16)
            writer.write_block(item.block, {"logits": values})
    return path


def slab_rows(path: Path, exported: Path, raw: Path) -> dict[str, Callable[[], object]]:
    """Ways to get one view's slab into memory."""
    cache = TeacherCache.open(path)
    source = np.fromfile(raw, dtype=np.float16).reshape(cache.num_samples, -1)
    mapped = np.memmap(raw, dtype=np.float16, mode="r", shape=source.shape)
    array = zarr.open_array(path / "teacher.zarr" / "logits", mode="r")

    def from_h5py() -> NDArray[np.float16]:
        with h5py.File(exported) as file:
            rows: NDArray[np.float16] = file["logits"][0]
        return rows

    return {
        "read_view (checksums verified)": lambda: cache.read_view(0, ["logits"]),
        "memcpy": source.copy,
        "np.memmap": lambda: np.array(mapped),
        "zarr slicing (checksums verified)": lambda: array[0],
        "h5py contiguous": from_h5py,
    }


def random_rows(path: Path, exported: Path, raw: Path) -> dict[str, Callable[[], object]]:
    """Ways to get 256 random records in the order asked for, other ones each time."""
    cache = TeacherCache.open(path)
    batches = [
        np.random.default_rng(seed).permutation(choice(seed, cache.num_samples, ROWS))
        for seed in range(MANY)
    ]
    slab = cache.read_view(0, ["logits"])["logits"]
    resident, wanted = torch.from_numpy(slab), [torch.from_numpy(ids) for ids in batches]
    buffer = resident[:ROWS].clone()
    mapped = np.memmap(raw, dtype=np.float16, mode="r", shape=slab.shape)
    array = zarr.open_array(path / "teacher.zarr" / "logits", mode="r")

    def from_h5py(ids: NDArray[np.int64]) -> NDArray[np.float16]:
        order = np.argsort(ids)
        with h5py.File(exported) as file:
            rows: NDArray[np.float16] = file["logits"][0, ids[order]]
        return rows[np.argsort(order)]

    return {
        RESIDENT: lambda: [gather_rows(resident, ids, buffer) for ids in wanted],
        "np.memmap": lambda: [mapped[ids] for ids in batches],
        "h5py": lambda: [from_h5py(ids) for ids in batches[:FEW]],
        "cache.read": lambda: [cache.read(ids, 0, ["logits"]) for ids in batches[:FEW]],
        "zarr": lambda: [array.oindex[0, ids] for ids in batches[:FEW]],
    }


def check_rows(path: Path) -> dict[str, Callable[[], object]]:
    """A check of every byte, and reading the same files with `cat`."""
    cache = TeacherCache.open(path)
    files = [str(file) for file in sorted((path / "teacher.zarr" / "logits").glob("c.*"))]

    def cat() -> None:
        with open("/dev/null", "wb") as null:
            subprocess.run(["cat", *files], stdout=null, check=True)

    return {"store check": cache.faults, "cat": cat}


def measure(view_bytes: int, rounds: int) -> list[dict[str, object]]:
    """One dict per row: what, record size, method, median seconds, spread, figure and its unit."""
    results: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder:
        for record_bytes in RECORD_BYTES:
            path = make_cache(Path(folder), record_bytes, view_bytes)
            exported, raw = Path(folder) / "cache.h5", Path(folder) / "raw"
            export_cache(path, exported)
            slab = TeacherCache.open(path).read_view(0)["logits"]
            slab.tofile(raw)
            for what, rows in (
                ("slab", slab_rows(path, exported, raw)),
                ("256 rows", random_rows(path, exported, raw)),
                ("check", check_rows(path)),
            ):
                timings = interleaved(rows, rounds)
                for name, timing in timings.items():
                    many = MANY if name in (RESIDENT, "np.memmap") else FEW
                    amount = ROWS * many if what == "256 rows" else slab.nbytes
                    results.append(_row(what, record_bytes, name, timing, amount))
    return results


def _row(what: str, record_bytes: int, name: str, timing: Timing, amount: int) -> dict[str, object]:
    return {
        "what": what,
        "record_bytes": record_bytes,
        "method": name,
        "seconds": timing.median,
        "spread": timing.spread,
        "per_second": amount / timing.median,
        "unit": "records" if what == "256 rows" else "bytes",
    }


def report(results: list[dict[str, object]]) -> str:
    """Tables, and the targets with a mark on each that was missed."""
    parts = []
    for what, unit, scale in (
        ("slab", "GB/s", 1e9),
        ("256 rows", "records/s", 1),
        ("check", "GB/s", 1e9),
    ):
        methods = list(dict.fromkeys(str(r["method"]) for r in results if r["what"] == what))
        rows = []
        for method in methods:
            cells = [r for r in results if r["what"] == what and r["method"] == method]
            figures = [
                f"{float(str(c['per_second'])) / scale:,.{2 if scale > 1 else 0}f} "
                f"± {100 * float(str(c['spread'])):.0f} %"
                for c in cells
            ]
            rows.append([method, *figures])
        header = [f"{what}, {unit}", *(f"{size // 1024} KB records" for size in RECORD_BYTES)]
        parts.append(markdown(header, rows))
    return "\n".join([*parts, _targets(results)])


def _targets(results: list[dict[str, object]]) -> str:
    def figure(what: str, size: int, method: str) -> float:
        (row,) = (
            r
            for r in results
            if (r["what"], r["record_bytes"], r["method"]) == (what, size, method)
        )
        return float(str(row["per_second"]))

    lines = []
    for size in RECORD_BYTES:
        ours = figure("slab", size, "read_view (checksums verified)")
        ratio = ours / figure("slab", size, "zarr slicing (checksums verified)")
        records = figure("256 rows", size, RESIDENT)
        check = figure("check", size, "store check") / figure("check", size, "cat")
        met = ours >= TARGET_GBS * 1e9 or ratio >= TARGET_RATIO
        lines.append(
            [
                f"{size // 1024} KB",
                f"{ours / 1e9:.2f} GB/s, {ratio:.1f} x zarr {_mark(met)}",
                f"{records / 1e6:.2f} M/s {_mark(records >= TARGET_RECORDS)}",
                f"{check:.2f} {_mark(check >= TARGET_CHECK)}",
            ]
        )
    header = [
        "records of",
        "slab: ≥ 3 GB/s or ≥ 2 x zarr",
        "resident rows: ≥ 1 M/s",
        "check / cat: ≥ 0.7",
    ]
    return markdown(header, lines)


def _mark(met: bool) -> str:
    return "✓" if met else "✗ missed"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--slab-mb", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--docs", type=Path, default=Path("docs/benchmarks.md"))
    parser.add_argument("--json", type=Path, default=Path("runs/benchmarks/read.json"))
    options = parser.parse_args(arguments)
    results = measure(options.slab_mb * 2**20, options.rounds)
    body = (
        f"`python -m benchmarks read --slab-mb {options.slab_mb} --rounds {options.rounds}` on "
        f"{machine()}, zarr {zarr.__version__}, h5py {h5py.__version__}; files in the page cache; "
        f"median of {options.rounds} interleaved rounds ± half the distance between the "
        f"quartiles.\n\n{report(results)}"
    )
    print(body)
    write_section(options.docs, "Reading a cache", body)
    write_json(options.json, results)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
