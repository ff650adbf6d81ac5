"""Tries a run: a few of its steps, for the time and the memory that all of them will take."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from nets.draws import seeded
from runtime.cost import Memory, measured_rate, memory_with
from store import TeacherCache
from train.evaluation import evaluation_batches, outputs_for
from train.feed import NoTeacher, TeacherSource, slab_bytes
from train.learner import reading_maps
from train.loop import trial_steps
from train.merged import MergedTeachers
from train.step import active_terms, losses_of
from train.student import open_session
from train.study import Run
from views.batches import ViewBatch
from views.dataset_pixels import DatasetPixels
from views.pixels import open_pixels

_STEPS_BEFORE = 3  # memory still grows in the first ones, and with a batch of another size
_WINDOWS_HELD = 3  # a batch may span two of them while the one after is being read


@dataclass(frozen=True)
class Trial:
    """images_per_second: of the steps, without tests. memory: of a whole run."""

    images_per_second: float
    memory: Memory


def try_run(run: Run, device: torch.device) -> Trial:
    """Take a few steps and show a test batch; writes nothing. Raises as `train_student` does.

    All terms of the method act, with the teacher's outputs for some other samples.
    """
    study = run.study
    views, normalisation = study.teacher.views, study.teacher.dataset.normalisation
    pixels = open_pixels(study.dataset.train, views, normalisation, device)
    session = open_session(run, device, data=DatasetPixels(pixels, None, pixels))
    session.teacher.close()
    session = replace(session, teacher=_some_outputs(run, device))
    learner = session.learner
    steps = trial_steps(session)
    for _ in range(_STEPS_BEFORE):
        next(steps)
    rate = measured_rate(steps)
    steps.close()
    learner.network.eval()
    with torch.no_grad():
        batch = next(evaluation_batches(pixels))
        outputs_for(learner.network, batch, learner.precision, device)
    return Trial(rate, memory_with(_bytes_to_come(run), device))


def first_losses(run: Run, device: torch.device) -> dict[str, float]:
    """The losses of a batch before the first step; writes nothing.

    The samples are spread over the cache's first block, and their teacher's outputs are its own.
    """
    study = run.study
    pixels = open_pixels(
        study.dataset.train, study.teacher.views, study.teacher.dataset.normalisation, device
    )
    session = open_session(run, device, data=DatasetPixels(pixels, None, pixels))
    session.teacher.close()
    learner, teacher = session.learner, _some_outputs(run, device)
    rows, size = study.cache.manifest.block(0, 0).rows, run.training.batch_size
    ids = np.unique(np.linspace(0, rows - 1, min(size, rows)).astype(np.int64))
    learner.train()
    with reading_maps(learner, pixels, size), seeded(run.seed), torch.no_grad():
        batch = next(pixels.batches([0], ids, size))
        losses = losses_of(learner, teacher.outputs(batch), batch, active_terms(run.terms, 1))
    return {name: loss.item() for name, loss in losses.items()}


def _bytes_to_come(run: Run) -> int:
    """Two views of teacher outputs, or the windows held; and images to test on."""
    study = run.study
    dataset, share = study.dataset, 2.0
    if (rows := study.window_rows(run.needed_taps)) is not None:
        share = _WINDOWS_HELD * rows / study.cache.num_samples
    tested = len(dataset.test) + (len(dataset.validation) if dataset.validation else 0)
    held = sum(map(slab_bytes, study.caches, run.needed_of_each))
    return int(share * held) + tested * math.prod(study.image_shape)


def _some_outputs(run: Run, device: torch.device) -> TeacherSource:
    study, needed = run.study, run.needed_of_each
    sources = [_SomeOutputs(c, taps, device) for c, taps in zip(study.caches, needed, strict=True)]
    if len(sources) == 1:
        return sources[0]
    stages = [study.teacher_stages, *(other.stages for other in study.further)]
    return MergedTeachers(sources, study.config.weight_of_each, list(map(len, stages)))


class _SomeOutputs(NoTeacher):
    """Teacher outputs of the right shape: those of the cache's first block, repeated."""

    def __init__(self, cache: TeacherCache, taps: Sequence[str], device: torch.device) -> None:
        block = cache.read_block(cache.manifest.block(0, 0), taps) if taps else {}
        self._block = {tap: torch.from_numpy(values).to(device) for tap, values in block.items()}

    def outputs(self, batch: ViewBatch) -> dict[str, Tensor]:
        return {tap: values[batch.ids % len(values)] for tap, values in self._block.items()}
