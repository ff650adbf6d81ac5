"""python -m benchmarks.objects [--slab-mb 256] [--records 4096] [--rounds 7]

How fast a view of a cache on an object store is read: through an empty mirror, beside obstore's own
GET of the same objects into memory; and through one that holds it, beside a local folder. How fast
a cache is copied there, beside obstore's own PUT. The server is in the memory of this machine
(`benchmarks.object_server`), so a network would make the GETs slower and the ratios better.
"""

from __future__ import annotations

import http.client
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from benchmarks.harness import Timing, Verdict, interleaved, machine, markdown, parser_of, publish
from benchmarks.object_server import object_server
from benchmarks.read import make_cache
from runtime.urls import ObjectUrl, path_or_url
from store import TeacherCache
from store.copy_cache import copy_cache
from store.mirror import attach
from store.objects import THREADS

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
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder, object_server() as bucket:
        local = make_cache(Path(folder), options.records, options.slab_mb << 20)
        timings = interleaved(rows(local, f"{bucket}/caches", Path(folder)), options.rounds)
        num_bytes = TeacherCache.open(local).nbytes
    text = (
        f"`python -m benchmarks.objects --slab-mb {options.slab_mb} --rounds {options.rounds}` on "
        f"{machine()}: a view of {options.slab_mb} MiB with records of {options.records:,} bytes, "
        f"{THREADS} requests at a time, from a server in another process's memory on the loopback "
        f"address; median of {options.rounds} interleaved rounds ± half the distance between the "
        f"quartiles.\n\n{table(timings, num_bytes)}"
    )
    publish(options, "Object stores", text, verdicts(timings))
    return 0


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

    def read_cold() -> None:
        chunk = cold / url.bucket / url.key / there.name / "teacher.zarr/logits"
        shutil.rmtree(chunk, ignore_errors=True)
        TeacherCache.open(attach(url, cold, _PLENTY) / there.name).read_view(0)

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
        "warm": lambda: warm.read_view(0),
        "local": lambda: opened.read_view(0),
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


def table(timings: dict[str, Timing], num_bytes: int) -> str:
    lines = [
        [name, f"{num_bytes / 1e6 / timings[key].median:,.0f} ± {timings[key].spread:.0%}"]
        for key, name in ROWS.items()
    ]
    return markdown(["", "MB/s"], lines)


def verdicts(timings: dict[str, Timing]) -> list[Verdict]:
    def speed(of: str, to: str) -> float:
        return timings[to].ratio_to(timings[of])

    cold, warm = speed("cold", "get"), speed("warm", "local")
    return [
        Verdict("an empty mirror ÷ GET", cold, f"≥ {TARGET_COLD}", lambda v: v >= TARGET_COLD),
        Verdict("a full mirror ÷ local", warm, f"≥ {TARGET_WARM}", lambda v: v >= TARGET_WARM),
        Verdict("store copy ÷ PUT", speed("copy", "put")),
    ]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
