"""Train several students of one study, batch by batch, with shared loading of images.

Runs with the same seed use the same batches in the same order. Each run has its own student,
optimizer, metrics and checkpoints, and gives the same result as alone, bit for bit on a CPU. The
run that is furthest behind takes the next step, so runs stopped at different steps catch up first.

Runs with a live teacher are not trained together, because there the teacher dominates the time, nor
are compiled students, whose code one process would have to compile again for each.
"""

from __future__ import annotations

import functools
import math
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch

from teach_once.runtime.command.options import Compute
from teach_once.runtime.command.signals import StopRequest
from teach_once.runtime.errors import Stopped
from teach_once.runtime.machine.devices import check_device, pick_device
from teach_once.runtime.machine.resources import Share, sharing_machine
from teach_once.train.engine.epoch_result import EpochResult
from teach_once.train.engine.step import TrainContext
from teach_once.train.outputs.shared_loader import SharedOutputs, SharedPixels
from teach_once.train.outputs.shuffle_buffer import outputs_fit
from teach_once.train.recording.options import Recording
from teach_once.train.runs.retrain import take_place
from teach_once.train.runs.study import Run, held_together, needed_together
from teach_once.train.sessions.loop import Position
from teach_once.train.sessions.student import (
    cached_outputs,
    open_context,
    student_training,
    train_state_bytes,
)
from teach_once.views.pixels.resident import DatasetPixels, free_memory

_TRAIN_STATES_FRACTION = 0.25  # fraction of the device's free memory for the students of a group

Outcome = tuple[Run, Exception | None]  # a run, and its error if it failed


def train_together(
    runs: Sequence[Run],
    compute: Compute,
    recording: Recording,
    on_epoch: Callable[[Run, EpochResult], None] | None = None,
) -> Iterator[Outcome]:
    """Train or resume runs grouped by `groups_of`; yields each as it ends.

    on_epoch: replaces the recording's. A failed run does not stop the others. Ctrl-C and SIGTERM
    save a checkpoint of each run and raise Stopped. Raises DatasetError or CacheError if nothing
    can be read.
    """
    with (
        StopRequest() as stop,
        shared_feed(runs, pick_device(compute.device), compute.workers) as open_shared,
    ):
        recordings = {
            run: replace(recording, on_epoch=functools.partial(on_epoch, run) if on_epoch else None)
            for run in runs
        }
        batches = {run: _batches(run, open_shared, recordings[run], stop) for run in runs}
        yield from _in_turn(batches, stop)


def _batches(
    run: Run, open_shared: Callable[[Run], TrainContext], recording: Recording, stop: StopRequest
) -> Generator[Position, None, None]:
    """Train one run as `train.sessions.student.train_run` does, batch by batch."""
    to_train = run.repetition or run
    if to_train.summary is None:
        yield from student_training(open_shared(to_train), to_train, recording, stop).batches()
    if to_train.is_repetition:
        take_place(run.folder)


def _in_turn(
    trainings: Mapping[Run, Generator[Position, None, None]], stop: StopRequest
) -> Iterator[Outcome]:
    """Advance the run that is furthest behind by a batch, until all have ended."""
    positions: dict[Run, Position] = dict.fromkeys(trainings, (0, 0))
    try:
        while positions:
            furthest_behind = min(positions.values())
            turns = deque(run for run, at in positions.items() if at == furthest_behind)
            turns.rotate(-furthest_behind[1])  # rotate, because the first run waits for the images
            for run in turns:
                try:
                    positions[run] = next(trainings[run])
                except Stopped:
                    if stop.is_urgent:
                        raise
                    del positions[run]
                except StopIteration:
                    del positions[run]
                    yield run, None
                except Exception as error:  # unexpected, but the other runs continue
                    del positions[run]
                    yield run, error
        if stop.signal_number is not None:
            raise Stopped(stop.signal_number, "stopped; the same command resumes every run")
    finally:
        for each in trainings.values():
            each.close()


@contextmanager
def shared_feed(
    runs: Sequence[Run], device: torch.device, num_workers: int | None
) -> Iterator[Callable[[Run], TrainContext]]:
    """Yield a function that returns each run's context; all contexts read from shared sources."""
    study = runs[0].study
    train, validation, test = study.pixels(device, num_workers)
    shared = DatasetPixels(
        images := SharedPixels(train),
        None if validation is None else SharedPixels(validation),
        SharedPixels(test),
    )
    needed = needed_together(runs)
    outputs = {
        cache.path: SharedOutputs(cached_outputs(runs[0], device, cache, taps), images)
        for cache, taps in zip(study.caches, needed, strict=True)
        if needed[0]
    }
    try:
        yield functools.partial(
            open_context,
            device=device,
            data=shared,
            cached=lambda cache, taps: outputs[cache.path].select_taps(taps),
        )
    finally:
        for each in outputs.values():
            each.close()


# ---- groups


def groups_of(runs: Sequence[Run], *, jobs: int = 1, device: str = "auto") -> list[list[Run]]:
    """Group runs of one study that should be trained together, in the order of their first runs.

    The runs of a group have the same seed and order of samples. Their students, and the teacher
    outputs that they read, fit into memory together with the other jobs. Groups are small enough
    that no job is left without one.
    """
    with sharing_machine(Share(0, jobs)):
        # `pick_device` would reduce this process's number of threads.
        budget = _TRAIN_STATES_FRACTION * free_memory(check_device(device))
    most = math.ceil(len(runs) / jobs)
    sizes = {method: _train_state_bytes(run) for method, run in {r.method: r for r in runs}.items()}

    def can_be(group: Sequence[Run]) -> bool:
        return (
            len(group) <= most
            and len({_key(run) for run in group}) == 1
            and _key(group[0]) is not None
            and sum(sizes[run.method] for run in group) <= budget
            and outputs_fit(held_together(group), jobs)
        )

    groups: list[list[Run]] = []
    for run in runs:
        group = next((group for group in groups if can_be([*group, run])), None)
        if group is None:
            groups.append([run])
        else:
            group.append(run)
    return groups


def _key(run: Run) -> tuple[int, int | None] | None:
    """Return a key common to runs with the same batches; None: the run is trained alone."""
    if run.live_teacher or run.training.compile:
        return None
    return run.seed, run.window_rows


def _train_state_bytes(run: Run) -> int:
    try:
        return train_state_bytes(run)
    except Exception:  # training the run reports the error
        return 0
