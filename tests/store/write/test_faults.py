"""Faults of real machines: kills, signals, full and read-only disks, damage."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from teach_once.configs.schema import TeacherConfig
from teach_once.precompute.command import cli
from teach_once.store import CacheError, CacheFull, CacheNotWritable, CacheWriter, TeacherCache
from teach_once.store.format.journal import read_journal
from teach_once.store.format.manifest import read_manifest
from teach_once.store.write.pending_blocks import Work
from tests.support.caches.damage import flip
from tests.support.caches.random_cache import fill, open_writer, records_of
from tests.support.caches.teacher_cache import make_cache, setup_of
from tests.support.programs.killed_pass import run_pass
from tests.support.programs.pass_commands import arguments_of, overrides_of
from tests.support.programs.processes import start

Make = Callable[..., TeacherConfig]


def all_records(path: Path) -> dict[str, np.ndarray]:
    cache = TeacherCache.open(path)
    views = [cache.read_view(view) for view in range(cache.num_views)]
    return {tap: np.stack([view[tap] for view in views]) for tap in cache.taps}


# ---- SIGKILL


@pytest.mark.parametrize("number", [5, pytest.param(50, marks=pytest.mark.long)])
def test_kills_at_random_moments_and_a_resume_after_each_give_the_uninterrupted_cache(
    small_teacher: Make, tmp_path: Path, number: int
) -> None:
    config = small_teacher()
    overrides = overrides_of(config.teacher.weights)
    whole = make_cache(config, tmp_path / "whole", batch_size=2, block_rows=4)
    path = setup_of(config, tmp_path / "killed").path
    processes = multiprocessing.get_context("forkserver")
    random.seed(0)
    kills = halfway = committed = 0
    while kills < number:
        child = processes.Process(target=run_pass, args=(overrides, tmp_path / "killed"))
        child.start()
        wanted = committed + random.randint(0, 6)
        while child.exitcode is None and num_committed(path) < wanted:
            time.sleep(0.01)  # reading the journal is this process's only work
        child.join(random.uniform(0, 0.05))
        if child.exitcode is None:
            child.kill()
            child.join()
            kills += 1
        found = num_committed(path)
        assert found >= committed  # what was committed stays committed
        halfway += committed < found
        committed = found
        if child.exitcode == 0:  # finished: begin again, so that every moment gets its kills
            assert_same(all_records(path), all_records(whole.path))
            shutil.rmtree(path)
            committed = 0
    assert halfway >= number // 5, "the kills came too early to say anything"
    run_pass(overrides, tmp_path / "killed")
    assert TeacherCache.open(path).faults() == []
    assert not list(path.rglob("*.tmp"))
    assert_same(all_records(path), all_records(whole.path))


def num_committed(path: Path) -> int:
    if not (path / "manifest.json").exists():
        return 0
    return len(read_journal(path, read_manifest(path)).committed)


def assert_same(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    for tap, values in ours.items():
        assert (values == theirs[tap]).all(), tap


# ---- SIGTERM and Ctrl-C


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_lets_the_block_finish_and_the_same_command_resumes(
    small_teacher: Make, tmp_path: Path, number: int, status: int
) -> None:
    config = small_teacher()
    call = ["precompute", *arguments_of(config, tmp_path)]
    call[call.index("--batch-size") + 1] = "1"
    process = start(*call, "views.count=9")
    while not list(tmp_path.glob("*/journal/*.jsonl")):
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(number)
    _, told = process.communicate(timeout=300)
    assert process.returncode == status, told
    assert "the same command resumes" in told
    assert "Traceback" not in told
    (path,) = tmp_path.iterdir()
    (journal,) = (path / "journal").iterdir()
    assert journal.read_bytes().endswith(b"\n")
    assert not list(path.rglob("*.tmp"))
    with pytest.raises(CacheError, match="is not finished"):
        TeacherCache.open(path)
    assert cli([*arguments_of(config, tmp_path), "views.count=9"]) == 0
    assert TeacherCache.open(path).faults() == []


# ---- full disk, read-only folder


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a small tmpfs; needs the right to mount, as root in a container usually has."""
    place = tmp_path / "mounted"
    place.mkdir()

    def mount_with(options: str) -> Path:
        call = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
        done = subprocess.run(call, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            pytest.skip(f"no right to mount a tmpfs here: {done.stderr.strip()}")
        return place

    yield mount_with
    subprocess.run(["umount", str(place)], capture_output=True, check=False)


def fill_the_rest(disk: Path, leave_bytes: int) -> Path:
    free = os.statvfs(disk)
    size = free.f_bavail * free.f_frsize - leave_bytes
    (disk / "ballast").write_bytes(b"\0" * size)
    return disk / "ballast"


def write_all(writer: CacheWriter, work: list[Work]) -> None:
    for item in work:
        rows = slice(item.block.start, item.block.stop)
        writer.write_block(item.block, records_of(item.block.view, rows))


def test_a_disk_that_fills_up_is_an_error_with_figures_and_keeps_what_is_committed(
    mount: Callable[[str], Path],
) -> None:
    disk = mount("size=1m")
    path = disk / "t-e4812202"
    with open_writer(path) as writer:
        write_all(writer, writer.work[:2])
        ballast = fill_the_rest(disk, 4096)
        with pytest.raises(OSError, match=r"bytes are still to be written, .* are free") as caught:
            write_all(writer, writer.work[2:])
    assert isinstance(caught.value, CacheError)
    assert "make cache-teacher TEACHER=t" in str(caught.value)
    ballast.unlink()
    with open_writer(path) as writer:
        assert writer.work[0].block.index == 2
    fill(path)
    for view in range(2):
        found = TeacherCache.open(path).read_view(view)
        assert (found["logits"] == records_of(view, slice(None))["logits"]).all()


def test_a_disk_without_room_for_the_first_file_is_an_error_too(
    mount: Callable[[str], Path],
) -> None:
    disk = mount("size=64k")
    fill_the_rest(disk, 4096)
    with pytest.raises(CacheFull, match="too full"):
        fill(disk / "t-e4812202")


def test_a_pass_refuses_to_start_when_the_disk_is_too_small(
    small_teacher: Make, mount: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    disk = mount("size=2m")
    ballast = fill_the_rest(disk, 8192)
    arguments = arguments_of(small_teacher(), disk)
    assert cli(arguments) == 2
    told = capsys.readouterr()
    assert "60 samples, 245 bytes each\nto do    180 of 180 records" in told.out
    assert "bytes needed, 8,192 bytes free" in told.err
    assert not [entry for entry in disk.iterdir() if entry.is_dir()]
    ballast.unlink()
    assert cli(arguments) == 0


def test_a_read_only_folder_can_be_read_and_says_that_it_cannot_be_written(
    mount: Callable[[str], Path],
) -> None:
    disk = mount("size=1m")
    path = fill(disk / "t-e4812202")
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    assert TeacherCache.open(path).faults() == []
    with pytest.raises(CacheNotWritable, match=r"cannot be written to: Read-only file system"):
        open_writer(path)
    with pytest.raises(PermissionError, match="make it writable"):
        open_writer(disk / "another")


# ---- damage is repaired by the same command, which rewrites nothing else


def only(paths: Iterator[Path]) -> Path:
    (path,) = paths
    return path


HARMS: dict[str, tuple[Callable[[Path], object], str]] = {
    "first byte of a chunk": (
        lambda c: flip(c / "teacher.zarr/stage2/c.1.3.0", 0),
        "tap stage2, view 1, block 3",
    ),
    "middle of a chunk": (
        lambda c: flip(c / "teacher.zarr/logits/c.2.0.0", 40),
        "tap logits, view 2, block 0",
    ),
    "checksum of a chunk": (
        lambda c: flip(c / "teacher.zarr/correct/c.0.14", -1),
        "tap correct, view 0, block 14",
    ),
    "truncated chunk": (
        lambda c: os.truncate(c / "teacher.zarr/stage1/c.0.2.0", 9),
        "tap stage1, view 0, block 2",
    ),
    "empty chunk": (
        lambda c: os.truncate(c / "teacher.zarr/stage3/c.0.0.0", 0),
        "tap stage3, view 0, block 0",
    ),
    "deleted chunk": (
        lambda c: (c / "teacher.zarr/logits/c.0.1.0").unlink(),
        "tap logits, view 0, block 1",
    ),
    "array metadata": (lambda c: flip(c / "teacher.zarr/logits/zarr.json", 30), "zarr.json"),
    "group metadata": (lambda c: (c / "teacher.zarr/zarr.json").unlink(), "zarr.json"),
    "labels": (lambda c: flip(c / "teacher.zarr/labels/c.0", 3), "labels damaged"),
    "preview": (lambda c: flip(c / "teacher.zarr/preview/c.0.0.0.0", 3), "preview damaged"),
    "manifest": (lambda c: flip(c / "manifest.json", 200), "manifest.json is damaged"),
    "half a manifest": (
        lambda c: os.truncate(c / "manifest.json", 300),
        "manifest.json is damaged",
    ),
    "journal": (lambda c: flip(only((c / "journal").glob("*.jsonl")), 50), "journal damaged"),
    "torn journal": (
        lambda c: os.truncate(
            only((c / "journal").glob("*.jsonl")),
            only((c / "journal").glob("*.jsonl")).stat().st_size - 20,
        ),
        "is not finished",
    ),
    "leftovers beside a deleted chunk": (
        lambda c: (
            (c / "teacher.zarr/logits/.c.0.0.0.12345.tmp").write_bytes(b"half"),
            (c / "teacher.zarr/logits/c.0.1.0").unlink(),
        ),
        "tap logits, view 0, block 1",
    ),
}


@pytest.fixture(scope="module")
def sound(small_teacher: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole cache of 45 blocks, to be copied."""
    folder = tmp_path_factory.mktemp("sound")
    return make_cache(small_teacher(), folder, batch_size=2, block_rows=4).path


@pytest.mark.parametrize("harm", HARMS)
def test_damage_is_found_named_and_repaired_by_the_same_command(
    sound: Path, small_teacher: Make, tmp_path: Path, harm: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config, path = small_teacher(), shutil.copytree(sound, tmp_path / sound.name)
    before = all_records(path)
    times = {file: file.stat().st_mtime_ns for file in path.glob("teacher.zarr/*/c.*")}
    do_harm, named = HARMS[harm]
    do_harm(path)
    with pytest.raises(CacheError) as caught:
        read_everything(path)
    assert named in str(caught.value)
    assert cli(arguments_of(config, tmp_path)) == 0, capsys.readouterr().err
    assert_same(all_records(path), before)
    assert not list(path.rglob("*.tmp"))
    touched = {
        (file.parent.name, file.name)
        for file, time_ns in times.items()
        if file.stat().st_mtime_ns != time_ns
    }
    blocks = {tuple(name.split(".")[1:3]) for _, name in touched}
    assert len(touched) <= (5 if "journal" in harm else 1), touched
    assert len(blocks) <= 1


def read_everything(path: Path) -> None:
    faults = TeacherCache.open(path).faults()
    if faults:
        raise CacheError(str(faults[0]))


def test_the_journal_of_another_cache_counts_as_damaged(
    small_teacher: Make, tmp_path: Path
) -> None:
    ours = make_cache(small_teacher(), tmp_path).path
    theirs = make_cache(small_teacher("views.seed=1"), tmp_path).path
    for file in (ours / "journal").iterdir():
        file.write_bytes((theirs / "journal" / file.name).read_bytes())
    assert read_manifest(ours).num_views == 3
    with pytest.raises(CacheError, match="journal damaged"):
        TeacherCache.open(ours)
