"""python -m benchmarks objects [--slab-mb 256] [--records 4096] [--rounds 7] [--network-mb 250]

How fast a view of a cache on an object store is read: through an empty mirror, beside obstore's own
GET of the same objects into memory; and through one that holds it, beside a local folder. How fast
a cache is copied there, beside obstore's own PUT. The server is in the memory of this machine
(`synthetic.object_server`): as fast as it can, where it takes half of the processor, and answering
no faster than a network does.

numpy asks Linux for huge pages. Just after files were written there may be none, and the kernel
then moves memory until there are: on a virtual machine with 24 GB, a view of 256 MiB that had just
been fetched took 1.1 to 1.6 seconds to read, and 0.15 to 0.26 without them. That is no matter of
object stores, so they are turned off here.
"""

from __future__ import annotations

import http.client
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from benchmarks.harness import Timing, Verdict, interleaved, machine, markdown, parser_of, publish
from benchmarks.synthetic.object_server import object_server
from benchmarks.targets.read import make_cache
from teach_once.runtime.machine.urls import ObjectUrl, path_or_url
from teach_once.store import TeacherCache
from teach_once.store.move.copy import copy_cache
from teach_once.store.place.bucket import THREADS
from teach_once.store.read.mirror import attach

ROWS = {
    "get": "GET, obstore alone, into memory",
    "cold": "read_view through an empty mirror",
    "warm": "read_view through a mirror that holds it",
    "local": "read_view of a local folder",
    "put": "PUT, obstore alone",
    "copy": "store copy to the bucket, every checksum compared",
}
TARGET_COLD, TARGET_WARM = 0.8, 0.95
_PLENTY = 10**12  # bytes of a mirror


def main(arguments: list[str]) -> int:
    parser = parser_of("objects", __doc__)
    parser.add_argument("--slab-mb", type=int, default=256, help="of a view")
    parser.add_argument("--records", type=int, default=4096, help="bytes of a record")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--network-mb", type=int, default=250, help="a second")
    options = parser.parse_args(arguments)
    rates = {"loopback": 0, f"{options.network_mb} MB/s": options.network_mb}
    sizes = options.slab_mb << 20, options.records
    os.environ["NUMPY_MADVISE_HUGEPAGE"] = "0"  # for the new processes
    found = {name: in_new_process(rate, *sizes, options.rounds) for name, rate in rates.items()}
    text = (
        f"`python -m benchmarks objects --slab-mb {options.slab_mb} --rounds {options.rounds}` on "
        f"{machine()}: a view of {options.slab_mb} MiB with records of {options.records:,} bytes, "
        f"{THREADS} requests at a time, from a server in another process's memory: on the loopback "
        f"address, and sending no more than {options.network_mb} MB/s. Median of {options.rounds} "
        f"interleaved rounds ± half the distance between the quartiles. On the loopback address "
        f"the server and the reader share the cores. numpy asks for no huge pages: see "
        f"benchmarks/objects.py.\n\n"
        f"{table(found, options.slab_mb << 20)}"
    )
    verdicts = [each for name, timings in found.items() for each in verdicts_of(name, timings)]
    publish(options, "Object stores", text, verdicts)
    return 0


def in_new_process(rate: int, slab: int, records: int, rounds: int) -> dict[str, Timing]:
    """`measured` there, because a process keeps the clients of its first server."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(measured, rate, slab, records, rounds).result()


def measured(rate: int, slab: int, records: int, rounds: int) -> dict[str, Timing]:
    """Seconds of each of ROWS. rate: of the server, MB/s; with one, PUTs are left out."""
    with tempfile.TemporaryDirectory() as folder, object_server(rate) as bucket:
        local = make_cache(Path(folder), records, slab)
        timed = rows(local, f"{bucket}/caches", Path(folder))
        if rate:
            timed = {name: run for name, run in timed.items() if name not in ("put", "copy")}
        return interleaved(timed, rounds)


def rows(local: Path, caches: str, folder: Path) -> dict[str, Callable[[], object]]:
    """What is timed, of the cache at `local`, which is first copied to the URL `caches`."""
    url = path_or_url(caches)
    assert isinstance(url, ObjectUrl)
    opened = TeacherCache.open(local)
    there, _ = copy_cache(opened, url)
    chunks = sorted(local.glob("teacher.zarr/logits/c.*"))
    keys = [str(chunk.relative_to(local)) for chunk in chunks]
    contents = {key: chunk.read_bytes() for key, chunk in zip(keys, chunks, strict=True)}
    warm = TeacherCache.open(attach(url, folder / "warm", _PLENTY) / there.name)
    cold = folder / "cold"

    def read_cold() -> float:
        """Timed without emptying the mirror and opening the cache."""
        shutil.rmtree(cold, ignore_errors=True)
        cache = TeacherCache.open(attach(url, cold, _PLENTY) / there.name)
        started = time.perf_counter()
        cache.read_view(0)
        return time.perf_counter() - started

    def read(cache: TeacherCache) -> None:
        cache.read_view(0)  # whose memory is free before the next row is timed

    def put() -> None:
        client = store_client("put")
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(lambda key: client.put(key, contents[key], use_multipart=False), keys))

    def get() -> None:
        client = store_client(f"{url.key}/{there.name}")
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(lambda key: client.get(key).bytes(), keys))

    def copy() -> float:
        """Timed without removing the copy before."""
        remove_all("copy")
        started = time.perf_counter()
        copy_cache(opened, path_or_url("s3://bucket/copy"))
        return time.perf_counter() - started

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

    return S3Store("bucket", prefix=prefix or None)


def remove_all(prefix: str) -> None:
    """Remove the objects below it; the server knows no request for several."""
    server = http.client.HTTPConnection(urlsplit(os.environ["AWS_ENDPOINT_URL"]).netloc)
    found = [each["path"] for page in store_client("").list(prefix) for each in page]
    for path in found:
        server.request("DELETE", f"/bucket/{path}")
        server.getresponse().read()
    server.close()


def table(found: dict[str, dict[str, Timing]], num_bytes: int) -> str:
    lines = [
        [name, *(_speed(timings.get(key), num_bytes) for timings in found.values())]
        for key, name in ROWS.items()
    ]
    return markdown(["MB/s", *found], lines)


def _speed(timing: Timing | None, num_bytes: int) -> str:
    if timing is None:
        return ""
    return f"{num_bytes / 1e6 / timing.median:,.0f} ± {timing.spread:.0%}"


def verdicts_of(name: str, timings: dict[str, Timing]) -> list[Verdict]:
    def speed(of: str, to: str) -> float:
        return timings[to].ratio_to(timings[of])

    cold, warm = speed("cold", "get"), speed("warm", "local")
    found = [
        Verdict(f"{name}: empty mirror ÷ GET", cold, f"≥ {TARGET_COLD}", _is_cold_met),
        Verdict(f"{name}: full mirror ÷ local", warm, f"≥ {TARGET_WARM}", _is_warm_met),
    ]
    if "copy" in timings:
        found.append(Verdict(f"{name}: store copy ÷ PUT", speed("copy", "put")))
    return found


def _is_cold_met(value: float) -> bool:
    return value >= TARGET_COLD


def _is_warm_met(value: float) -> bool:
    return value >= TARGET_WARM


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
