"""The contract of `TeacherOutputs`, run by every placement, origin and wrapper."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import torch

from teach_once.store import TeacherCache
from teach_once.train.engine.ranks import Ranks
from teach_once.train.engine.slices import Slices
from teach_once.train.outputs.cached_teacher import CachedTeacher, WindowedTeacher
from teach_once.train.outputs.ensemble import TeacherEnsemble
from teach_once.train.outputs.shared_loader import SharedOutputs, SharedPixels
from teach_once.train.outputs.shuffle_buffer import ShuffleBuffer
from teach_once.train.outputs.teacher_outputs import Ids, TeacherOutputs, WrongView
from teach_once.train.runs.study import Study
from teach_once.train.sessions.student import open_context
from teach_once.views.pixels.batches import Pixels, ViewBatch
from tests.support.caches.teacher_cache import CPU

TAPS = ["stage1", "stage2"]
WORLD, SEED, BATCH = 3, 4, 16
CACHED = ["device", "host", "window", "one block"]
MEMBERS = [*CACHED, "live", "ensemble", "shared"]


class Member(NamedTuple):
    outputs: TeacherOutputs
    pixels: Pixels
    cache: TeacherCache
    tolerance: float

    def batches(self, view: int, ids: Ids, size: int = 7) -> Iterator[ViewBatch]:
        return self.pixels.batches([view], ids, size)

    def check(self, batch: ViewBatch) -> None:
        found = self.outputs.rows(batch)
        assert set(found) == set(TAPS)
        stored = self.cache.read(batch.host_ids.numpy(), batch.view, TAPS)
        for tap in TAPS:
            difference = found[tap].float() - torch.from_numpy(stored[tap]).float()
            assert difference.abs().max() <= self.tolerance, (tap, batch.view)


def cached(name: str, study: Study) -> TeacherOutputs:
    rows = {"window": 16, "one block": 1}
    if name in rows:
        return WindowedTeacher(study.cache, TAPS, CPU, rows[name])
    return CachedTeacher(study.cache, TAPS, CPU, name)


@pytest.fixture
def study(make_study: Callable[..., Study]) -> Study:
    return make_study()


@pytest.fixture
def member(study: Study, request: pytest.FixtureRequest) -> Iterator[Member]:
    name, pixels, tolerance = request.param, study.pixels(CPU).train, 0.0
    outputs: TeacherOutputs
    if name == "live":
        outputs = open_context(study.run("cd", 0, live_teacher=True), CPU).teacher
        outputs._taps = [tap for tap in outputs._taps if tap.name in TAPS]
        tolerance = 1e-2  # the cache's float16
    elif name == "ensemble":
        sources = [CachedTeacher(study.cache, [tap], CPU) for tap in TAPS]
        outputs = TeacherEnsemble([*sources], [1.0, 1.0], [1, 2])
        outputs._stages = [{"stage1": "stage1"}, {"stage2": "stage2"}]
    elif name == "shared":
        shared = SharedPixels(pixels)
        outputs = SharedOutputs(CachedTeacher(study.cache, ["logits", *TAPS], CPU), shared)
        pixels, outputs = shared, outputs.select_taps(TAPS)
    else:
        outputs = cached(name, study)
    yield Member(outputs, pixels, study.cache, tolerance)
    outputs.close()


def order_of(study: Study, epoch: int) -> Ids:
    """An order that windows allow."""
    return ShuffleBuffer(60, study.cache.manifest.block_rows, 16).order(SEED, epoch)


@pytest.mark.parametrize("member", MEMBERS, indirect=True)
def test_rows_every_epoch_are_of_the_samples_and_the_view(member: Member, study: Study) -> None:
    for epoch, view in enumerate((0, 1, 1, 2, 0)):
        ids = order_of(study, epoch)
        member.outputs.start_epoch(view, ids)
        member.outputs.prefetch((view + 1) % 3, order_of(study, epoch + 1))
        for batch in member.batches(view, ids):
            member.check(batch)


@pytest.mark.parametrize("member", MEMBERS, indirect=True)
def test_rows_from_the_middle_of_an_epoch_are_right(member: Member, study: Study) -> None:
    ids = order_of(study, 2)
    member.outputs.start_epoch(1, ids)
    for batch in member.batches(1, ids[41:]):
        member.check(batch)


@pytest.mark.parametrize(
    "member", ["device", "host", "window", "ensemble", "shared"], indirect=True
)
def test_rows_of_a_batch_of_another_view_are_refused(member: Member, study: Study) -> None:
    ids = order_of(study, 2)
    (batch,) = member.batches(1, ids[:4])
    if not isinstance(member.pixels, SharedPixels):
        with pytest.raises(WrongView, match="view 1, but no epoch has started"):
            member.outputs.rows(batch)
    member.outputs.start_epoch(1, ids)
    member.outputs.prefetch(0, ids)
    for wrong in member.batches(0, ids[:4]):
        with pytest.raises(WrongView, match="view 0, but the outputs of view 1 are loaded"):
            member.outputs.rows(wrong)
    for right in member.batches(1, ids[:4]):
        member.check(right)


# ---- several ranks: each passes the ids of its own samples


def own_ids(study: Study, rank: int, epoch: int) -> Ids:
    return Slices(Ranks(rank, WORLD), BATCH, num_parts=2).samples(order_of(study, epoch))


@pytest.mark.parametrize("name", CACHED)
def test_rows_of_all_ranks_together_are_every_samples(study: Study, name: str) -> None:
    pixels = study.pixels(CPU).train
    members = [Member(cached(name, study), pixels, study.cache, 0.0) for _ in range(WORLD)]
    for epoch, view in ((1, 0), (2, 1), (3, 2), (5, 1)):  # the prefetched epoch 4 is left out
        seen: list[int] = []
        for rank, member in enumerate(members):
            ids = own_ids(study, rank, epoch)
            member.outputs.start_epoch(view, ids)
            member.outputs.prefetch((view + 1) % 3, own_ids(study, rank, epoch + 1))
            for batch in member.batches(view, ids, 5):
                member.check(batch)
            seen.extend(ids.tolist())
        assert sorted(seen) == list(range(60))
    for member in members:
        member.outputs.close()


@pytest.mark.parametrize("name", CACHED)
def test_rows_of_another_ranks_sample_are_refused(study: Study, name: str) -> None:
    outputs = cached(name, study)
    outputs.start_epoch(0, own_ids(study, 0, 1))
    (batch,) = study.pixels(CPU).train.batches([0], own_ids(study, 1, 1)[:3], 3)
    with pytest.raises(AssertionError, match="was not passed to"):
        outputs.rows(batch)
    outputs.close()


def test_kept_rows_of_a_rank_are_its_samples_alone(study: Study) -> None:
    whole, windowed, ids = cached("device", study), cached("window", study), own_ids(study, 1, 1)
    for outputs in (whole, windowed):
        outputs.start_epoch(0, ids)
    assert {len(rows) for rows in whole._kept.values()} == {len(ids)}
    assert sum(len(window.result()["stage1"]) for window in windowed._windows) <= len(ids)
    whole.close()
    windowed.close()
