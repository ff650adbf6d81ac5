"""Writing to an object store: by many writers at once, killed at any step, over bad lines."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from runtime.locks import Job
from runtime.urls import ObjectUrl, path_or_url
from store import CacheError, CacheMismatch, TeacherCache
from store.destination import Destination
from store.errors import SamplesChanged
from store.journal import parse_line
from store.mirror import attach
from store.objects import Objects, ObjectsUnreachable
from store.remote_journal import put_whole_journal, read_remote_journal
from store.remote_writer import RemoteWriter
from tests.support.object_store import SECRETS, Server, emptied, running
from tests.support.random_cache import LABELS, TAPS, open_any, records_of, write_item

CACHE = "caches/t-e4812202"
LINE = re.compile(rf"{CACHE}/journal/(\d+)/(\d+)/(\d+)\.jsonl")
NUM_BLOCKS, VIEWS = 6, 2
PLENTY = 10**9


@pytest.fixture(scope="module")
def running_server() -> Iterator[Server]:
    with running() as server:
        yield server


@pytest.fixture
def server(running_server: Server) -> Iterator[Server]:
    with emptied(running_server):
        yield running_server


@pytest.fixture
def spool(tmp_path: Path) -> Path:
    return tmp_path / "spool"


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


# ---- one writer


def test_a_pass_leaves_a_cache_that_opens_with_few_requests(
    server: Server, spool: Path, tmp_path: Path
) -> None:
    assert fill(spool) == NUM_BLOCKS
    assert len(lines(server)) == NUM_BLOCKS
    assert_whole(server)
    caches = path_or_url("s3://bucket/caches")
    assert isinstance(caches, ObjectUrl)
    server.requests.clear()
    folder = attach(caches, tmp_path / "mirror", PLENTY)
    TeacherCache.open(folder / "t-e4812202")
    assert 0 < len(server.requests) <= 8
    assert not any(LINE.search(path) for _, path in server.requests)


def test_a_pass_over_a_complete_cache_puts_nothing(server: Server, spool: Path) -> None:
    fill(spool)
    keys = server.all_keys()
    server.requests.clear()
    assert fill(spool) == 0
    assert server.all_keys() == keys
    assert [path for method, path in server.requests if method == "PUT"] == [
        "/bucket/caches/conditional-writes"
    ]


def test_what_is_committed_is_not_computed_again(server: Server, spool: Path) -> None:
    with opened(spool) as writer:
        for item in writer.work[:4]:
            write_item(writer, item)
    source = TeacherCache.open(url(), num_views=1).source
    assert not source.coverage.is_complete
    assert fill(spool) == NUM_BLOCKS - 4
    assert_whole(server)


def test_many_lines_are_read_once_and_then_from_one_object(
    server: Server, spool: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("store.remote_writer._MANY_LINES", 3)
    for _ in range(2):
        with opened(spool) as writer:
            for item in sorted(writer.work, key=lambda item: item.block)[:3]:
                write_item(writer, item)
        with opened(spool) as writer:
            server.requests.clear()
        with opened(spool) as writer:
            assert not any(LINE.search(path) for _, path in server.requests)
    assert writer.work == []
    assert fill(spool) == 0
    assert TeacherCache.open(url()).faults() == []


def test_a_cache_grows_beside_what_is_there(server: Server, spool: Path) -> None:
    fill(spool)
    assert fill(spool, num_views=3) == NUM_BLOCKS // 2
    cache = assert_whole(server)
    assert cache.num_views == 3
    server.requests.clear()
    TeacherCache.open(url())
    assert not any(LINE.search(path) for _, path in server.requests)
    assert fill(spool, num_views=2) == 0


def test_ranks_share_the_work_and_the_last_one_does_what_is_left(
    server: Server, spool: Path
) -> None:
    writers = [opened(spool, job=Job("j", rank, 3)) for rank in range(3)]
    shares = [{(i.block.view, i.block.index) for i in writer.work} for writer in writers]
    assert [len(share) for share in shares] == [2, 2, 2]
    assert len(set.union(*shares)) == NUM_BLOCKS
    assert len({writer.spool_folder for writer in writers}) == 3
    for writer in writers[1:]:  # the first one dies
        with writer:
            for item in writer.work:
                write_item(writer, item)
    with writers[0]:
        pass
    with opened(spool, job=Job("j", 1, 3)) as again:
        assert again.work == []
        assert {(i.block.view, i.block.index) for i in again.left_over()} == shares[0]
    assert fill(spool, job=Job("j", 1, 3)) == 2
    assert_whole(server)


# ---- several writers


def test_of_eight_writers_of_the_same_blocks_each_block_has_one(
    server: Server, spool: Path
) -> None:
    """Each rounds otherwise, as another device would: what one has put the others adopt."""
    start, errors = threading.Barrier(8), list[Exception]()

    def write(seed: int) -> None:
        try:
            with opened(spool) as writer:
                start.wait()
                for item in sorted(writer.work, key=lambda item: item.block):
                    write_item(writer, item, seed)
                while left := writer.left_over():
                    for item in left:
                        write_item(writer, item, seed)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(lines(server)) == NUM_BLOCKS
    assert_whole(server, seeds=8)


def test_a_block_that_another_writer_has_committed_is_not_computed(
    server: Server, spool: Path
) -> None:
    with opened(spool) as writer:
        first, second = writer.work[:2]
        with opened(spool) as other:
            write_item(other, first)
        assert writer.outstanding([first, second]) == [second]


def test_a_line_put_beside_an_older_whole_journal_still_counts(server: Server, spool: Path) -> None:
    with opened(spool) as writer:
        for item in writer.work[:-1]:
            write_item(writer, item)
        manifest, objects = writer.manifest, Objects(url())
        stale = read_remote_journal(objects, manifest)
        write_item(writer, writer.work[-1])
    put_whole_journal(objects, manifest, stale)  # by a writer that had looked before
    assert_whole(server)


# ---- what an interrupted writer leaves


def killed_after(spool: Path, server: Server, num_puts: int, *, is_done: bool) -> bool:
    """A pass whose process is gone after so many requests to put; whether it was.

    is_done: the store has carried out the last one.
    """
    count = 0

    def spoil(method: str, path: str, before: int) -> int | str | None:
        nonlocal count
        count += method == "PUT"
        if count <= num_puts:
            return None
        return "lost" if is_done and method == "PUT" and count == num_puts + 1 else 400

    server.spoil = spoil
    try:
        fill(spool, seed=1, num_views=1, block_rows=8)
    except CacheError:
        return True
    finally:
        server.spoil = lambda method, path, before: None
    return False


@pytest.mark.parametrize("is_done", [False, True])
def test_a_pass_killed_at_any_step_is_resumed(
    running_server: Server, spool: Path, is_done: bool
) -> None:
    steps = 0
    while True:
        with emptied(running_server) as server:
            if not killed_after(spool, server, steps, is_done=is_done):
                break
            committed = len(lines(server))
            assert fill(spool, seed=0, num_views=1, block_rows=8) == 2 - committed
            seeds = seeds_of(assert_whole(server, seeds=2), 2)
            assert sum(seeds) >= committed * len(TAPS)  # none of these is of the second pass
            steps += 1
    assert steps > 2 * 4  # more than the chunks and lines


def _fill_in_process(spool: Path) -> None:
    fill(spool, seed=1)


@pytest.mark.parametrize(
    "key", ["manifest.json", "logits/c.0.1.0", "journal/0/1/000001", "journal/000001-0000"]
)
def test_a_killed_process_loses_nothing_that_it_committed(
    server: Server, spool: Path, key: str
) -> None:
    process = multiprocessing.get_context("spawn").Process(target=_fill_in_process, args=(spool,))

    def spoil(method: str, path: str, before: int) -> str | None:
        if method == "PUT" and key in path and process.pid is not None:
            os.kill(process.pid, signal.SIGKILL)
            return "lost"
        return None

    server.spoil = spoil
    process.start()
    process.join()
    server.spoil = lambda method, path, before: None
    assert process.exitcode == -signal.SIGKILL
    committed = len(lines(server))
    assert fill(spool) == NUM_BLOCKS - committed
    assert_whole(server, seeds=2)


def test_chunks_without_a_line_are_adopted_if_they_are_whole(server: Server, spool: Path) -> None:
    with opened(spool) as writer:
        first = writer.work[0]
        write_item(writer, first, seed=1)
    server.ask("DELETE", f"{CACHE}/journal/0/0/000001.jsonl")
    flip(server, "teacher.zarr/logits/c.0.0.0")
    put(server, "teacher.zarr/stage1/c.0.0.0", b"short")
    assert fill(spool, seed=0) == NUM_BLOCKS
    seeds = seeds_of(assert_whole(server, seeds=2), 2)
    assert seeds[: len(TAPS)] == [0, 0, 1]  # logits and stage1 were replaced, correct adopted
    assert set(seeds[len(TAPS) :]) == {0}


# ---- bad lines


@pytest.mark.parametrize("fault", [500, 503, 409, "slow", "cut", "lost"])
def test_every_first_request_may_fail(server: Server, spool: Path, fault: int | str) -> None:
    server.spoil = lambda method, path, before: (
        None if before or (fault == 409 and method != "PUT") else fault
    )
    fill(spool, num_views=1)
    assert_whole(server)


def test_who_gives_up_names_bucket_and_key_and_no_secret(server: Server, spool: Path) -> None:
    server.spoil = lambda method, path, before: 503 if "logits/c.1.0.0" in path else None
    with pytest.raises(ObjectsUnreachable) as error:
        fill(spool)
    assert f"s3://bucket/{CACHE}/teacher.zarr/logits/c.1.0.0" in str(error.value)
    assert "it answered 503" in str(error.value)
    assert not any(secret in str(error.value) for secret in SECRETS)
    server.spoil = lambda method, path, before: None
    fill(spool)
    assert_whole(server)


def test_a_store_that_ignores_conditions_is_refused_before_anything_is_put(
    server: Server, spool: Path
) -> None:
    server.spoil = lambda method, path, before: "unconditional"
    with pytest.raises(CacheError, match="the store of s3://bucket/caches ignores conditions"):
        fill(spool)
    assert server.all_keys() == ["caches/conditional-writes"]


# ---- what does not belong together


def test_another_cache_under_the_same_name_is_refused(server: Server, spool: Path) -> None:
    fill(spool)
    keys = server.all_keys()
    with pytest.raises(CacheMismatch, match=f"s3://bucket/{CACHE} belongs to another"):
        fill(spool, labels=LABELS[::-1].copy())
    assert server.all_keys() == keys


def test_samples_that_changed_between_views_are_refused(server: Server, spool: Path) -> None:
    checksums = np.arange(len(LABELS), dtype=np.uint32)

    def write(writer: Destination, view: int, changed: int) -> None:
        for item in sorted(writer.work, key=lambda item: item.block):
            if item.block.view != view:
                continue
            rows = slice(item.block.start, item.block.stop)
            given = {**records_of(view, rows), "sample_crc32c": (checksums + changed)[rows]}
            writer.write_block(item.block, given)

    with opened(spool, sample_crc32c=True) as writer:
        write(writer, 0, 0)
        write(writer, 1, 0)
    with opened(spool, sample_crc32c=True, num_views=3) as writer:
        with pytest.raises(SamplesChanged) as error:
            write(writer, 2, 1)
        assert error.value.samples == [0, 1, 2, 3]
    assert ("2", "0") not in lines(server)


# ---- damage


@pytest.mark.parametrize("damage", ["flipped", "gone", "short", "exchanged"])
def test_a_damaged_chunk_is_found_named_and_mended(
    server: Server, spool: Path, damage: str
) -> None:
    fill(spool)
    key = "teacher.zarr/logits/c.1.0.0"
    other = server.ask("GET", f"{CACHE}/teacher.zarr/logits/c.1.1.0")
    change: dict[str, Callable[[], object]] = {
        "flipped": lambda: flip(server, key),
        "gone": lambda: server.ask("DELETE", f"{CACHE}/{key}"),
        "short": lambda: put(server, key, b"short"),
        "exchanged": lambda: put(server, key, other),
    }
    change[damage]()
    (fault,) = TeacherCache.open(url()).faults()
    assert (fault.tap, fault.view, fault.block) == ("logits", 1, 0)
    assert str(fault.file) == f"s3://bucket/{CACHE}/{key}"
    assert fill(spool, seed=1, check_every_byte=True) == 1
    cache = TeacherCache.open(url())
    assert cache.faults() == []
    seeds = seeds_of(cache, 2)
    assert seeds.count(1) == 1
    assert lines(server)["1", "0"] == 2


def test_damaged_documents_are_mended(server: Server, spool: Path) -> None:
    fill(spool)
    keys = ["manifest.json", "teacher.zarr/labels/c.0", "teacher.zarr/logits/zarr.json"]
    before = {key: server.ask("GET", f"{CACHE}/{key}") for key in keys}
    for key in keys:
        flip(server, key)
    with pytest.raises(CacheError, match=rf"s3://bucket/{CACHE}/manifest\.json is damaged") as e:
        TeacherCache.open(url())
    assert "make cache-teacher TEACHER=t RECHECK=1 CACHES=s3://bucket/caches" in str(e.value)
    assert fill(spool) == 0
    assert {key: server.ask("GET", f"{CACHE}/{key}") for key in keys} == before
    assert_whole(server)


def test_damaged_journals_cost_their_blocks_and_no_more(server: Server, spool: Path) -> None:
    fill(spool)
    put(server, "journal/000001-0000.jsonl", b"no line\n")
    flip(server, "journal/1/2/000001.jsonl")
    with pytest.raises(CacheError, match="journal damaged"):
        TeacherCache.open(url())
    assert fill(spool) == 1
    assert TeacherCache.open(url()).faults() == []
    text = server.ask("GET", f"{CACHE}/journal/1/2/000002.jsonl")
    line = parse_line(text[:-1])
    assert line is not None
    assert (line.view, line.block) == (1, 2)
