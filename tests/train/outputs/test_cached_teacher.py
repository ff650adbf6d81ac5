"""Reading ahead, and placement of rows. The common contract is in test_teacher_outputs."""

from __future__ import annotations

import dataclasses
import queue
from collections.abc import Callable

import numpy as np
import pytest
import torch

from teach_once.store import TeacherCache
from teach_once.train.engine.epoch_result import EpochResult
from teach_once.train.outputs import cached_teacher as placement
from teach_once.train.outputs.cached_teacher import CachedTeacher, choose_placement, view_bytes
from teach_once.train.sessions.student import train_student
from teach_once.views.pixels.batches import ViewBatch
from tests.support.caches.teacher_cache import CPU, make_cache

TAPS = ["logits", "stage2", "correct"]


@pytest.fixture
def cache(small_teacher: Callable, tmp_path) -> TeacherCache:
    return make_cache(small_teacher(), tmp_path / "caches", block_rows=8)  # 60 samples, 3 views


def batch_of(view: int, ids: torch.Tensor) -> ViewBatch:
    return ViewBatch(view, ids, ids, ids, ids)


def test_the_location_follows_the_memory(cache: TeacherCache, monkeypatch) -> None:
    size = view_bytes(cache, TAPS)
    assert size == 60 * (10 * 2 + 32 * 2 + 1)
    monkeypatch.setattr(placement, "free_memory", lambda device: 4 * size)
    assert choose_placement(size, CPU) == "device"
    assert choose_placement(size + 1, CPU) == "host"


def test_a_windowed_run_is_another_run_and_learns_as_well(make_study: Callable) -> None:
    study = make_study()
    losses = {}
    for name in ("host", "window"):
        other = dataclasses.replace(study, placement=name)
        epochs: list[EpochResult] = []
        train_student(other.run("cd+gkd", 0), on_epoch=epochs.append)
        losses[name] = [loss for epoch in epochs for loss in epoch.step_losses]
    windowed = dataclasses.replace(study, placement="window")
    assert study.run("cd+gkd", 0).folder != windowed.run("cd+gkd", 0).folder
    assert losses["host"] != losses["window"]
    assert np.mean(losses["window"]) == pytest.approx(np.mean(losses["host"]), rel=0.2)


def test_what_does_not_fit_into_memory_is_windowed_and_says_so(
    make_study: Callable, monkeypatch
) -> None:
    study = make_study()
    assert study.run("cd", 0).window_rows is None
    real = placement.view_bytes(study.cache, study.run("cd", 0).needed_taps)
    monkeypatch.setattr("teach_once.train.outputs.shuffle_buffer.total_memory", lambda: real)
    assert study.run("cd", 0).window_rows == 16  # one block at least
    assert "window" in study.run("cd", 0).identity


def test_taps_that_a_method_does_not_read_do_not_make_its_runs_windowed(
    make_study: Callable, monkeypatch
) -> None:
    study = make_study()
    identities = {method: study.run(method, 0).identity for method in ("ce", "kd", "cd")}
    grown = make_study(["taps.hint={stage: stage1, dtype: float32}"])
    enough = 4 * placement.view_bytes(study.cache, study.run("cd", 0).needed_taps)
    monkeypatch.setattr("teach_once.train.outputs.shuffle_buffer.total_memory", lambda: enough)
    assert grown.window_rows(grown.cache.taps) is not None  # all together would not fit
    for method, identity in identities.items():
        assert grown.run(method, 0).identity == identity
    monkeypatch.setattr("teach_once.train.outputs.shuffle_buffer.total_memory", lambda: 1)
    assert "window" in grown.run("cd", 0).identity
    assert "window" not in grown.run("ce", 0).identity  # which reads nothing


def test_the_next_view_is_read_while_an_epoch_runs(cache: TeacherCache, monkeypatch) -> None:
    read: queue.Queue[int] = queue.Queue()
    read_view = TeacherCache.read_view

    def noted(self: TeacherCache, view: int, *how: object, **named: object) -> object:
        read.put(view)
        return read_view(self, view, *how, **named)

    monkeypatch.setattr(TeacherCache, "read_view", noted)
    source = CachedTeacher(cache, TAPS, CPU)
    reads = []
    for epoch in (1, 2, 3, 4):
        source.start_epoch((epoch - 1) % 3, np.arange(60))
        source.prefetch(epoch % 3, np.arange(60))
        reads.append([read.get(timeout=300) for _ in range(2 if epoch == 1 else 1)])
    source.close()
    assert reads == [[0, 1], [2], [0], [1]]
    assert read.empty()


@pytest.mark.parametrize("location", ["device", "host"])
def test_a_batch_may_be_larger_than_the_one_before(cache: TeacherCache, location: str) -> None:
    source = CachedTeacher(cache, TAPS, CPU, location)
    source.start_epoch(0, np.arange(60))
    stored = cache.read_view(0, TAPS)
    for ids in (torch.arange(3), torch.arange(5, 25), torch.arange(2)):
        found = source.rows(batch_of(0, ids))
        for tap in TAPS:
            assert torch.equal(found[tap], torch.from_numpy(stored[tap])[ids])
    source.close()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_slabs_on_a_gpu_are_right_while_steps_are_queued_and_the_next_ones_are_copied(
    cache: TeacherCache,
) -> None:
    gpu = torch.device("cuda")
    source = CachedTeacher(cache, ["logits"], gpu, "device")
    busy = torch.randn(2048, 2048, device=gpu)
    for epoch in range(1, 31):
        source.start_epoch((epoch - 1) % 3, np.arange(60))
        source.prefetch(epoch % 3, np.arange(60))
        for _ in range(10):
            busy = busy @ busy.softmax(dim=0)
        ids = torch.arange(60)
        batch = ViewBatch((epoch - 1) % 3, ids.to(gpu), ids, ids, ids)
        found = source.rows(batch)["logits"].clone()
        expected = torch.from_numpy(cache.read_view((epoch - 1) % 3, ["logits"])["logits"])
        assert torch.equal(found.cpu(), expected)
    source.close()
