"""One small cache on an object store, written and looked at by tests."""

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
    """A pass: its own share, then what is left over; how many blocks that were."""
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
    """View and block -> how many lines it has."""
    found = filter(None, map(LINE.fullmatch, server.all_keys()))
    return Counter((match[1], match[2]) for match in found)


def seeds_of(cache: TeacherCache, seeds: int) -> list[int]:
    """For each chunk whose pass it stems from; fails if it is that of none."""
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
    """Complete and sound, each block with one line."""
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
