"""Every changed byte of a cache is detected; damage is reported and repaired."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from teach_once.store import CacheDamaged, CacheError, TeacherCache
from teach_once.store.format.spec import Block
from teach_once.store.write.pending_blocks import Work
from tests.support.caches.random_cache import chunks, fill, open_writer, records_of


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return fill(tmp_path / "t-e4812202")


@pytest.mark.parametrize("position", [0, 10, -5, -1])
def test_a_flipped_byte_of_a_chunk_is_found_and_named_when_read(cache: Path, position: int) -> None:
    file = cache / "teacher.zarr" / "stage1" / "c.1.2.0"
    data = bytearray(file.read_bytes())
    data[position] ^= 0x40
    file.write_bytes(data)
    opened = TeacherCache.open(cache)
    opened.read_view(0)
    with pytest.raises(CacheDamaged) as caught:
        opened.read_view(1)
    assert "tap stage1, view 1, block 2, wrong checksum" in str(caught.value)
    assert str(file) in str(caught.value)


def test_a_chunk_replaced_by_another_sound_one_is_found(cache: Path) -> None:
    group = cache / "teacher.zarr" / "logits"
    (group / "c.0.0.0").write_bytes((group / "c.1.0.0").read_bytes())
    with pytest.raises(CacheDamaged, match="checksum differs from the journal's"):
        TeacherCache.open(cache).read_view(0)


@pytest.mark.parametrize("harm", ["truncate", "delete", "lengthen"])
def test_a_chunk_of_the_wrong_size_is_found_when_read_and_by_a_check(
    cache: Path, harm: str
) -> None:
    file = cache / "teacher.zarr" / "correct" / "c.0.1"
    if harm == "delete":
        file.unlink()
    else:
        data = file.read_bytes()
        file.write_bytes(data[:-1] if harm == "truncate" else data + b"x")
    opened = TeacherCache.open(cache)  # believes the journal, and asks for no chunk
    opened.read_view(0, ["logits"])
    with pytest.raises(CacheDamaged, match="tap correct, view 0, block 1"):
        opened.read_view(0)
    for read in (True, False):
        (fault,) = opened.source.faults(every_byte=read)
        assert (fault.tap, fault.view, fault.block) == ("correct", 0, 1)


@pytest.mark.parametrize(
    "name",
    [
        "manifest.json",
        "teacher.zarr/logits/zarr.json",
        "teacher.zarr/zarr.json",
        "teacher.zarr/labels/c.0",
    ],
)
def test_no_byte_of_the_metadata_can_change_unnoticed(cache: Path, name: str) -> None:
    file = cache / name
    whole = file.read_bytes()
    for position in range(0, len(whole), 7):
        data = bytearray(whole)
        data[position] ^= 0x01
        file.write_bytes(data)
        try:
            unchanged = json.loads(data) == json.loads(whole) and name == "manifest.json"
        except ValueError:
            unchanged = False
        if unchanged:  # white space of the manifest means nothing
            continue
        with pytest.raises(CacheError):
            TeacherCache.open(cache)


def read_all(cache: Path) -> None:
    opened = TeacherCache.open(cache)
    for view in range(opened.num_views):
        opened.read_view(view)


def test_no_byte_of_the_journal_can_change_unnoticed(cache: Path) -> None:
    (file,) = (cache / "journal").iterdir()
    whole = file.read_bytes()
    for position in range(len(whole)):
        data = bytearray(whole)
        data[position] ^= 0x01
        file.write_bytes(data)
        with pytest.raises(CacheError):
            read_all(cache)


def test_resuming_a_damaged_cache_rewrites_only_what_is_damaged(cache: Path) -> None:
    damaged = cache / "teacher.zarr" / "stage1" / "c.1.2.0"
    data = bytearray(damaged.read_bytes())
    data[3] ^= 1
    damaged.write_bytes(data)
    (cache / "teacher.zarr" / "logits" / "zarr.json").write_text("{}")
    sound = {path: path.stat().st_mtime_ns for path in chunks(cache) if path != damaged}
    with open_writer(cache, check_every_byte=True) as writer:
        assert writer.work == [Work(Block(1, 2, 8, 11), ("stage1",))]
        writer.write_block(writer.work[0].block, {"stage1": records_of(1, slice(8, 11))["stage1"]})
    assert {path: path.stat().st_mtime_ns for path in sound} == sound
    opened = TeacherCache.open(cache)
    assert opened.faults() == []
    assert (opened.read_view(1)["stage1"] == records_of(1, slice(None))["stage1"]).all()


def test_temporary_files_of_a_dead_writer_are_removed(cache: Path) -> None:
    leftover = cache / "teacher.zarr" / "logits" / ".c.0.0.0.999999999.tmp"
    leftover.write_bytes(b"half")
    with open_writer(cache):
        assert not leftover.exists()


def test_a_cache_without_a_manifest_has_every_byte_checked(cache: Path) -> None:
    (cache / "manifest.json").write_text("{")
    chunk = cache / "teacher.zarr" / "stage1" / "c.1.0.0"
    content = bytearray(chunk.read_bytes())
    content[3] ^= 1
    chunk.write_bytes(content)
    with open_writer(cache, check_every_byte=False) as writer:
        assert [(w.block.view, w.block.index, w.taps) for w in writer.work] == [(1, 0, ("stage1",))]
    with open_writer(cache, check_every_byte=False) as writer:
        assert not writer.work  # with a manifest, only what is asked for is read
