"""A cache has one writer, or the processes of one job, which share the work."""

from __future__ import annotations

import fcntl
import itertools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from teach_once.precompute.job import job_of
from teach_once.runtime.errors import Busy
from teach_once.runtime.safe.locks import Job, WriterLock
from teach_once.store import CacheBusy, CacheWriter, TeacherCache
from tests.support.caches.random_cache import fill, open_writer, records_of
from tests.support.project import ROOT


def test_a_second_writer_is_refused_with_the_pid_of_the_first(tmp_path: Path) -> None:
    with open_writer(tmp_path / "c"), pytest.raises(CacheBusy, match=f"process {os.getpid()} on"):
        open_writer(tmp_path / "c")
    with open_writer(tmp_path / "c"):
        pass


def test_another_process_is_refused_too_and_readers_are_not(tmp_path: Path) -> None:
    path = fill(tmp_path / "c")
    code = (
        "import sys; from pathlib import Path\n"
        "from tests.support.caches.random_cache import open_writer\n"
        "from teach_once.store import CacheError, TeacherCache\n"
        "TeacherCache.open(sys.argv[1]).read_view(0)\n"
        "try:\n    open_writer(Path(sys.argv[1]))\n"
        "except CacheError as error:\n    print(error)\n    sys.exit(3)"
    )
    with open_writer(path):
        result = subprocess.run(
            [sys.executable, "-c", code, str(path)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
    assert result.returncode == 3, result.stderr
    assert f"is being written by process {os.getpid()}" in result.stdout


def test_the_lock_dies_with_its_owner(tmp_path: Path) -> None:
    code = (
        "import os, sys\nfrom pathlib import Path\n"
        "from tests.support.caches.random_cache import open_writer\n"
        "writer = open_writer(Path(sys.argv[1])); os.kill(os.getpid(), 9)"
    )
    killed = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "c")], cwd=ROOT, check=False
    )
    assert killed.returncode == -9
    with open_writer(tmp_path / "c") as writer:
        assert len(writer.work) == 6


HOLDS_A_LOCK_AND_FORKS = """
import os, sys, time
from pathlib import Path
from teach_once.precompute.job import job_of
from teach_once.runtime.safe.locks import Job, WriterLock
lock = WriterLock(Path(sys.argv[1]), Job())
if (worker := os.fork()) == 0:
    time.sleep(60)
time.sleep(0.3)  # for the worker to begin
os.close(0)
print(worker, flush=True)
os.kill(os.getpid(), 9)
"""


def test_the_lock_dies_with_its_owner_though_its_workers_live_on(tmp_path: Path) -> None:
    killed = subprocess.Popen(
        [sys.executable, "-c", HOLDS_A_LOCK_AND_FORKS, str(tmp_path)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert killed.stdout is not None
    worker = int(killed.stdout.readline())
    try:
        assert killed.wait() == -signal.SIGKILL
        os.kill(worker, 0)  # is alive
        WriterLock(tmp_path, Job()).release()
    finally:
        os.kill(worker, signal.SIGKILL)
        killed.stdout.close()


def test_the_owners_name_is_flushed_so_that_other_hosts_see_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[bytes] = []
    monkeypatch.setattr(os, "fsync", lambda handle: flushed.append(os.pread(handle, 4096, 0)))
    WriterLock(tmp_path, Job()).release()
    assert [b'"pid": %d' % os.getpid() in text for text in flushed] == [True]


def test_a_forked_process_that_lets_go_leaves_the_lock_to_its_owner(tmp_path: Path) -> None:
    lock = WriterLock(tmp_path, Job())
    child = multiprocessing.get_context("fork").Process(target=lock.release)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # other tests left threads behind
        child.start()
    child.join()
    assert child.exitcode == 0
    with pytest.raises(Busy):
        WriterLock(tmp_path, Job())
    lock.release()


def do_share(path: Path, job: Job, die_after: int | None = None) -> None:
    with open_writer(path, job=job) as writer:
        for done, item in enumerate(writer.work):
            if done == die_after:
                os._exit(9)
            write(writer, item)
        while left := writer.left_over():
            for item in left:
                write(writer, item)
        if left is not None:
            writer.finish({"by": job.rank})


def write(writer, item) -> None:
    records = records_of(item.block.view, slice(item.block.start, item.block.stop))
    writer.write_block(item.block, {tap: records[tap] for tap in item.taps})


def run_job(path: Path, name: str, world: int, die_after: dict[int, int] | None = None) -> None:
    processes = multiprocessing.get_context("forkserver")
    children = [
        processes.Process(
            target=do_share, args=(path, Job(name, rank, world), (die_after or {}).get(rank))
        )
        for rank in range(world)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join()


def assert_whole(path: Path) -> None:
    opened = TeacherCache.open(path)
    assert opened.faults() == []
    for view in range(2):
        for tap, values in opened.read_view(view).items():
            assert (values == records_of(view, slice(None))[tap]).all()


@pytest.mark.parametrize("world", [2, 3])
def test_the_processes_of_a_job_share_the_work_and_the_last_one_finishes(
    tmp_path: Path, world: int
) -> None:
    run_job(tmp_path / "c", "job", world)
    assert_whole(tmp_path / "c")
    assert TeacherCache.open(tmp_path / "c").measured["by"] in range(world)
    lines = [
        line
        for file in (tmp_path / "c" / "journal").glob("*.jsonl")
        for line in file.read_text().splitlines()
    ]
    assert len(lines) == 6  # no block was written twice


def test_other_ranks_or_the_next_job_do_the_work_of_a_dead_process(tmp_path: Path) -> None:
    run_job(tmp_path / "c", "job", 2, die_after={0: 1, 1: 1})
    with open_writer(tmp_path / "c") as writer:
        assert 0 < len(writer.work) < 6
    run_job(tmp_path / "c", "again", 3)
    assert_whole(tmp_path / "c")


def test_a_process_of_another_job_is_refused(tmp_path: Path) -> None:
    with (
        open_writer(tmp_path / "c", job=Job("one", 0, 2)),
        pytest.raises(CacheBusy),
    ):
        open_writer(tmp_path / "c", job=Job("two", 1, 2))


def opened_beside(path: Path, job: Job) -> Future[CacheWriter]:
    """The writer of another rank, as soon as the leader lets it in."""
    pool = ThreadPoolExecutor(1)
    future = pool.submit(open_writer, path, job=job)
    pool.shutdown(wait=False)
    time.sleep(0.2)
    assert not future.done()
    return future


def test_a_rank_takes_the_lead_where_the_leader_dies_while_it_prepares(tmp_path: Path) -> None:
    leader = WriterLock(tmp_path, Job("one", 0, 3))
    waiting = [opened_beside(tmp_path, Job("one", rank, 3)) for rank in (1, 2)]
    leader.release()  # all that is left of a process that was killed
    with waiting[0].result(timeout=300) as first, waiting[1].result(timeout=10) as second:
        found = [[item.block for item in writer.work] for writer in (first, second)]
        assert sorted(map(len, found)) == [2, 2]
        assert not set(found[0]) & set(found[1])


def test_ranks_wait_as_long_as_the_leader_prepares_though_its_name_is_missing_for_a_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leader = WriterLock(tmp_path, Job("one", 0, 2))
    hours = itertools.count(0, 3600)
    monkeypatch.setattr("teach_once.runtime.safe.locks.time.monotonic", lambda: float(next(hours)))
    waiting = opened_beside(tmp_path, Job("one", 1, 2))
    file = tmp_path / "writer.lock"
    owner = file.read_bytes()
    file.write_bytes(b"")
    time.sleep(0.2)
    file.write_bytes(owner)
    leader.release()
    with waiting.result(timeout=300) as writer:
        assert len(writer.work) == 3


def test_a_lock_file_that_is_signed_again_has_an_owner_at_every_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    WriterLock(tmp_path, Job("a-longer-name", 0, 2)).release()
    found: list[str] = []

    def watched(change: Callable[..., object]) -> Callable[..., object]:
        def changed(*args: object) -> object:
            result = change(*args)
            found.append(json.loads((tmp_path / "writer.lock").read_bytes())["job"])
            return result

        return changed

    monkeypatch.setattr(os, "pwrite", watched(os.pwrite))
    monkeypatch.setattr(os, "ftruncate", watched(os.ftruncate))
    leader = WriterLock(tmp_path, Job("one", 0, 2))
    leader.let_others_in()
    leader.release()
    assert set(found) == {"one"}


def test_a_process_that_never_signs_is_an_owner_without_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("teach_once.runtime.safe.locks._POLLS", 2)
    with (tmp_path / "writer.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        for job in (Job(), Job("one", 1, 2)):
            with pytest.raises(Busy, match=r"is being written by process \?"):
                WriterLock(tmp_path, job)


@pytest.mark.parametrize("left_behind", ['{"job": "two", "pending": []}', "", None])
def test_the_work_list_of_another_job_is_refused(tmp_path: Path, left_behind: str | None) -> None:
    with open_writer(tmp_path / "c", job=Job("one", 0, 2)):
        file = tmp_path / "c" / "journal" / "job.json"
        file.unlink() if left_behind is None else file.write_text(left_behind)
        with pytest.raises(
            CacheBusy, match="is not the work list of this job: expected job 'one', found"
        ):
            open_writer(tmp_path / "c", job=Job("one", 1, 2))


def test_ranks_split_one_list(tmp_path: Path) -> None:
    with (
        open_writer(tmp_path / "c", job=Job("one", 0, 2)) as first,
        open_writer(tmp_path / "c", job=Job("one", 1, 2)) as second,
    ):
        blocks = [[item.block for item in writer.work] for writer in (first, second)]
        assert [len(share) for share in blocks] == [3, 3]
        everything = sorted(blocks[0] + blocks[1])
        assert everything == list(first.manifest.blocks())
        assert first.left_over() is None  # the second is still there


def test_under_torchrun_names_ranks_find_each_other(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert job_of("", 1, 2).name == job_of("", 0, 2).name != ""


def test_growing_by_views_changes_no_existing_file(tmp_path: Path) -> None:
    path = fill(tmp_path / "c")
    before = {f: f.stat().st_mtime_ns for f in (path / "teacher.zarr").glob("*/c.*")}
    fill(path, num_views=5)
    opened = TeacherCache.open(path)
    assert opened.num_views == 5
    assert all(f.stat().st_mtime_ns == time_ns for f, time_ns in before.items())
    for view in range(5):
        expected = records_of(view, slice(None))["logits"]
        assert (opened.read_view(view)["logits"] == expected).all()


def test_asking_for_fewer_views_leaves_the_others(tmp_path: Path) -> None:
    path = fill(tmp_path / "c", num_views=3)
    with open_writer(path, num_views=1) as writer:
        assert writer.work == []
    assert TeacherCache.open(path).num_views == 3


def test_the_first_views_can_be_read_while_more_are_being_added(tmp_path: Path) -> None:
    path = fill(tmp_path / "c")
    fill(path, num_views=4, blocks=1)
    opened = TeacherCache.open(path, num_views=2)
    assert opened.num_views == 2
    expected = records_of(1, slice(None))["stage1"]
    assert np.array_equal(opened.read_view(1)["stage1"], expected)
    with pytest.raises(LookupError, match="7 of 12 blocks"):
        TeacherCache.open(path)
    with pytest.raises(IndexError, match=r"ARGS=views\.count=5"):
        TeacherCache.open(path, num_views=5)
