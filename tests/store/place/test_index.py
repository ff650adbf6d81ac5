"""index.json: written last, removed first, and sufficient to read a cache without listing."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from teach_once.runtime.machine.urls import ObjectUrl, path_or_url
from teach_once.runtime.safe.safe_read import BadFile
from teach_once.store import CacheDamaged, CacheMissing, TeacherCache
from teach_once.store.format.index import INDEX, index_text
from teach_once.store.identity import canonical_json
from teach_once.store.move.copy import copy_cache
from teach_once.store.move.hdf5 import export_cache, import_cache
from teach_once.store.move.trim import trim_cache
from teach_once.store.place.folder import Folder
from teach_once.store.place.index import index_faults, read_index
from teach_once.store.place.place import Listed
from teach_once.store.read.zarr_source import open_indexed
from tests.support.caches.damage import flip
from tests.support.caches.forged_cache import crc, set_at
from tests.support.caches.object_store import Server
from tests.support.caches.random_cache import open_any, open_writer, records_of, write_item


class Unlistable(Folder):
    """A folder that is served by name alone."""

    def list_files(self, prefix: str = "", max_keys: int = 0) -> Iterator[Listed]:
        raise AssertionError("this place cannot list")

    list_folders = list_files  # type: ignore[assignment]


def fill_and_finish(path: Path, **changes: Any) -> Path:
    """A whole pass: all blocks, then what ends it."""
    with open_any(path, **changes) as writer:
        for item in writer.work:
            write_item(writer, item)
        assert writer.left_over() == []
        writer.finish({"views": writer.manifest.num_views})
    return path


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return fill_and_finish(tmp_path / "t-e4812202")


def assert_read_without_listing(path: Path, num_views: int = 2) -> None:
    source = open_indexed(Unlistable(path))
    assert source.coverage.is_complete
    assert source.manifest.num_views == num_views
    for view in range(num_views):
        for index in range(source.manifest.blocks_per_view):
            block = source.manifest.block(view, index)
            rows = np.empty((block.rows, 5), np.float32)
            source.read("stage1", block, rows)
            expected = records_of(view, slice(block.start, block.stop))["stage1"]
            assert (rows == expected).all()


def test_index_of_a_finished_pass_is_enough_to_read_without_listing(cache: Path) -> None:
    assert_read_without_listing(cache)


def test_index_names_sizes_and_sha256_as_its_description_says(cache: Path) -> None:
    content = json.loads((cache / INDEX).read_bytes())
    stated = content.pop("index_crc32c")
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
    assert stated == crc(canonical)
    assert (content["format"], content["format_version"]) == ("teach-once-index", 1)
    described = [*cache.rglob("zarr.json"), *cache.glob("journal/*.jsonl")]
    assert content["files"] == {
        str(file.relative_to(cache)): {
            "size": file.stat().st_size,
            "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        }
        for file in described
    }


def test_index_of_a_bucket_names_the_objects_that_a_fetched_copy_has(
    server: Server, spool: Path, tmp_path: Path
) -> None:
    url = path_or_url("s3://bucket/caches/t-e4812202")
    assert isinstance(url, ObjectUrl)
    fill_and_finish(url, spool_folder=spool)
    for key in server.all_keys():
        file = tmp_path / key
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(server.ask("GET", key))
    assert_read_without_listing(tmp_path / "caches/t-e4812202")
    with open_any(url, spool_folder=spool, num_views=3):
        assert f"caches/t-e4812202/{INDEX}" not in server.all_keys()
    fill_and_finish(url, spool_folder=spool, num_views=3)
    assert f"caches/t-e4812202/{INDEX}" in server.all_keys()
    assert TeacherCache.open(url).faults() == []


@pytest.mark.parametrize("where", ["s3://bucket/copies", "copies"])
def test_index_of_a_copy_describes_the_copy(
    server: Server, cache: Path, tmp_path: Path, where: str
) -> None:
    dest = path_or_url(where) if ":" in where else tmp_path / where
    made, _ = copy_cache(TeacherCache.open(cache), dest)
    again, _ = copy_cache(TeacherCache.open(made), tmp_path / "back")
    assert_read_without_listing(again)
    if isinstance(made, ObjectUrl):
        assert f"copies/{made.name}/{INDEX}" in server.all_keys()


def test_index_is_written_by_an_import(cache: Path, tmp_path: Path) -> None:
    export_cache(cache, tmp_path / "c.h5")
    assert_read_without_listing(import_cache(tmp_path / "c.h5", tmp_path / "imported"))


def test_index_is_gone_before_a_growth_writes_anything_and_while_it_is_incomplete(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("teach_once.store.write.writer.manifest_for", _killed)
        with pytest.raises(KeyboardInterrupt):
            open_writer(cache, num_views=3)
    assert not (cache / INDEX).exists()
    with open_writer(cache, num_views=3) as writer:
        write_item(writer, writer.work[0])
        writer.finish({})
    assert not (cache / INDEX).exists()
    with pytest.raises(CacheMissing, match=rf"has no {INDEX}"):
        open_indexed(Unlistable(cache))
    fill_and_finish(cache, num_views=3)
    assert_read_without_listing(cache, 3)


def _killed(*_: object) -> None:
    raise KeyboardInterrupt


def test_index_stays_if_a_writer_finds_nothing_to_do(cache: Path) -> None:
    before = (cache / INDEX).read_bytes()
    with open_writer(cache) as writer:
        assert writer.work == []
    assert (cache / INDEX).read_bytes() == before


def test_index_is_gone_before_a_damaged_block_is_repaired(cache: Path) -> None:
    next(iter(cache.glob("teacher.zarr/stage1/c.1.*"))).unlink()
    with open_writer(cache) as writer:
        assert len(writer.work) == 1
        assert not (cache / INDEX).exists()


def test_index_of_a_trimmed_cache_describes_what_is_left(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("teach_once.store.move.trim.settle_metadata", _killed)
        with pytest.raises(KeyboardInterrupt):
            trim_cache(cache, num_views=1)
    assert not (cache / INDEX).exists()
    trim_cache(cache, num_views=1)
    assert_read_without_listing(cache, 1)


def _change(name: str) -> Callable[[Path], object]:
    return lambda cache: flip(next(iter(cache.glob(name))), 40)


@pytest.mark.parametrize(
    "change",
    [
        _change(INDEX),
        _change("journal/*.jsonl"),
        _change("teacher.zarr/logits/zarr.json"),
        lambda cache: next(iter(cache.glob("journal/*.jsonl"))).unlink(),
    ],
    ids=["index", "journal", "metadata", "no journal"],
)
def test_index_that_does_not_fit_its_files_is_found_and_repaired(
    cache: Path, change: Callable[[Path], object]
) -> None:
    change(cache)
    with suppress(CacheDamaged):  # if opening it does not find that
        assert open_indexed(Unlistable(cache)).faults(every_byte=True) != []
    fill_and_finish(cache, check_every_byte=True)
    assert_read_without_listing(cache)
    assert TeacherCache.open(cache).faults() == []


def test_index_that_is_damaged_is_a_fault_of_the_cache(cache: Path) -> None:
    flip(cache / INDEX, 60)
    (fault,) = TeacherCache.open(cache).faults()
    assert fault.file == cache / INDEX
    assert "index" in str(fault)


def test_index_text_of_files_in_another_order_is_the_same(cache: Path) -> None:
    manifest = TeacherCache.open(cache).manifest
    index = read_index(Folder(cache), manifest)
    assert index is not None
    backwards = dict(reversed(index.items()))
    assert list(backwards) != list(index)
    assert index_text(manifest, backwards) == (cache / INDEX).read_bytes()


def _named(name: str) -> Callable[[Any], None]:
    return set_at("files", name, to={"size": 1, "sha256": "0" * 64})


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (set_at("identity_sha256", to="0" * 64), "is the index of another cache"),
        (lambda content: content["files"].pop("teacher.zarr/zarr.json"), "lacks teacher.zarr/z"),
        (_named("teacher.zarr/logits/c.0.0.0"), "not one of an index"),
        (_named("journal/notes.jsonl"), "not one of an index"),
        (_named("evaluation/a..b/index.json"), "not one of an index"),
        (_named("evaluation/.hidden/index.json"), "not one of an index"),
    ],
)
def test_index_with_a_valid_checksum_and_other_content_is_rejected(
    cache: Path, change: Callable[[Any], object], problem: str
) -> None:
    content = json.loads((cache / INDEX).read_bytes())
    del content["index_crc32c"]
    change(content)
    content["index_crc32c"] = crc(canonical_json(content).encode())
    (cache / INDEX).write_text(json.dumps(content))
    with pytest.raises(BadFile, match=problem):
        read_index(Folder(cache), TeacherCache.open(cache).manifest)


@pytest.mark.parametrize("name", ["journal/*.jsonl", "teacher.zarr/stage1/zarr.json"])
def test_index_faults_of_files_with_a_flipped_bit_name_each_file(cache: Path, name: str) -> None:
    manifest = TeacherCache.open(cache).manifest
    assert index_faults(Folder(cache), manifest) == []
    changed = [next(iter(cache.glob(each))) for each in (name, "teacher.zarr/labels/zarr.json")]
    for file in changed:
        flip(file, 40)
    assert [fault.file for fault in index_faults(Folder(cache), manifest)] == sorted(
        changed, key=str
    )
