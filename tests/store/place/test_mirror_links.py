"""Links inside a mirror: their targets are not written, removed, changed or used."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from teach_once.runtime.errors import UserError
from teach_once.runtime.machine.urls import ObjectUrl, path_or_url
from teach_once.store import TeacherCache
from teach_once.store.move.copy import copy_cache
from teach_once.store.place.mirror_files import MirrorFiles
from teach_once.store.place.mirror_folder import MARK, MirrorFolder, use_mirror, used_mirror
from teach_once.store.read.mirror import attach
from teach_once.train.cli.commands import cli as train
from tests.support.caches.object_store import Server, a_cache, emptied
from tests.support.caches.random_cache import fill
from tests.support.project import QUICK_RUN

CACHE = "t-e4812202"
PLENTY = 10**9
LINKED = ["bucket", "bucket/caches", f"bucket/caches/{CACHE}", f"bucket/caches/{CACHE}/journal"]


@pytest.fixture
def server(running_server: Server, tmp_path: Path) -> Iterator[Server]:
    """The store with a cache at s3://bucket/caches and a file at s3://bucket/photos."""
    earlier = used_mirror()
    with emptied(running_server):
        copy_cache(TeacherCache.open(a_cache(tmp_path)), path_or_url("s3://bucket/caches"))
        running_server.ask("PUT", "photos/one.h5", bytes(range(256)))
        yield running_server
    use_mirror(earlier)


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """Somebody's folder outside the mirror, with another cache and every name that we write."""
    folder = tmp_path / "victim"
    fill(folder / CACHE, num_views=1)
    (folder / CACHE / "journal" / "000001-0000.jsonl").touch()
    for name in (
        "one.h5",
        f".one.h5.{os.getpid()}.tmp",
        ".mine.tmp",
        "12-0123abcd",
        "manifest.json",
    ):
        (folder / name).write_bytes(b"mine, and not to be changed")
    return folder


def state(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """The mode, time and content of everything below a folder."""
    return {
        str(path.relative_to(folder)): (
            path.lstat().st_mode,
            path.lstat().st_mtime_ns,
            path.read_bytes() if stat.S_ISREG(path.lstat().st_mode) else b"",
        )
        for path in [folder, *folder.rglob("*")]
    }


def mirror_with_link(tmp_path: Path, name: str, target: Path) -> Path:
    root = tmp_path / "mirror"
    (root / name).parent.mkdir(parents=True)
    (root / MARK).touch()
    (root / name).symlink_to(target)
    return root


def read_cache(root: Path) -> None:
    url = path_or_url("s3://bucket/caches")
    assert isinstance(url, ObjectUrl)
    TeacherCache.open(attach(url, root, PLENTY) / CACHE).read_view(0)


def fetch_file(root: Path) -> None:
    use_mirror(MirrorFolder(root, PLENTY))
    url = path_or_url("s3://bucket/photos")
    assert isinstance(url, ObjectUrl)
    MirrorFiles(url).fetch(["one.h5"], lambda name, path: True, lambda name, path: None)


@pytest.mark.parametrize("name", [".in-use", *LINKED])
def test_mirror_with_a_linked_folder_refuses_and_leaves_its_target(
    server: Server, victim: Path, tmp_path: Path, name: str
) -> None:
    target = victim / CACHE if name.endswith(CACHE) else victim
    target = victim / CACHE / "journal" if name.endswith("journal") else target
    root, before = mirror_with_link(tmp_path, name, target), state(victim)
    with pytest.raises(UserError, match="is a symbolic link, expected a folder") as error:
        read_cache(root)
    assert state(victim) == before
    assert f"fix: rm {root / name}" in str(error.value)


@pytest.mark.parametrize("name", [".in-use", "bucket", "bucket/photos"])
def test_mirror_with_a_linked_folder_fetches_no_file_into_its_target(
    server: Server, victim: Path, tmp_path: Path, name: str
) -> None:
    root, before = mirror_with_link(tmp_path, name, victim), state(victim)
    with pytest.raises(UserError, match="is a symbolic link, expected a folder"):
        fetch_file(root)
    assert state(victim) == before


def test_mirror_with_linked_files_replaces_the_links_themselves(
    server: Server, victim: Path, tmp_path: Path
) -> None:
    before = state(victim)
    root = mirror_with_link(tmp_path, "bucket/photos/one.h5", victim / "one.h5")
    (root / "bucket/photos" / f".one.h5.{os.getpid()}.tmp").symlink_to(victim / "one.h5")
    fetch_file(root)
    read_cache(root)
    chunk = root / "bucket/caches" / CACHE / "teacher.zarr/logits/c.0.0.0"
    content = chunk.read_bytes()
    chunk.unlink()
    chunk.symlink_to(victim / "one.h5")
    read_cache(root)
    assert state(victim) == before
    assert chunk.read_bytes() == content
    assert not chunk.is_symlink()
    assert (root / "bucket/photos/one.h5").read_bytes() == bytes(range(256))


def test_mirror_makes_room_without_entering_a_link(victim: Path, tmp_path: Path) -> None:
    root, before = mirror_with_link(tmp_path, "bucket", victim), state(victim)
    (root / "old.h5").write_bytes(bytes(100))
    folder = MirrorFolder(root, 10)
    with folder.locked() as opened:
        folder.make_room(opened, 1)
    assert not (root / "old.h5").exists()
    assert state(victim) == before


def test_train_through_a_mirror_with_a_link_ends_with_what_to_do(
    server: Server, victim: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, before = mirror_with_link(tmp_path, "bucket/caches", victim), state(victim)
    words = ["student", "digits-resnet8", "--method", "kd", *QUICK_RUN]
    assert train([*words, "--caches", "s3://bucket/caches", "--mirror", str(root)]) == 2
    told = capsys.readouterr().err
    assert "bucket/caches is a symbolic link, expected a folder" in told
    assert "fix: rm " in told
    assert state(victim) == before
