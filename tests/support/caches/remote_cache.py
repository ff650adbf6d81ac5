"""A small cache in an object store, written and inspected by tests."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

from teach_once.runtime.machine.urls import ObjectUrl, path_or_url
from teach_once.store import TeacherCache
from teach_once.store.write.bucket import RemoteWriter
from tests.support.caches.object_store import Server
from tests.support.caches.random_cache import open_any, records_of, write_item

CACHE = "caches/t-e4812202"
LINE = re.compile(rf"{CACHE}/journal/(\d+)/(\d+)/(\d+)\.jsonl")
NUM_BLOCKS = 6


def url() -> ObjectUrl:
    found = path_or_url(f"s3://bucket/{CACHE}")
    assert isinstance(found, ObjectUrl)
    return found


def opened(spool: Path, **changes: object) -> RemoteWriter:
    writer = open_any(url(), spool_folder=spool, **changes)
    assert isinstance(writer, RemoteWriter)
    return writer


def fill(spool: Path, seed: int = 0, **changes: object) -> int:
    """Run a pass: its own share, then the remaining blocks; returns the number of blocks."""
    with opened(spool, **changes) as writer:
        done, work = 0, writer.work
        while True:
            for item in work:
                for each in writer.outstanding([item]):
                    write_item(writer, each, seed)
                    done += 1
            if not (work := writer.left_over()):
                return done


def lines(server: Server) -> Counter[tuple[str, str]]:
    """Return {(view, block): number of lines}."""
    found = filter(None, map(LINE.fullmatch, server.all_keys()))
    return Counter((match[1], match[2]) for match in found)


def seeds_of(cache: TeacherCache, seeds: int) -> list[int]:
    """Return the seed of the pass that wrote each chunk; fails if there is none."""
    found = []
    for block in cache.manifest.blocks():
        rows = cache.read_block(block)
        for tap, values in rows.items():
            of = slice(block.start, block.stop)
            same = [s for s in range(seeds) if (records_of(block.view, of, s)[tap] == values).all()]
            assert same, (tap, block)
            found.append(same[0])
    return found


def assert_whole(server: Server, seeds: int = 1) -> TeacherCache:
    """Check that the cache is complete and valid, with one line per block, and open it."""
    cache = TeacherCache.open(url())
    assert cache.faults() == []
    assert set(seeds_of(cache, seeds)) <= set(range(seeds))
    assert set(lines(server).values()) <= {1}
    assert f"{CACHE}/journal/000001-0000.jsonl" in server.all_keys()
    return cache


def put(server: Server, key: str, content: bytes) -> None:
    server.ask("PUT", f"{CACHE}/{key}", content)


def flip(server: Server, key: str) -> None:
    content = bytearray(server.ask("GET", f"{CACHE}/{key}"))
    content[1] ^= 1
    put(server, key, bytes(content))
