"""A shared mirror: its lock, and the files that each process needs."""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import threading
from pathlib import Path

import pytest

from teach_once.runtime.safe.confined import OpenRoot
from teach_once.store import CacheBusy
from teach_once.store.place import mirror_folder
from teach_once.store.place import mirror_folder as mirror_lock
from teach_once.store.place.mirror_folder import MARK, MirrorFolder, Needs, show_progress

PLENTY = 10**9


def room(root: Path, num_bytes: int = 0) -> None:
    folder = MirrorFolder(root, PLENTY)
    with folder.locked() as opened:
        folder.make_room(opened, num_bytes)


def held_by(root: Path, process: bytes) -> int:
    """A handle by which another program has the lock, as far as `flock` knows."""
    root.mkdir()
    handle = os.open(root / MARK, os.O_RDWR | os.O_CREAT)
    os.write(handle, process)
    fcntl.flock(handle, fcntl.LOCK_EX)
    return handle


@pytest.mark.parametrize(
    ("content", "owner"), [(b"4711", "process 4711"), (b"\xff\x1b[2J", "another process")]
)
def test_mirror_lock_that_is_held_is_told_and_ends_the_wait(
    tmp_path: Path,
    content: bytes,
    owner: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(mirror_lock, "SILENT_SECONDS", 0.0)
    monkeypatch.setattr(mirror_lock, "PATIENCE_SECONDS", 0.1)
    root = tmp_path / "mirror"
    handle = held_by(root, content)
    with pytest.raises(CacheBusy, match=f"{owner} has locked the mirror {root} and") as error:
        room(root)
    assert "fix: end it, or name another folder with --mirror" in str(error.value)
    assert capsys.readouterr().err == f"waiting for {owner}, which fetches into the mirror {root}\n"
    os.close(handle)
    room(root)
    assert (root / MARK).read_text() == str(os.getpid())


def test_mirror_lock_whose_owner_makes_progress_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[float] = []

    def sleep(seconds: float) -> None:
        """Every half a patience of the clock below the owner fetches a file, twenty times."""
        looks.append(seconds)
        os.utime(root / MARK, ns=(len(looks), len(looks)))
        if len(looks) == 20:
            os.close(handle)

    root = tmp_path / "mirror"
    handle = held_by(root, b"1")
    monkeypatch.setattr(mirror_lock.time, "sleep", sleep)
    monkeypatch.setattr(mirror_lock.time, "monotonic", lambda: 301.0 * len(looks))
    room(root)
    assert len(looks) == 20


def test_process_that_fetches_shows_its_progress(tmp_path: Path) -> None:
    folder, mark = MirrorFolder(tmp_path, PLENTY), tmp_path / MARK
    with folder.locked():
        os.utime(mark, (1, 1))
        show_progress()
        assert mark.stat().st_mtime > 1
    os.utime(mark, (1, 1))
    show_progress()
    assert mark.stat().st_mtime == 1


def test_forked_process_uses_a_mirror_that_another_thread_had_locked(tmp_path: Path) -> None:
    root, is_locked, may_end = tmp_path / "mirror", threading.Event(), threading.Event()
    room(root)

    def lock() -> None:
        with MirrorFolder(root, PLENTY).locked():
            is_locked.set()
            may_end.wait(60)

    thread = threading.Thread(target=lock)
    thread.start()
    assert is_locked.wait(60)
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        try:
            os.write(write, b"forked")
            is_free = mirror_folder._lock.acquire(timeout=5)  # the owner is in the other process
            os.write(write, b"free" if is_free and not mirror_folder._held else b"locked")
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    may_end.set()
    thread.join()
    assert os.read(read, 100) == b"forkedfree"
    os.close(read)
    os.close(write)
    room(root)


def test_lock_of_a_dead_process_is_not_kept_by_its_child(tmp_path: Path) -> None:
    """The parent dies while it has the lock and an announcement; its child lives on."""
    root = tmp_path / "mirror"
    done_read, done_write = os.pipe()
    told_read, told_write = os.pipe()
    if (parent := os.fork()) == 0:
        room(root)
        with MirrorFolder(root, PLENTY).locked():
            if os.fork() == 0:
                os.close(done_write)  # it ends with this test, however that ends
                os.write(told_write, b"x")
                os.read(done_read, 1)
            os._exit(0)
    os.waitpid(parent, 0)
    assert os.read(told_read, 1) == b"x"
    handle = os.open(root / MARK, os.O_RDWR)
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(handle)
    room(root)
    assert [path.name.split("-")[0] for path in (root / ".in-use").iterdir()] == [str(os.getpid())]
    os.write(done_write, b"x")
    for each in (done_read, done_write, told_read, told_write):
        os.close(each)


def test_odd_files_among_the_announcements_are_left_alone(tmp_path: Path) -> None:
    root, victim = tmp_path / "mirror", tmp_path / "victim"
    victim.write_bytes(b"mine")
    room(root)
    in_use = root / ".in-use"
    names = [f"{number}-0123abcd" for number in range(1, 6)]
    (in_use / names[0]).symlink_to(victim)
    os.mkfifo(in_use / names[1])
    (in_use / names[2]).mkdir()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(in_use / names[3]))
    (in_use / "somebody's").write_bytes(b"mine, too")
    (in_use / names[4]).write_bytes(b"\xff\xfe of a running process")
    handle = os.open(in_use / names[4], os.O_RDWR)
    fcntl.flock(handle, fcntl.LOCK_EX)
    before = {path.name for path in in_use.iterdir()}
    room(root)
    assert {path.name for path in in_use.iterdir()} == before
    assert victim.read_bytes() == b"mine"
    os.close(handle)  # that process has ended
    room(root)
    assert {path.name for path in in_use.iterdir()} == before - {names[4]}


def test_announcement_that_is_shorter_than_the_last_one_has_nothing_of_it(tmp_path: Path) -> None:
    root = tmp_path / "mirror"
    needs = Needs(root)
    needs.add(root / f"bucket/a-long-name-{number}.h5" for number in range(100))
    room(root)
    (announced,) = (root / ".in-use").iterdir()
    assert len(announced.read_text().splitlines()) == 100
    del needs
    needs = Needs(root)
    needs.add([root / "bucket/short.h5"])
    room(root)
    assert announced.read_text() == "bucket/short.h5"


def test_mirror_whose_folder_was_removed_is_made_anew(tmp_path: Path) -> None:
    root = tmp_path / "mirror"
    room(root)
    shutil.rmtree(root)
    room(root)
    assert len(list((root / ".in-use").iterdir())) == 1


def test_mirror_stays_the_opened_folder_when_another_one_gets_its_name(tmp_path: Path) -> None:
    root, folder = tmp_path / "mirror", MirrorFolder(tmp_path / "mirror", 10)
    with folder.locked() as opened:
        assert isinstance(opened, OpenRoot)
        root.rename(tmp_path / "renamed")
        root.mkdir()
        (root / "mine.h5").write_bytes(bytes(100))
        (tmp_path / "renamed/old.h5").write_bytes(bytes(100))
        folder.make_room(opened, 1)
    assert (root / "mine.h5").exists()
    assert not (tmp_path / "renamed/old.h5").exists()
