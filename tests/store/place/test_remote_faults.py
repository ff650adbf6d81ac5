"""A cache in an object store with bad connections, next to other caches, and damaged."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from teach_once.runtime.machine.urls import path_or_url
from teach_once.runtime.safe.locks import Job
from teach_once.store import CacheError, CacheFull, CacheMismatch, TeacherCache
from teach_once.store.errors import SamplesChanged
from teach_once.store.format.journal import IDENTITY_DIGITS, Line, line_text, parse_line
from teach_once.store.identity import identity_sha256
from teach_once.store.move.copy import copy_cache
from teach_once.store.place.bucket import ObjectsUnreachable
from teach_once.store.write.destination import Destination
from tests.support.caches.object_store import SECRETS, Server
from tests.support.caches.random_cache import DIGESTS, LABELS, records_of, write_item
from tests.support.caches.random_cache import fill as fill_folder
from tests.support.caches.remote_cache import (
    CACHE,
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

# ---- bad lines


@pytest.mark.parametrize(
    ("fault", "times"),
    [(500, 1), (503, 1), (409, 1), ("slow", 1), ("cut", 1), ("lost", 1), (409, 5), ("lost", 6)],
)
def test_requests_may_fail(server: Server, spool: Path, fault: int | str, times: int) -> None:
    """More often, too, than obstore tries: a put only, since nothing else has side effects."""
    server.spoil = lambda method, path, before: (
        fault if before < times and (method == "PUT" or (times == 1 and fault != 409)) else None
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


def test_a_refusal_for_the_clock_advises_to_set_it_and_not_other_keys(
    server: Server, spool: Path
) -> None:
    server.spoil = lambda method, path, before: "skewed"
    with pytest.raises(CacheError, match="does not accept this machine's clock") as error:
        fill(spool)
    assert "set the clock" in str(error.value.fix)
    assert "AWS" not in str(error.value)
    server.spoil = lambda method, path, before: 403
    with pytest.raises(CacheError, match="does not permit access") as error:
        fill(spool)
    assert "AWS_ACCESS_KEY_ID" in str(error.value.fix)


def test_a_store_that_ignores_conditions_is_refused_before_anything_is_put(
    server: Server, spool: Path
) -> None:
    server.spoil = lambda method, path, before: "unconditional"
    with pytest.raises(CacheError, match="the store of s3://bucket/caches ignores conditions"):
        fill(spool)
    assert server.all_keys() == ["caches/conditional-writes"]


# ---- what does not belong together


def test_a_disk_too_full_for_unfinished_blocks_is_named(server: Server, spool: Path) -> None:
    with (
        opened(spool) as writer,
        pytest.raises(CacheFull, match=rf"the disk of {spool}/0000 is too full for the records"),
        writer.refusing_full(),
    ):
        raise OSError(errno.ENOSPC, "no room")


def test_another_cache_under_the_same_name_is_refused(server: Server, spool: Path) -> None:
    fill(spool)
    keys = server.all_keys()
    with pytest.raises(CacheMismatch, match=f"s3://bucket/{CACHE} belongs to another"):
        fill(spool, labels=LABELS[::-1].copy())
    assert server.all_keys() == keys


def test_samples_that_changed_between_views_are_refused(server: Server, spool: Path) -> None:
    def write(writer: Destination, view: int, changed: int) -> None:
        for item in sorted(writer.work, key=lambda item: item.block):
            if item.block.view != view:
                continue
            rows = slice(item.block.start, item.block.stop)
            records = {**records_of(view, rows), "sample_digest": DIGESTS[rows].copy()}
            records["sample_digest"][:, -1] += np.uint8(changed)
            writer.write_block(item.block, records)

    with opened(spool) as writer:
        write(writer, 0, 0)
        write(writer, 1, 0)
    with opened(spool, num_views=3) as writer:
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


def test_who_finds_damage_mends_it_whoever_s_share_it_is(server: Server, spool: Path) -> None:
    fill(spool)
    flip(server, "teacher.zarr/logits/c.1.0.0")  # of rank 0
    with opened(spool, job=Job("j", 1, 2), check_every_byte=True) as writer:
        assert writer.work == []
        (left,) = writer.left_over()
        write_item(writer, left)
        assert writer.left_over() == []
    assert TeacherCache.open(url()).faults() == []


def test_damaged_documents_are_mended(server: Server, spool: Path) -> None:
    fill(spool)
    keys = ["manifest.json", "teacher.zarr/labels/c.0", "teacher.zarr/logits/zarr.json"]
    before = {key: server.ask("GET", f"{CACHE}/{key}") for key in keys}
    for key in keys:
        flip(server, key)
    with pytest.raises(CacheError, match=rf"s3://bucket/{CACHE}/manifest\.json is damaged") as e:
        TeacherCache.open(url())
    assert "make cache-teacher TEACHER=t CACHES=s3://bucket/caches FULL_CHECK=1" in str(e.value)
    assert fill(spool) == 0
    assert {key: server.ask("GET", f"{CACHE}/{key}") for key in keys} == before
    assert_whole(server)


def test_lines_of_a_stranger_count_for_their_own_block_and_are_limited(
    server: Server, spool: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(spool) as writer:
        for item in writer.work:
            write_item(writer, item)
    line = server.ask("GET", f"{CACHE}/journal/1/1/000001.jsonl")
    put(server, "journal/0/2/000002.jsonl", line)  # of another block
    put(server, "journal/7/0/000001.jsonl", line)  # of none that is planned
    cache = TeacherCache.open(url())
    assert cache.faults() == []
    assert cache.source.unreadable_lines == [f"s3://bucket/{CACHE}/journal/0/2/000002.jsonl"]
    monkeypatch.setattr("teach_once.store.place.bucket_log._LINES_PER_BLOCK", 1)
    with pytest.raises(CacheError, match="has more than 6 lines of single blocks"):
        TeacherCache.open(url())


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


@pytest.mark.parametrize("content", [b"", b"no line\n", b"of another cache"])
def test_journal_of_the_last_number_without_a_line_of_this_cache_stops_nobody(
    server: Server, spool: Path, tmp_path: Path, content: bytes
) -> None:
    if content == b"of another cache":
        other = fill_folder(tmp_path / "other", identity={"teacher": {"arch": "another"}})
        content = (other / "journal/000001-0000.jsonl").read_bytes()
    with opened(spool) as writer:
        write_item(writer, writer.work[0])
    put(server, "journal/999999-0000.jsonl", content)
    assert fill(spool) == NUM_BLOCKS - 1
    assert TeacherCache.open(url()).faults() == []
    grown = fill_folder(tmp_path / "t-e4812202", num_views=3)
    server.ask("PUT", f"{CACHE}/journal/0/0/000001.jsonl", b"torn")
    for key in server.all_keys():  # the records are those of another pass
        if "/c." in key or ("/journal/" in key and "999999" not in key):
            server.ask("DELETE", key)
    copy_cache(TeacherCache.open(grown), path_or_url("s3://bucket/caches"))
    assert not any("1000000" in key for key in server.all_keys())
    copied = TeacherCache.open(url())
    assert copied.num_views == 3
    assert copied.faults() == []
    assert fill(spool, num_views=3) == 0


def test_journal_of_the_last_number_says_that_none_is_left(
    server: Server, spool: Path, tmp_path: Path
) -> None:
    cache = fill_folder(tmp_path / "t-e4812202")
    copy_cache(TeacherCache.open(cache), path_or_url("s3://bucket/caches"))
    journal = server.ask("GET", f"{CACHE}/journal/000001-0000.jsonl")
    put(server, "journal/999999-0000.jsonl", journal)
    with opened(spool, num_views=3) as writer, pytest.raises(CacheError) as error:
        write_item(writer, writer.work[0])
    assert "has a file or a line of the last number, 999999" in str(error.value)
    assert "fix: remove the objects with the number 999999" in str(error.value)
    fill_folder(cache, num_views=3)
    with pytest.raises(CacheError, match="has a file or a line of the last number, 999999"):
        copy_cache(TeacherCache.open(cache), path_or_url("s3://bucket/caches"))
    server.ask("DELETE", f"{CACHE}/journal/999999-0000.jsonl")
    copy_cache(TeacherCache.open(cache), path_or_url("s3://bucket/caches"))
    assert TeacherCache.open(url()).faults() == []


def test_copy_is_newer_than_every_line_that_is_there(
    server: Server, spool: Path, tmp_path: Path
) -> None:
    cache = fill_folder(tmp_path / "t-e4812202")
    copy_cache(TeacherCache.open(cache), path_or_url("s3://bucket/caches"))
    identity = TeacherCache.open(cache).manifest.identity
    checksums = {"correct": "00000000", "logits": "00000000", "stage1": "00000000"}
    line = Line(identity_sha256(identity)[:IDENTITY_DIGITS], 0, 0, 4, checksums)
    put(server, "journal/0/0/000007.jsonl", line_text(line) + b"\n")
    copy_cache(TeacherCache.open(cache), path_or_url("s3://bucket/caches"))
    assert f"{CACHE}/journal/000008-0000.jsonl" in server.all_keys()
    with opened(spool, check_every_byte=True) as writer:
        assert writer.work == []
    copy_cache(TeacherCache.open(cache), path_or_url("s3://bucket/caches"))
    assert f"{CACHE}/journal/000009-0000.jsonl" not in server.all_keys()
