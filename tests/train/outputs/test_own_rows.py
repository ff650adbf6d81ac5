"""What each of several ranks holds of the teacher's outputs: the rows of its own samples alone."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from teach_once.store import TeacherCache
from teach_once.train.engine.ranks import Ranks
from teach_once.train.engine.slices import Slices
from teach_once.train.outputs.rank_outputs import OwnRows
from teach_once.train.outputs.teacher_outputs import TeacherSource, WindowedTeacher, WrongView
from teach_once.views.pixels.batches import ViewBatch
from teach_once.views.seeds import permutation
from tests.support.teacher_cache import CPU, make_cache

TAPS = ["logits", "stage2", "correct"]
WORLD, SEED, BATCH = 3, 4, 16


@pytest.fixture
def cache(small_teacher: Callable, tmp_path) -> TeacherCache:
    return make_cache(small_teacher(), tmp_path / "caches", block_rows=8)  # 60 samples, 3 views


def slices_of(rank: int) -> Slices:
    return Slices(Ranks(rank, WORLD), BATCH, num_parts=2)


def whole_views(cache: TeacherCache, rank: int, location: str = "device") -> OwnRows:
    def own_ids(epoch: int) -> np.ndarray:
        return slices_of(rank).samples(permutation(SEED, epoch, 60))

    return OwnRows(cache, TAPS, 3, CPU, own_ids, 1 / WORLD, location)


def windows(cache: TeacherCache, rank: int) -> WindowedTeacher:
    return WindowedTeacher(cache, TAPS, 3, CPU, 16, slices_of(rank).samples)


def batch_of(view: int, ids: np.ndarray) -> ViewBatch:
    some = torch.from_numpy(ids)
    return ViewBatch(view, some, some, some, some)


@pytest.mark.parametrize(
    "opened", [whole_views, lambda cache, rank: whole_views(cache, rank, "host"), windows]
)
def test_the_ranks_together_give_every_sample_its_outputs_in_every_epoch(
    cache: TeacherCache, opened: Callable[[TeacherCache, int], TeacherSource]
) -> None:
    sources = [opened(cache, rank) for rank in range(WORLD)]
    for epoch in (1, 2, 3, 4, 6):  # the fifth is left out: the rows read ahead are not the sixth's
        view, seen = (epoch - 1) % 3, []
        stored = cache.read_view(view, TAPS)
        for rank, source in enumerate(sources):
            order = source.order(SEED, epoch, 60)
            source.start_epoch(epoch, order)
            own = slices_of(rank).samples(order)
            for start in range(0, len(own), 5):
                ids = own[start : start + 5]
                rows = source.outputs(batch_of(view, ids))
                for tap in TAPS:
                    assert np.array_equal(rows[tap], stored[tap][ids]), (epoch, rank, tap)
            seen.extend(own.tolist())
        assert sorted(seen) == list(range(60))
    for source in sources:
        source.close()


def test_a_rank_holds_a_third_of_the_rows(cache: TeacherCache) -> None:
    whole = whole_views(cache, 1)
    whole.start_epoch(1, whole.order(SEED, 1, 60))
    assert {len(rows) for rows in whole._held.rows.values()} == {
        len(slices_of(1).samples(np.arange(60)))
    }
    windowed = windows(cache, 1)
    windowed.start_epoch(1, windowed.order(SEED, 1, 60))
    held = [len(window.result()["logits"]) for window in windowed._windows]
    assert sum(held) < 16
    whole.close()
    windowed.close()


def test_the_next_epochs_rows_are_read_ahead(cache: TeacherCache) -> None:
    source = whole_views(cache, 0)
    source.start_epoch(1, source.order(SEED, 1, 60))
    source._pool.shutdown(wait=True)  # whatever is asked for from here on is an error
    number, reading = source._next
    assert number == 2
    assert np.array_equal(reading.result().ids, slices_of(0).samples(permutation(SEED, 2, 60)))


def test_another_view_another_order_and_another_ranks_samples_are_refused(
    cache: TeacherCache,
) -> None:
    source = whole_views(cache, 0)
    order = source.order(SEED, 1, 60)
    own = slices_of(0).samples(order)
    with pytest.raises(WrongView, match="no epoch has started"):
        source.outputs(batch_of(0, own[:4]))
    source.start_epoch(1, order)
    with pytest.raises(WrongView, match="those of view 0 are loaded"):
        source.outputs(batch_of(1, own[:4]))
    with pytest.raises(AssertionError, match="another order"):
        source.outputs(batch_of(0, own[[0, 2, 1]]))
    with pytest.raises(AssertionError, match="another rank"):
        source.outputs(batch_of(0, np.setdiff1d(order, own)[:4]))
    source.close()


def test_cut_logits_are_made_whole(small_teacher: Callable, tmp_path) -> None:
    cache = make_cache(small_teacher("taps.logits={top: 3}"), tmp_path / "caches", block_rows=8)
    source = OwnRows(cache, ["logits"], 3, CPU, lambda epoch: np.array([50, 3, 17]), 0.05)
    source.start_epoch(1, source.order(SEED, 1, 60))
    rows = source.outputs(batch_of(0, np.array([50, 3, 17])))["logits"]
    source.close()
    expected = cache.read([50, 3, 17], 0, ["logits"])["logits"]
    assert rows.numpy() == pytest.approx(expected, rel=1e-6)


def test_each_epoch_is_read_once_and_ahead(cache: TeacherCache) -> None:
    asked: list[int] = []

    def own_ids(epoch: int) -> np.ndarray:
        asked.append(epoch)
        return slices_of(0).samples(permutation(SEED, epoch, 60))

    source = OwnRows(cache, TAPS, 3, CPU, own_ids, 1 / WORLD)
    for epoch in (1, 2, 3):
        source.start_epoch(epoch, source.order(SEED, epoch, 60))
    source.close()  # the fourth is being read
    assert asked[:3] == [1, 2, 3]
    assert asked[3:] in ([], [4])
