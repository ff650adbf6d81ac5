"""How fast a view of a cache in an object store is read, and a cache copied there.

Reading through an empty mirror is compared with obstore's GET of the same objects into memory,
reading through a full mirror with a local folder, and copying with obstore's PUT. The server is in
this machine's memory (`synthetic.object_server`): at the full rate of the loopback address, where
it takes half of the processor, and limited to a network's rate.

numpy requests huge pages. Right after files were written there may be none, and the kernel then
compacts memory: on a virtual machine with 24 GB, a view of 256 MiB that had just been
fetched took 1.1 to 1.6 seconds to read, and 0.15 to 0.26 without them. They are disabled here.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from pathlib import Path

from benchmarks.harness import ROUNDS, Findings, Timing, Verdict, interleaved, table_of, timed
from benchmarks.synthetic.caches import logits_cache
from benchmarks.synthetic.object_server import BUCKET, object_server
from teach_once.runtime.machine.urls import ObjectUrl, path_or_url
from teach_once.store import TeacherCache
from teach_once.store.move.copy import copy_cache
from teach_once.store.place.bucket import THREADS, Bucket
from teach_once.store.read.mirror import attach

TITLE = "Object stores"
ROWS = {
    "get": "GET, obstore alone, into memory",
    "cold": "read_view through an empty mirror",
    "warm": "read_view through a mirror that holds it",
    "local": "read_view of a local folder",
    "put": "PUT, obstore alone",
    "copy": "store copy to the bucket, every checksum compared",
}
_MIRROR_BYTES = 10**12


def measure(
    slab_mb: int = 256, records: int = 4096, rounds: int = 7, network_mb: int = 250
) -> Findings:
    """Time all rows. slab_mb: MiB per view. records: bytes of each. network_mb: MB per second."""
    os.environ["NUMPY_MADVISE_HUGEPAGE"] = "0"  # for the new processes
    rates = {"loopback": 0, f"{network_mb} MB/s": network_mb}
    found = dict[str, dict[str, Timing]]()
    for name, rate in rates.items():
        # In a new process, because a process keeps the clients of its first server.
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            found[name] = pool.submit(seconds_of, rate, slab_mb, records, rounds).result()
    megabytes = (slab_mb << 20) / 1e6
    text = (
        f": a view of {slab_mb} MiB with records of {records:,} bytes, {THREADS} requests at a "
        f"time, from a server in another process's memory: on the loopback address, and sending "
        f"no more than {network_mb} MB/s. Median of {rounds} interleaved rounds {ROUNDS}. On the "
        f"loopback address the server and the reader share the cores. numpy requests no huge "
        f"pages: see benchmarks/targets/objects.py.\n\n"
    )
    verdicts = []
    for name, t in found.items():
        cold, warm = t["get"].ratio_to(t["cold"]), t["local"].ratio_to(t["warm"])
        verdicts.append(Verdict(f"{name}: empty mirror ÷ GET", cold, at_least=0.8))
        verdicts.append(Verdict(f"{name}: full mirror ÷ local", warm, at_least=0.95))
        if "copy" in t:
            verdicts.append(Verdict(f"{name}: store copy ÷ PUT", t["put"].ratio_to(t["copy"])))
    table = table_of("MB/s", ROWS, found, lambda timing: timing.format_rate(megabytes))
    return Findings(text + table, verdicts)


def seconds_of(rate: int, slab_mb: int, records: int, rounds: int) -> dict[str, Timing]:
    """Time each of ROWS. rate: the server's MB/s; PUTs are timed only without a limit (0)."""
    with tempfile.TemporaryDirectory() as folder, object_server(rate):
        local = logits_cache(Path(folder), records, slab_mb << 20)
        calls = rows_of(local, Path(folder))
        for name in ("put", "copy") if rate else ():
            del calls[name]
        return interleaved(calls, rounds)


def rows_of(local: Path, folder: Path) -> dict[str, Callable[[], object]]:
    """Copy the cache at `local` to the bucket and return the timed calls."""
    from obstore.store import S3Store

    url, copied = (path_or_url(f"s3://{BUCKET}/{name}") for name in ("caches", "copy"))
    assert isinstance(url, ObjectUrl)
    assert isinstance(copied, ObjectUrl)
    cache, copies = TeacherCache.open(local), Bucket(copied)
    remote, _ = copy_cache(cache, url)
    chunks = sorted(local.glob("teacher.zarr/logits/c.*"))
    contents = {str(chunk.relative_to(local)): chunk.read_bytes() for chunk in chunks}

    def mirrored(name: str) -> TeacherCache:
        return TeacherCache.open(attach(url, folder / name, _MIRROR_BYTES) / remote.name)

    def read_cold() -> float:
        shutil.rmtree(folder / "cold", ignore_errors=True)
        empty = mirrored("cold")
        return timed(lambda: read(empty))()

    def read(cache: TeacherCache) -> None:
        cache.read_view(0)  # its memory is freed before the next row is timed

    def put() -> None:
        client = S3Store(BUCKET, prefix="put")
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(partial(client.put, use_multipart=False), contents, contents.values()))

    def get() -> None:
        client = S3Store(BUCKET, prefix=f"{url.key}/{remote.name}")
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(lambda key: client.get(key).bytes(), contents))

    def copy() -> float:
        for each in list(copies.list_files()):
            copies.delete(each.key)
        return timed(lambda: copy_cache(cache, copied))()

    warm = mirrored("warm")
    reads = {"cold": read_cold, "warm": lambda: read(warm), "local": lambda: read(cache)}
    return {"get": get, **reads, "put": put, "copy": copy}
