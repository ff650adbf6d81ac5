"""Writing inside a cache follows no link and does not leave the cache's folder."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from teach_once.runtime.safe.locks import numbered_folder
from teach_once.runtime.safe.safe_read import BadFile
from teach_once.store import CacheError, TapSpec, TeacherCache
from teach_once.store.command import cli
from teach_once.store.move.trim import trim_cache
from tests.support.caches.random_cache import TAPS, fill, open_writer

ATTENTION = {"attention1": TapSpec((4,), "float16")}


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "victim").write_bytes(b"mine")
    (folder / ".c.0.0.0.17.tmp").write_bytes(b"mine, too")
    return folder


def unharmed(victim: Path) -> bool:
    names = sorted(path.name for path in victim.iterdir())
    return names == [".c.0.0.0.17.tmp", "victim"] and (victim / "victim").read_bytes() == b"mine"


FOLDERS = ["teacher.zarr", "teacher.zarr/logits", "teacher.zarr/attention1", "journal"]


def resume(cache: Path) -> None:
    fill(cache, num_views=3)
    with open_writer(cache, num_views=3, taps=TAPS | ATTENTION):
        pass


def trim(cache: Path) -> None:
    trim_cache(cache, num_views=1, drop_taps=["attention"])


@pytest.mark.parametrize("write", [resume, trim])
@pytest.mark.parametrize("name", FOLDERS)
def test_a_link_in_place_of_a_folder_is_refused(
    cache_to_forge: Path, victim: Path, name: str, write: Callable[[Path], None]
) -> None:
    folder = cache_to_forge / name
    if folder.is_dir():
        shutil.rmtree(folder)
    folder.symlink_to(victim)
    with pytest.raises(CacheError, match="is a symbolic link, expected a folder"):
        write(cache_to_forge)
    assert unharmed(victim)


FILES = [
    "writer.lock",
    "manifest.json",
    "teacher.zarr/zarr.json",
    "teacher.zarr/logits/zarr.json",
    "teacher.zarr/logits/zarr.json.next",
    "teacher.zarr/labels/c.0",
    "teacher.zarr/logits/c.0.0.0",
    "journal/000001-0000.jsonl",
    "journal/000002-0000.jsonl",
]


@pytest.mark.parametrize("write", [resume, trim])
@pytest.mark.parametrize("name", FILES)
def test_a_link_in_place_of_a_file_is_never_written_through(
    cache_to_forge: Path, victim: Path, name: str, write: Callable[[Path], None]
) -> None:
    (cache_to_forge / name).unlink(missing_ok=True)
    (cache_to_forge / name).symlink_to(victim / "victim")
    with contextlib.suppress(CacheError):  # or the link is replaced by a file of the cache's own
        write(cache_to_forge)
    assert unharmed(victim)


def test_a_lock_that_is_another_files_second_name_gets_a_file_of_its_own(
    cache_to_forge: Path, victim: Path
) -> None:
    (cache_to_forge / "writer.lock").unlink()
    os.link(victim / "victim", cache_to_forge / "writer.lock")
    with open_writer(cache_to_forge):
        pass
    assert unharmed(victim)
    assert (cache_to_forge / "writer.lock").stat().st_nlink == 1


def test_the_cache_itself_may_be_reached_through_a_link(
    cache_to_forge: Path, tmp_path: Path
) -> None:
    (tmp_path / "elsewhere").symlink_to(cache_to_forge)
    resume_ = open_writer(tmp_path / "elsewhere", num_views=3)
    with resume_ as writer:
        assert [item.block.view for item in writer.work] == [2, 2, 2]
    assert cli(["check", str(tmp_path / "elsewhere")]) == 1  # unfinished


def test_an_exported_picture_and_file_replace_links(cache_to_forge: Path, victim: Path) -> None:
    for name, call in (("a.h5", ["export"]), ("a.png", ["info", "--plot"])):
        link = victim.parent / name
        link.symlink_to(victim / "victim")
        command, *options = call
        assert cli([command, str(cache_to_forge), *options, str(link)]) == 0
        assert not link.is_symlink()
    assert unharmed(victim)


def test_a_resumed_cache_keeps_its_records(cache_to_forge: Path) -> None:
    before = {f: f.read_bytes() for f in cache_to_forge.glob("teacher.zarr/*/c.*")}
    (cache_to_forge / "manifest.json").unlink()  # as an interrupted import leaves it
    chunk = cache_to_forge / "teacher.zarr" / "stage1" / "c.1.2.0"
    changed = bytearray(chunk.read_bytes())
    changed[0] ^= 1
    chunk.write_bytes(changed)
    with open_writer(cache_to_forge) as writer:  # reads every byte
        assert [(item.block.view, item.block.index, item.taps) for item in writer.work] == [
            (1, 2, ("stage1",))
        ]
        values = np.frombuffer(before[chunk][: 3 * 20], "<f4").reshape(3, 5)
        writer.write_block(writer.work[0].block, {"stage1": values})
    assert {f: f.read_bytes() for f in before} == before


@pytest.mark.parametrize("name", ["teacher.zarr", "teacher.zarr/logits", "journal"])
def test_nothing_is_read_through_a_link_inside(cache_to_forge: Path, name: str) -> None:
    moved = (cache_to_forge / name).rename(cache_to_forge.parent / "moved")
    (cache_to_forge / name).symlink_to(moved)
    with pytest.raises(CacheError, match="is a symbolic link, expected a folder"):
        TeacherCache.open(cache_to_forge)


def test_spool_of_a_bucket_s_pass_is_not_begun_in_a_linked_folder(
    victim: Path, tmp_path: Path
) -> None:
    (tmp_path / "spool").mkdir()
    (tmp_path / "spool/0000").symlink_to(victim)
    with pytest.raises(BadFile, match="0000 is a symbolic link, expected a folder"):
        numbered_folder(tmp_path / "spool")
    assert unharmed(victim)
