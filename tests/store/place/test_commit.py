"""Writing to an object store, by one or many writers, killed at any step."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest

from teach_once.runtime.machine.urls import ObjectUrl, path_or_url
from teach_once.runtime.safe.locks import Job
from teach_once.store import CacheError, TeacherCache
from teach_once.store.place.bucket import Bucket
from teach_once.store.place.bucket_log import put_whole_journal, read_remote_journal
from teach_once.store.read.mirror import attach
from tests.support.caches.object_store import Server, emptied
from tests.support.caches.random_cache import TAPS, write_item
from tests.support.caches.remote_cache import (
    CACHE,
    LINE,
    NUM_BLOCKS,
    assert_whole,
    fill,
    flip,
    lines,
    opened,
    put,
    seeds_of,
    url,
)
from tests.support.programs.processes import Forks

PLENTY = 10**9


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
    monkeypatch.setattr("teach_once.store.write.bucket._MANY_LINES", 3)
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


def test_a_line_that_is_no_line_keeps_nobody_from_committing(server: Server, spool: Path) -> None:
    with opened(spool) as writer:
        put(server, "journal/0/0/000001.jsonl", b"torn")
        for item in writer.work:
            write_item(writer, item)
        assert writer.left_over() == []
    assert TeacherCache.open(url()).faults() == []
    assert lines(server)["0", "0"] == 2


def test_what_is_measured_does_not_undo_what_another_pass_has_planned(
    server: Server, spool: Path
) -> None:
    fill(spool)
    before = server.ask("GET", f"{CACHE}/manifest.json")
    fill(spool, num_views=3)
    after = server.ask("GET", f"{CACHE}/manifest.json")
    put(server, "manifest.json", before)

    def grow(method: str, path: str, num_before: int) -> None:
        if method == "PUT" and path.endswith("manifest.json") and not num_before:
            put(server, "manifest.json", after)  # between this writer's look and its put

    with opened(spool) as writer:
        server.requests.clear()
        server.spoil = grow
        writer.finish({"images_per_second": 1.0})
    cache = TeacherCache.open(url())
    assert (cache.num_views, cache.measured) == (3, {"images_per_second": 1.0})


def test_a_pass_that_begins_while_another_one_grows_the_cache_leaves_its_metadata(
    server: Server, spool: Path
) -> None:
    fill(spool)
    before = {key: server.ask("GET", key) for key in server.all_keys() if key.endswith(".json")}
    fill(spool, num_views=3)
    after = {key: server.ask("GET", key) for key in before}
    for key, content in before.items():
        server.ask("PUT", key, content)

    def grow(method: str, path: str, num_before: int) -> None:
        if method == "GET" and path.endswith("logits/zarr.json") and not num_before:
            for key, content in after.items():
                server.ask("PUT", key, content)

    server.requests.clear()
    server.spoil = grow
    with opened(spool) as writer:
        assert writer.manifest.num_views == 3
    assert {key: server.ask("GET", key) for key in before} == after


def test_a_block_is_mended_though_another_pass_repeats_its_old_line(
    server: Server, spool: Path
) -> None:
    fill(spool)
    flip(server, "teacher.zarr/logits/c.0.0.0")
    with opened(spool, check_every_byte=True) as writer:
        (item,) = writer.work
        fill(spool, num_views=3)  # and puts a journal that is newer than this writer's line
        write_item(writer, item, seed=1)
        assert writer.left_over() == [item]
        write_item(writer, item, seed=1)
        assert writer.left_over() == []
    server.requests.clear()
    cache = TeacherCache.open(url())
    assert sum("journal" in path for _, path in server.requests) == 2  # its names, and the newest
    assert cache.num_views == 3
    assert cache.faults() == []


def test_a_damaged_chunk_that_another_writer_replaces_first_is_adopted(
    server: Server, spool: Path
) -> None:
    fill(spool)
    key = "teacher.zarr/logits/c.0.0.0"
    sound = server.ask("GET", f"{CACHE}/{key}")
    flip(server, key)
    theirs = server.ask("GET", f"{CACHE}/teacher.zarr/logits/c.1.0.0")

    def overtake(method: str, path: str, num_before: int) -> None:
        if method == "PUT" and path.endswith(key) and num_before == 1:  # it was there: replace it
            put(server, key, theirs)

    with opened(spool, check_every_byte=True) as writer:
        (item,) = writer.work
        server.requests.clear()
        server.spoil = overtake
        write_item(writer, item)
        assert writer.left_over() == []
    assert server.ask("GET", f"{CACHE}/{key}") == theirs != sound
    assert TeacherCache.open(url()).faults() == []


def test_a_line_put_beside_an_older_whole_journal_still_counts(server: Server, spool: Path) -> None:
    with opened(spool) as writer:
        for item in writer.work[:-1]:
            write_item(writer, item)
        manifest, objects = writer.manifest, Bucket(url())
        stale = read_remote_journal(objects, manifest)
        write_item(writer, writer.work[-1])
    put_whole_journal(objects, manifest, stale)  # by a writer that had looked before
    assert_whole(server)


# ---- what an interrupted writer leaves


def is_killed(spool: Path, server: Server, num_puts: int, num_views: int, *, is_done: bool) -> bool:
    """Whether a pass ends after so many requests to put, as a killed process does.

    is_done: the store has carried out one more.
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
        fill(spool, seed=1, num_views=num_views, block_rows=8)
    except CacheError:
        return True
    finally:
        server.spoil = lambda method, path, before: None
    return False


# Of the steps every third, each in one of the three; all of them in `make test-long`.
EVERY_FIFTH = [(False, 0, 0, 5), (True, 0, 1, 5), (True, 1, 2, 5)]
EVERY = [
    pytest.param(*each, 0, 1, marks=pytest.mark.long) for each in [(False, 0), (True, 0), (True, 1)]
]


@pytest.mark.parametrize(("is_done", "views_before", "first", "stride"), [*EVERY_FIFTH, *EVERY])
def test_a_pass_killed_at_any_step_is_resumed(
    running_server: Server, spool: Path, is_done: bool, views_before: int, first: int, stride: int
) -> None:
    """views_before: of a complete cache that the killed pass was to grow by another one.

    first, stride: the steps after which it is killed.
    """
    with emptied(running_server) as server:
        if views_before:
            fill(spool, num_views=views_before, block_rows=8)
        begun = {key: server.ask("GET", key) for key in server.all_keys()}
    views, steps = views_before + 1, first
    while True:
        with emptied(running_server) as server:
            for key, content in begun.items():
                server.ask("PUT", key, content)
            if not is_killed(spool, server, steps, views, is_done=is_done):
                break
            if views_before:
                assert (
                    TeacherCache.open(url(), num_views=views_before).faults() == []
                )  # at any time
            committed = len(lines(server)) - 2 * views_before
            assert fill(spool, seed=0, num_views=views, block_rows=8) == 2 - committed
            seeds = seeds_of(assert_whole(server, seeds=2), 2)
            assert sum(seeds) >= committed * len(TAPS)  # none of these is of the second pass
            steps += stride
    assert steps > 2 * 4  # more than the chunks and lines


def _fill_in_process(spool: Path) -> None:
    fill(spool, seed=1)


@pytest.mark.parametrize(
    "key", ["manifest.json", "logits/c.0.1.0", "journal/0/1/000001", "journal/000001-0000"]
)
def test_a_killed_process_loses_nothing_that_it_committed(
    server: Server, spool: Path, key: str
) -> None:
    process = Forks().Process(target=_fill_in_process, args=(spool,))

    def spoil(method: str, path: str, before: int) -> str | None:
        if method == "PUT" and key in path and process.pid is not None:
            os.kill(process.pid, signal.SIGKILL)
            return "lost"
        return None

    server.spoil = spoil
    process.start()
    process.join()
    server.settle()
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
