"""The contract of `Recorder`, alone and on several ranks: when it saves, stops and resumes.

Several ranks do one step later what one of them asks for.
"""

from __future__ import annotations

import gc
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from teach_once.runtime.command.signals import StopRequest
from teach_once.runtime.errors import Busy, Stopped
from teach_once.train.engine.ranks import ALONE, AsyncMaxReduce, Ranks
from teach_once.train.recording.checkpoint import Partial
from teach_once.train.recording.recorder import Recorder
from teach_once.train.runs.files import CHECKPOINT_FILE
from teach_once.train.runs.study import Run, Study
from teach_once.train.sessions.student import open_context
from tests.support.caches.teacher_cache import CPU

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
def run(make_study: Callable[..., Study]) -> Run:
    return make_study().run("ce", 0)


def recorder_of(
    run: Run, ranks: Ranks, stop: StopRequest, checkpoint_minutes: float = 10
) -> Recorder:
    """On the first rank, the only one that writes."""
    train_state = open_context(run, CPU, ranks=ranks).train_state
    return Recorder(run, train_state, checkpoint_minutes=checkpoint_minutes, stop=stop)


SEVERAL = Ranks(0, 2)
both = pytest.mark.parametrize(("ranks", "steps_later"), [(ALONE, 0), (SEVERAL, 1)])


@both
def test_is_due_nothing_asked_for_is_false(run: Run, ranks: Ranks, steps_later: int) -> None:
    with recorder_of(run, ranks, StopRequest()) as recorder:
        assert not any(recorder.is_due() for _ in range(3))
        recorder.end_if_asked(1)
    assert not (run.folder / CHECKPOINT_FILE).exists()


@both
def test_is_due_after_the_interval_is_true(run: Run, ranks: Ranks, steps_later: int) -> None:
    with recorder_of(run, ranks, StopRequest(), checkpoint_minutes=0) as recorder:
        assert [recorder.is_due() for _ in range(steps_later + 1)] == [False] * steps_later + [True]
        recorder.save(PARTIAL)
    assert (run.folder / CHECKPOINT_FILE).exists()


@both
def test_save_after_a_signal_stops_and_the_next_recorder_resumes(
    run: Run, ranks: Ranks, steps_later: int
) -> None:
    stop = StopRequest()
    with recorder_of(run, ranks, stop) as recorder:
        assert not recorder.is_due()
        stop.signal_number = signal.SIGTERM
        assert [recorder.is_due() for _ in range(steps_later + 1)] == [False] * steps_later + [True]
        with pytest.raises(Stopped, match="in epoch 1 after step 1"):
            recorder.save(PARTIAL)
    with recorder_of(run, ranks, StopRequest()) as resumed:
        assert resumed.first_epoch == 1
        assert resumed.partial is not None
        assert resumed.partial.step == 1


@both
def test_end_if_asked_signal_in_the_last_step_stops_there(
    run: Run, ranks: Ranks, steps_later: int
) -> None:
    stop = StopRequest()
    with recorder_of(run, ranks, stop) as recorder:
        recorder.end_if_asked(1)
        assert not recorder.is_due()
        stop.signal_number = signal.SIGTERM
        with pytest.raises(Stopped, match="after epoch 2"):
            recorder.end_if_asked(2)


@both
def test_a_second_recorder_of_the_run_is_refused_until_the_first_is_closed(
    run: Run, ranks: Ranks, steps_later: int
) -> None:
    first = recorder_of(run, ranks, StopRequest())
    with pytest.raises(Busy):
        recorder_of(run, ranks, StopRequest())
    first.close()
    recorder_of(run, ranks, StopRequest()).close()


# ---- several ranks alone


def test_is_due_on_ranks_asks_once_for_each_checkpoint(run: Run) -> None:
    with recorder_of(run, SEVERAL, StopRequest(), checkpoint_minutes=0) as recorder:
        assert [recorder.is_due() for _ in range(4)] == [False, True, False, True]


def test_is_due_signal_to_another_rank_is_true(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    start = AsyncMaxReduce.start
    monkeypatch.setattr(
        AsyncMaxReduce, "start", lambda reduction, own: start(reduction, [signal.SIGTERM, own[1]])
    )
    with recorder_of(run, SEVERAL, StopRequest()) as recorder:
        assert not recorder.is_due()
        assert recorder.is_due()
        with pytest.raises(Stopped):
            recorder.save(PARTIAL)
