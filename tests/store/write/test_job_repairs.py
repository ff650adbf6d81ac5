"""Any rank of a job repairs the damage that a pass finds, and the repair lasts."""

from __future__ import annotations

from pathlib import Path

import pytest

from teach_once.runtime.safe.locks import Job
from teach_once.store import CacheWriter, TeacherCache
from teach_once.store.write.pending_blocks import Work
from tests.support.caches.damage import flip
from tests.support.caches.random_cache import fill, open_writer, write_item

BITS = ("logits/c.0.1.0", "stage1/c.0.2.0", "correct/c.1.0", "logits/c.1.1.0")


def flip_bits(cache: Path) -> None:
    """Change one bit of each of four blocks, whose files keep their sizes."""
    for name in BITS:
        flip(cache / "teacher.zarr" / name, 3)


def job_writers(cache: Path, world: int, **changes: object) -> list[CacheWriter]:
    """The writers of all ranks; only the leader was asked to read every byte."""
    leader = open_writer(cache, job=Job("j", 0, world), check_every_byte=True, **changes)
    others = [open_writer(cache, job=Job("j", rank, world), **changes) for rank in range(1, world)]
    return [leader, *others]


def run(writer: CacheWriter, work: list[Work]) -> None:
    for item in work:
        write_item(writer, item)


def test_every_rank_repairs_its_share_of_the_bits_that_the_leader_found(tmp_path: Path) -> None:
    path = fill(tmp_path / "c")
    flip_bits(path)
    for writer in (writers := job_writers(path, 3)):
        assert writer.work != []
    for writer in writers:
        with writer:
            run(writer, writer.work)
            left = writer.left_over()
    assert left == []
    assert TeacherCache.open(path).faults() == []


def test_the_last_rank_repairs_the_flipped_bits_that_dead_ranks_left(tmp_path: Path) -> None:
    path = fill(tmp_path / "c")
    flip_bits(path)
    dead, last = job_writers(path, 2)
    with last:
        run(last, last.work)
        with dead:
            pass
        left = last.left_over()
        assert [item.block for item in left or []] == [item.block for item in dead.work]
        run(last, left or [])
        assert last.left_over() == []
    assert TeacherCache.open(path).faults() == []


def test_ranks_repair_damage_in_views_and_taps_that_nobody_asked_for(tmp_path: Path) -> None:
    path = fill(tmp_path / "c")
    flip_bits(path)
    for writer in job_writers(path, 2, num_views=1):
        with writer:
            run(writer, writer.work)
            left = writer.left_over()
    assert left == []
    assert TeacherCache.open(path).faults() == []


@pytest.mark.parametrize("late", ["missing and flipped", "flipped"])
def test_a_late_rank_keeps_its_share_and_leaves_what_is_done(tmp_path: Path, late: str) -> None:
    path = fill(tmp_path / "c")
    flip_bits(path)
    if late != "flipped":  # of the same block, whose other tap the leader alone found
        (path / "teacher.zarr" / "stage1" / "c.1.0.0").unlink()
    leader = open_writer(path, job=Job("j", 0, 2), check_every_byte=True)
    whole = open_writer(path, job=Job("j", 1, 2))
    assert {tap for item in whole.work for tap in item.taps} >= {"correct"} - {
        tap for item in leader.work for tap in item.taps
    }
    run(whole, whole.work)
    with whole:
        pass
    assert open_writer(path, job=Job("j", 1, 2)).work == []


def test_a_repair_counts_though_another_rank_has_a_newer_journal_file(tmp_path: Path) -> None:
    path = tmp_path / "c"
    first = open_writer(path, job=Job("j", 0, 2))
    second = open_writer(path, job=Job("j", 1, 2))
    with first:
        run(first, first.work[:1])  # its file has the lower number
        with second:
            run(second, second.work)
        damaged = second.work[0]
        name = f"logits/c.{damaged.block.view}.{damaged.block.index}.0"
        (path / "teacher.zarr" / name).unlink()
        run(first, first.work[1:])
        left = first.left_over()
        assert left == [Work(damaged.block, ("logits",))]
        for item in left:
            write_item(first, item, seed=1)
        assert first.left_over() == []
    assert TeacherCache.open(path).faults() == []
