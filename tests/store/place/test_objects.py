"""Caches in an object store: copied in both directions, inspected and checked, with any fault."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import zarr

from teach_once.runtime.machine.urls import BadUrl, ObjectUrl, path_or_url
from teach_once.store import (
    CacheBusy,
    CacheError,
    CacheMismatch,
    CacheMissing,
    CacheNotWritable,
    TeacherCache,
)
from teach_once.store.command import cli
from teach_once.store.move.copy import copy_cache, num_chunks
from teach_once.store.place.bucket import Bucket, ObjectsUnreachable
from tests.support.caches.damage import flip
from tests.support.caches.object_store import SECRETS, Server, a_cache
from tests.support.caches.random_cache import TAPS, chunks, fill, records_of

CACHE = "caches/t-e4812202"
LOGITS = f"{CACHE}/teacher.zarr/logits/c.1.0.0"
NUM_CHUNKS = 24


@pytest.fixture
def url(server: Server) -> ObjectUrl:
    found = path_or_url("s3://bucket/caches")
    assert isinstance(found, ObjectUrl)
    return found


def upload(folder: Path, url: Path) -> tuple[int, int]:
    """How many chunks were copied, how many were there."""
    _, counts = copy_cache(TeacherCache.open(folder), url)
    return counts.copied, counts.kept


def is_whole(path: Path) -> bool:
    """Whether it is the complete cache of `a_cache`; every checksum is verified."""
    cache = TeacherCache.open(path)
    return all(
        (cache.read_view(view)[tap] == records_of(view, slice(None))[tap]).all()
        for view in range(2)
        for tap in TAPS
    )


# ---- there and back


def test_a_cache_goes_there_and_comes_back_byte_for_byte(url: ObjectUrl, tmp_path: Path) -> None:
    cache = a_cache(tmp_path / "here")
    assert upload(cache, url) == (NUM_CHUNKS, 0)
    assert is_whole(url / cache.name)
    made, counts = copy_cache(TeacherCache.open(url / cache.name), tmp_path / "back")
    assert (counts.copied, counts.kept) == (NUM_CHUNKS, 0)
    assert is_whole(made)
    for chunk in chunks(cache):
        assert (made / chunk.relative_to(cache)).read_bytes() == chunk.read_bytes()
    assert (made / "manifest.json").read_bytes() == (cache / "manifest.json").read_bytes()


def test_the_objects_are_a_cache_folder_to_whoever_fetches_them_otherwise(
    url: ObjectUrl, server: Server, tmp_path: Path
) -> None:
    upload(a_cache(tmp_path), url)
    fetched = tmp_path / "fetched"
    for each in Bucket(url / "t-e4812202").list_files():
        (fetched / each.key).parent.mkdir(parents=True, exist_ok=True)
        (fetched / each.key).write_bytes(server.ask("GET", f"{CACHE}/{each.key}"))
    assert is_whole(fetched)
    group = zarr.open_group(fetched / "teacher.zarr", mode="r")
    logits = np.asarray(group["logits"][1])  # type: ignore[index]
    assert (logits == records_of(1, slice(None))["logits"]).all()


def test_what_is_there_is_not_copied_again(url: ObjectUrl, server: Server, tmp_path: Path) -> None:
    cache = a_cache(tmp_path)
    upload(cache, url)
    server.ask("DELETE", LOGITS)
    server.requests.clear()
    assert upload(cache, url) == (1, NUM_CHUNKS - 1)
    put = {path for method, path in server.requests if method == "PUT"}
    index = "/bucket/caches/t-e4812202/index.json"
    assert put == {f"/bucket/{LOGITS}", index, "/bucket/caches/conditional-writes"}
    assert upload(cache, url) == (0, NUM_CHUNKS)


def test_a_store_that_gives_no_md5_is_read_instead(
    url: ObjectUrl, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = a_cache(tmp_path)
    upload(cache, url)
    monkeypatch.setattr("teach_once.store.move.copy._md5", lambda data: "none")
    assert upload(cache, url) == (0, NUM_CHUNKS)


def test_an_interrupted_copy_is_no_cache_and_is_resumed(
    url: ObjectUrl, server: Server, tmp_path: Path
) -> None:
    cache = a_cache(tmp_path)
    server.spoil = lambda method, path, before: 500 if path.endswith("stage1/c.1.1.0") else None
    with pytest.raises(ObjectsUnreachable, match=r"s3://bucket/caches/t-e4812202/.*stage1/c\.1"):
        upload(cache, url)
    with pytest.raises(CacheMissing, match="is not a cache"):
        TeacherCache.open(url / cache.name)
    server.spoil = lambda method, path, before: None
    copied, kept = upload(cache, url)
    assert copied + kept == NUM_CHUNKS
    assert kept > 0
    assert is_whole(url / cache.name)


def test_a_copy_into_a_folder_is_resumed_and_mends(
    url: ObjectUrl, server: Server, tmp_path: Path
) -> None:
    upload(a_cache(tmp_path), url)
    opened = TeacherCache.open(url / "t-e4812202")
    server.spoil = lambda method, path, before: 500 if path.endswith("logits/c.1.2.0") else None
    with pytest.raises(ObjectsUnreachable):
        copy_cache(opened, tmp_path / "back")
    back = tmp_path / "back" / "t-e4812202"
    with pytest.raises(CacheMissing):
        TeacherCache.open(back)
    server.spoil = lambda method, path, before: None
    server.requests.clear()
    _, counts = copy_cache(opened, tmp_path / "back")
    assert counts.kept >= NUM_CHUNKS / 2  # view 0
    assert is_whole(back)
    flip(back / "teacher.zarr/logits/c.0.1.0", 3)
    _, counts = copy_cache(opened, tmp_path / "back")
    assert (counts.copied, counts.kept) == (1, NUM_CHUNKS - 1)
    assert is_whole(back)


def test_a_grown_cache_grows_its_copy(url: ObjectUrl, tmp_path: Path) -> None:
    cache = a_cache(tmp_path)
    upload(cache, url)
    fill(cache, num_views=3)
    assert upload(cache, url) == (3 * 3, NUM_CHUNKS + 3)
    grown = TeacherCache.open(url / cache.name)
    assert grown.num_views == 3
    assert grown.faults() == []
    smaller = a_cache(tmp_path / "smaller")
    with pytest.raises(CacheMismatch, match="contains more of this cache: 3 views"):
        upload(smaller, url)


def test_records_of_another_pass_are_not_mixed_in(
    url: ObjectUrl, server: Server, tmp_path: Path
) -> None:
    cache = a_cache(tmp_path)
    upload(cache, url)
    other = (tmp_path / "t-e4812202/teacher.zarr/logits/c.0.0.0").read_bytes()
    server.ask("PUT", LOGITS, other)  # sound by itself
    with pytest.raises(CacheMismatch, match=r"logits/c\.1\.0\.0 contains records of another pass"):
        upload(cache, url)


def test_another_cache_is_not_overwritten(url: ObjectUrl, server: Server, tmp_path: Path) -> None:
    cache = a_cache(tmp_path)
    upload(cache, url)
    fill(other := tmp_path / "other" / "t-e4812202", block_rows=8)
    with pytest.raises(CacheMismatch, match="contains another cache"):
        upload(other, url)
    with pytest.raises(CacheMismatch, match="contains another cache"):
        copy_cache(TeacherCache.open(url / cache.name), other.parent)


# ---- what goes wrong on the way


@pytest.mark.parametrize("fault", [503, 409, "cut", "lost"])
def test_every_first_request_may_fail(
    fault: int | str, url: ObjectUrl, server: Server, tmp_path: Path
) -> None:
    cache = a_cache(tmp_path)
    server.spoil = lambda method, path, before: (
        None if before or (fault == 409 and method != "PUT") else fault
    )
    assert sum(upload(cache, url)) == NUM_CHUNKS
    assert is_whole(url / cache.name)
    keys = [each.key for each in Bucket(url / cache.name).list_files() if "journal" in each.key]
    assert keys == ["journal/000001-0000.jsonl"]


def test_what_never_answers_is_named_and_no_secret_is(
    url: ObjectUrl, server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = a_cache(tmp_path)
    server.spoil = lambda method, path, before: 503 if path.endswith(LOGITS) else None
    assert cli(["copy", str(cache), "s3://bucket/caches"]) == 2
    told = capsys.readouterr()
    assert f"error: s3://bucket/{LOGITS}: the store could not be reached (it answered 503" in (
        told.err
    )
    assert not any(secret in told.err + told.out for secret in SECRETS)


def test_a_refusal_says_what_to_set(url: ObjectUrl, server: Server, tmp_path: Path) -> None:
    server.spoil = lambda method, path, before: 403
    with pytest.raises(CacheNotWritable, match="does not permit access to s3://bucket/caches") as e:
        upload(a_cache(tmp_path), url)
    assert "AWS_ACCESS_KEY_ID" in str(e.value)
    assert not any(secret in str(e.value) for secret in SECRETS)


def test_a_store_that_ignores_conditions_is_refused(
    url: ObjectUrl, server: Server, tmp_path: Path
) -> None:
    server.spoil = lambda method, path, before: "unconditional"
    with pytest.raises(CacheError, match="the store of s3://bucket/caches ignores conditions"):
        upload(a_cache(tmp_path), url)


def test_of_eight_that_put_one_object_one_wins(url: ObjectUrl) -> None:
    objects, start, won = Bucket(url), threading.Barrier(8), []

    def put(number: int) -> None:
        start.wait()
        if objects.create("k", b"%d" % number):
            won.append(number)

    threads = [threading.Thread(target=put, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert objects.get("k") == b"%d" % won[0]


def test_an_object_changed_meanwhile_is_not_replaced(url: ObjectUrl) -> None:
    objects = Bucket(url)
    objects.create("k", b"old")
    (listed,) = objects.list_files()
    objects.replace("k", b"new", listed.tag)
    with pytest.raises(CacheBusy, match="s3://bucket/caches/k was changed by another process"):
        objects.replace("k", b"newer", listed.tag)


def test_a_manifest_that_another_process_replaces_during_a_copy_is_not_overwritten(
    url: ObjectUrl, server: Server, tmp_path: Path
) -> None:
    cache = a_cache(tmp_path)
    upload(cache, url)
    fill(cache, num_views=3)

    def overtake(method: str, path: str, num_before: int) -> None:
        if method == "PUT" and path.endswith("000002-0000.jsonl"):
            server.ask("PUT", f"caches/{cache.name}/manifest.json", b"of another process")

    server.spoil = overtake
    with pytest.raises(CacheBusy, match=r"manifest\.json was changed by another process"):
        upload(cache, url)
    assert server.ask("GET", f"caches/{cache.name}/manifest.json") == b"of another process"


def test_two_copies_at_once_make_one_cache(url: ObjectUrl, tmp_path: Path) -> None:
    cache = a_cache(tmp_path)
    errors: list[Exception] = []

    def copy() -> None:
        try:
            upload(cache, url)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=copy) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert is_whole(url / cache.name)


def test_a_forked_process_is_told_instead_of_hanging(url: ObjectUrl) -> None:
    Bucket(url).create("k", b"")
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        try:
            Bucket(url).get("k")
        except BaseException as error:
            os.write(write, str(error).encode())
        os._exit(0)
    os.waitpid(child, 0)
    assert b"cannot be read in a process forked from one that reads it" in os.read(read, 1000)
    os.close(read)
    os.close(write)


# ---- damage, and looking


def test_damage_of_an_object_is_found_named_and_mended(
    url: ObjectUrl, server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = a_cache(tmp_path)
    upload(cache, url)
    remote = f"s3://bucket/{CACHE}"
    for key in (LOGITS, f"{CACHE}/teacher.zarr/labels/c.0"):
        content = bytearray(server.ask("GET", key))
        content[3] ^= 1
        server.ask("PUT", key, bytes(content))
    server.ask("PUT", f"{CACHE}/teacher.zarr/stage1/c.0.1.0", b"short")
    server.ask("DELETE", f"{CACHE}/teacher.zarr/correct/zarr.json")
    assert cli(["check", remote]) == 1
    told = capsys.readouterr().out
    assert f"tap logits, view 1, block 0, wrong checksum: s3://bucket/{LOGITS}" in told
    assert "tap stage1, view 0, block 1, chunk has 5 bytes" in told
    assert "zarr metadata missing" in told
    assert f"{remote} is invalid: 5 faults" in told
    assert "with a valid copy of it, CACHE, also: " in told
    assert "store copy CACHE s3://bucket/caches\n" in told
    assert upload(cache, url) == (2, NUM_CHUNKS - 2)
    assert cli(["check", remote]) == 0
    assert is_whole(url / cache.name)


def test_list_info_and_check_take_a_url(
    url: ObjectUrl, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = a_cache(tmp_path)
    assert cli(["copy", str(cache), "s3://bucket/caches/"]) == 0
    assert f"s3://bucket/{CACHE} is complete: {NUM_CHUNKS} chunks copied" in capsys.readouterr().out
    assert cli(["list", "--caches", "s3://bucket/caches"]) == 0
    assert "t-e4812202" in capsys.readouterr().out
    assert cli(["info", f"s3://bucket/{CACHE}"]) == 0
    assert "state      complete" in capsys.readouterr().out
    assert cli(["check", "--caches", "s3://bucket/caches"]) == 0
    assert f"s3://bucket/{CACHE} is valid" in capsys.readouterr().out
    assert cli(["list", "--caches", "s3://bucket/nothing"]) == 0
    assert "s3://bucket/nothing contains no cache" in capsys.readouterr().out
    assert cli(["info", "s3://nobucket/x"]) == 2
    assert "bucket 'nobucket' not found" in capsys.readouterr().err
    assert not Path("s3:").exists()


def test_an_exported_file_is_copied_there_and_one_is_made_from_there(
    url: ObjectUrl, tmp_path: Path
) -> None:
    cache = a_cache(tmp_path)
    assert cli(["export", str(cache), str(tmp_path / "cache.h5")]) == 0
    assert cli(["copy", str(tmp_path / "cache.h5"), "s3://bucket/caches"]) == 0
    shutil.rmtree(cache)
    assert cli(["export", f"s3://bucket/{CACHE}", str(tmp_path / "again.h5")]) == 0
    assert is_whole(tmp_path / "again.h5")


@pytest.mark.parametrize(
    "text",
    ["s3://KEY:SECRET@bucket/x", "s3://bucket/../x", "http://bucket/x", "s3://B", "s3://b/.x/y"],
)
def test_another_url_is_refused_without_repeating_it(text: str) -> None:
    with pytest.raises(BadUrl) as error:
        path_or_url(text)
    assert "SECRET" not in str(error.value)


@pytest.mark.parametrize("ask", [Path.exists, Path.is_dir, os.path.lexists, os.listdir, open])
def test_object_url_asked_as_a_file_raises_instead_of_answering(
    ask: Callable[[Path], object],
) -> None:
    with pytest.raises(TypeError, match="s3://bucket/x is not a local file"):
        ask(path_or_url("s3://bucket/x"))


def test_chunks_are_counted_as_the_progress_counts_them(tmp_path: Path) -> None:
    assert num_chunks(TeacherCache.open(a_cache(tmp_path)).manifest) == NUM_CHUNKS
