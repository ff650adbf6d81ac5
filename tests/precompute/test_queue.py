"""The queue of a pass: grouping of blocks, and the end of its rounds."""

from __future__ import annotations

from pathlib import Path

import pytest

from teach_once.precompute.compute.queue import BlockQueue, Rounds
from teach_once.store.errors import CacheError
from teach_once.store.format.spec import Block
from teach_once.store.write.pending_blocks import Work


def test_block_queue_hands_out_every_block_once_with_views_of_the_same_samples() -> None:
    work = [Work(Block(v, b, 8 * b, 8 * b + 8), ("logits",)) for v in range(5) for b in range(3)]
    work[7] = Work(work[7].block, ("attention",))
    queue = BlockQueue(work, 3)
    assert (queue.num_blocks, queue.num_images) == (15, 120)
    found = list(iter(queue.take, []))
    assert {item for group in found for item in group} == set(work)
    assert sum(map(len, found)) == len(work)
    assert all(len({(i.block.start, i.taps) for i in group}) == 1 for group in found)
    assert [len(group) for group in found] == [3, 3, 3, 1, 2, 2, 1]


class _Unsearchable(Work):
    """A block that no list may be searched for, as that takes time by their number."""

    __hash__ = Work.__hash__

    def __eq__(self, other: object) -> bool:
        raise AssertionError("searched for")


def test_block_queue_hands_out_blocks_without_a_search_through_all_of_them() -> None:
    work = [_Unsearchable(Block(v, b, b, b + 1), ("t",)) for v in range(50) for b in range(200)]
    queue = BlockQueue(work, 8)
    assert sum(1 for _ in iter(lambda: len(queue.take()), 0)) == 7 * 200


class _Left:
    """A writer that finds these lists left over, one after the other."""

    def __init__(self, *lists: list[Work] | None) -> None:
        self._lists = iter(lists)

    def left_over(self) -> list[Work] | None:
        return next(self._lists)


WORK = [Work(Block(0, index, 8 * index, 8 * index + 8), ("logits",)) for index in range(3)]


def test_rounds_of_a_single_process_end_when_nothing_is_left() -> None:
    rounds = Rounds(Path("cache"), _Left(WORK[1:], WORK[2:], []), WORK)
    assert list(rounds) == [WORK, WORK[1:], WORK[2:]]
    assert rounds.is_complete


def test_rounds_of_a_rank_while_others_run_end_incomplete() -> None:
    rounds = Rounds(Path("cache"), _Left(None), WORK)
    assert list(rounds) == [WORK]
    assert not rounds.is_complete


def test_rounds_without_own_work_begin_with_what_others_left() -> None:
    rounds = Rounds(Path("cache"), _Left(WORK[:1], []), [])
    assert list(rounds) == [WORK[:1]]


def test_rounds_that_leave_as_many_blocks_as_before_are_an_error() -> None:
    with pytest.raises(CacheError, match="another program changes committed blocks"):
        list(Rounds(Path("cache"), _Left(WORK[1:], WORK[1:], []), WORK))
