"""python -m benchmarks objects [--slab-mb 256] [--records 4096] [--rounds 7] [--network-mb 250]

How fast a view of a cache on an object store is read: through an empty mirror, next to obstore's
own GET of the same objects into memory; and through one that holds it, next to a local folder. How
fast a cache is copied there, next to obstore's own PUT. The server is in the memory of this machine
(`synthetic.object_server`): it answers as fast as it can, where it takes half of the processor, and
no faster than a network does.

numpy asks Linux for huge pages. Just after files were written there may be none, and the kernel
then moves memory until there are: on a virtual machine with 24 GB, a view of 256 MiB that had just
been fetched took 1.1 to 1.6 seconds to read, and 0.15 to 0.26 without them. That has nothing to do
with object stores, so they are turned off here.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import tempfile
import urllib.request
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.harness import ROUNDS, Findings, Timing, Verdict, interleaved, markdown, timed
from benchmarks.synthetic.caches import logits_cache
from benchmarks.synthetic.object_server import BUCKET, object_server
from teach_once.runtime.machine.urls import ObjectUrl, path_or_url
from teach_once.store import TeacherCache
from teach_once.store.move.copy import copy_cache
from teach_once.store.place.bucket import THREADS
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
_PLENTY = 10**12  # bytes of a mirror


def measure(
    slab_mb: int = 256, records: int = 4096, rounds: int = 7, network_mb: int = 250
) -> Findings:
    """slab_mb: of a view. records: bytes of one. network_mb: per second."""
    os.environ["NUMPY_MADVISE_HUGEPAGE"] = "0"  # for the new processes
    rates = {"loopback": 0, f"{network_mb} MB/s": network_mb}
    found = {name: in_new_process(rate, slab_mb, records, rounds) for name, rate in rates.items()}
    megabytes = (slab_mb << 20) / 1e6
    lines = [
        [label, *(t[row].format_rate(megabytes) if row in t else "" for t in found.values())]
        for row, label in ROWS.items()
    ]
    text = (
        f": a view of {slab_mb} MiB with records of {records:,} bytes, {THREADS} requests at a "
        f"time, from a server in another process's memory: on the loopback address, and sending "
        f"no more than {network_mb} MB/s. Median of {rounds} interleaved rounds {ROUNDS}. On the "
        f"loopback address the server and the reader share the cores. numpy asks for no huge "
        f"pages: see benchmarks/targets/objects.py.\n\n{markdown(['MB/s', *found], lines)}"
    )
    verdicts = []
    for name, t in found.items():
        cold, warm = t["get"].ratio_to(t["cold"]), t["local"].ratio_to(t["warm"])
        verdicts.append(Verdict(f"{name}: empty mirror ÷ GET", cold, at_least=0.8))
        verdicts.append(Verdict(f"{name}: full mirror ÷ local", warm, at_least=0.95))
        if "copy" in t:
            copying = t["put"].ratio_to(t["copy"])
            verdicts.append(Verdict(f"{name}: store copy ÷ PUT", copying))
    return Findings(text, verdicts)


def in_new_process(rate: int, slab_mb: int, records: int, rounds: int) -> dict[str, Timing]:
    """`measured` there, because a process keeps the clients of its first server."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(measured, rate, slab_mb, records, rounds).result()


def measured(rate: int, slab_mb: int, records: int, rounds: int) -> dict[str, Timing]:
    """Seconds of each of ROWS. rate: of the server, MB/s; with one, PUTs are left out."""
    with tempfile.TemporaryDirectory() as folder, object_server(rate) as bucket:
        local = logits_cache(Path(folder), records, slab_mb << 20)
        calls = rows(local, f"{bucket}/caches", Path(folder))
        if rate:
            calls = {name: call for name, call in calls.items() if name not in ("put", "copy")}
        return interleaved(calls, rounds)


def rows(local: Path, caches: str, folder: Path) -> dict[str, Callable[[], object]]:
    """The timed calls, of the cache at `local`, which is first copied to the URL `caches`."""
    url = path_or_url(caches)
    assert isinstance(url, ObjectUrl)
    opened = TeacherCache.open(local)
    there, _ = copy_cache(opened, url)
    chunks = sorted(local.glob("teacher.zarr/logits/c.*"))
    contents = {str(chunk.relative_to(local)): chunk.read_bytes() for chunk in chunks}
    warm = TeacherCache.open(attach(url, folder / "warm", _PLENTY) / there.name)

    def read_cold() -> float:
        shutil.rmtree(folder / "cold", ignore_errors=True)
        cache = TeacherCache.open(attach(url, folder / "cold", _PLENTY) / there.name)
        return timed(lambda: read(cache))()

    def read(cache: TeacherCache) -> None:
        cache.read_view(0)  # whose memory is free before the next row is timed

    def put() -> None:
        client = store_client("put")
        with ThreadPoolExecutor(THREADS) as pool:
            list(
                pool.map(lambda key: client.put(key, contents[key], use_multipart=False), contents)
            )

    def get() -> None:
        client = store_client(f"{url.key}/{there.name}")
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(lambda key: client.get(key).bytes(), contents))

    def copy() -> float:
        remove_all("copy")
        return timed(lambda: copy_cache(opened, path_or_url(f"s3://{BUCKET}/copy")))()

    return {
        "get": get,
        "cold": read_cold,
        "warm": lambda: read(warm),
        "local": lambda: read(opened),
        "put": put,
        "copy": copy,
    }


def store_client(prefix: str) -> Any:
    """obstore's own, below the bucket."""
    from obstore.store import S3Store

    return S3Store(BUCKET, prefix=prefix or None)


def remove_all(prefix: str) -> None:
    """Remove the objects below it one by one; the server has no request for several."""
    found = [each["path"] for page in store_client("").list(prefix) for each in page]
    for path in found:
        address = f"{os.environ['AWS_ENDPOINT_URL']}/{BUCKET}/{path}"
        urllib.request.urlopen(urllib.request.Request(address, method="DELETE")).close()
