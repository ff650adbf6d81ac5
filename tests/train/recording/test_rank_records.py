"""When the ranks of a run save and stop: what one asks for, all do one step later."""

from __future__ import annotations

import gc
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from teach_once.runtime.command.signals import StopRequest
from teach_once.runtime.errors import Stopped
from teach_once.train.engine.ranks import AsyncMaxReduce, Ranks
from teach_once.train.recording.checkpoint import Partial
from teach_once.train.recording.distributed_recorder import RankRecorder
from teach_once.train.runs.files import CHECKPOINT_FILE
from teach_once.train.runs.study import Study
from teach_once.train.sessions.student import open_context
from tests.support.teacher_cache import CPU

PARTIAL = Partial(1, 1, torch.zeros(1), {"ce": torch.zeros(())}, 0.0)


@pytest.fixture(autouse=True)
def group(tmp_path: Path) -> Iterator[None]:
    """A group of this process alone: whatever it exchanges, it gets back.

    Networks that were trained in it are collected here: they hold the group, whose threads a forked
    process does not have, so that one that collected them would abort or wait for ever.
    """
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()
    gc.collect()


@pytest.fixture
def recorder_of(make_study: Callable[..., Study]) -> Callable[..., RankRecorder]:
    """The recorder of the first of two ranks."""

    def opened(stop: StopRequest, checkpoint_minutes: float) -> RankRecorder:
        run = make_study().run("ce", 0)
        train_state = open_context(run, CPU, ranks=Ranks(0, 2)).train_state
        return RankRecorder(run, train_state, checkpoint_minutes, stop, time.perf_counter)

    return opened


def test_a_checkpoint_that_is_due_is_saved_by_all_ranks_one_step_later_and_once(
    recorder_of: Callable[..., RankRecorder],
) -> None:
    with recorder_of(StopRequest(), checkpoint_minutes=0) as recorder:
        assert [recorder.is_due() for _ in range(4)] == [False, True, False, True]
        recorder.save(PARTIAL)
        assert (recorder._run.folder / CHECKPOINT_FILE).exists()


def test_a_signal_ends_the_run_one_step_later_with_a_checkpoint(
    recorder_of: Callable[..., RankRecorder],
) -> None:
    stop = StopRequest()
    with recorder_of(stop, checkpoint_minutes=10) as recorder:
        assert not recorder.is_due()
        stop.signal_number = signal.SIGTERM
        assert not recorder.is_due()
        assert recorder.is_due()
        with pytest.raises(Stopped, match="in epoch 1 after step 1"):
            recorder.save(PARTIAL)
        assert (recorder._run.folder / CHECKPOINT_FILE).exists()


def test_a_signal_in_the_last_step_of_an_epoch_ends_the_run_there(
    recorder_of: Callable[..., RankRecorder],
) -> None:
    stop = StopRequest()
    with recorder_of(stop, checkpoint_minutes=10) as recorder:
        recorder.end_if_asked(1)
        assert not recorder.is_due()
        stop.signal_number = signal.SIGTERM
        with pytest.raises(Stopped, match="after epoch 2"):
            recorder.end_if_asked(2)


def test_a_signal_to_another_rank_ends_this_one_too(
    recorder_of: Callable[..., RankRecorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    start = AsyncMaxReduce.start
    monkeypatch.setattr(
        AsyncMaxReduce, "start", lambda reduction, own: start(reduction, [signal.SIGTERM, own[1]])
    )
    with recorder_of(StopRequest(), checkpoint_minutes=10) as recorder:
        assert not recorder.is_due()
        assert recorder.is_due()
        with pytest.raises(Stopped, match="in epoch 1 after step 1"):
            recorder.save(PARTIAL)
