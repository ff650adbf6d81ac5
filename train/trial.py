"""A few steps of a run, thrown away: how fast they are, and how much memory it will take."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.utils.tensorboard  # a run has it loaded, so that its memory counts
from torch import Tensor

from runtime.cost import Memory, measured_rate, memory_with
from store import TeacherCache
from train.feed import NoTeacher, slab_bytes
from train.learner import reading_maps
from train.loop import outputs_and_labels
from train.step import ActiveTerm, Session, epoch_steps
from train.student import open_session
from train.study import Run, Study
from views.batches import ViewBatch
from views.dataset_pixels import DatasetPixels
from views.pixels import open_pixels

_STEPS_BEFORE = 3  # memory still grows in the first ones, and with a batch of another size
_WINDOWS_HELD = 3  # where a batch lies in two of them, the one after is being read


@dataclass(frozen=True)
class Trial:
    """images_per_second: of the steps, without tests. memory: of a whole run."""

    images_per_second: float
    memory: Memory


def try_run(run: Run, device: torch.device) -> Trial:
    """Take a few steps and show a test batch; writes nothing. Raises as `train_student` does.

    All terms of the method act, with the teacher's outputs for some other samples.
    """
    study, taps = run.study, run.needed_taps
    views, normalisation = study.teacher.views, study.teacher.dataset.normalisation
    pixels = open_pixels(study.dataset.train, views, normalisation, device)
    session = open_session(run, device, data=DatasetPixels(pixels, None, pixels))
    session.teacher.close()
    session = replace(session, teacher=_SomeOutputs(study.cache, taps, device))
    learner = session.learner
    steps = trial_steps(session)
    for _ in range(_STEPS_BEFORE):
        next(steps)
    rate = measured_rate(steps)
    steps.close()
    learner.network.eval()
    with torch.no_grad():
        next(outputs_and_labels(learner.network, pixels, learner.precision, device))
    return Trial(rate, memory_with(_bytes_to_come(study, taps), device))


def trial_steps(session: Session) -> Generator[int, None, None]:
    """Steps endlessly, two whole batches and the rest of an epoch; yields each one's images."""
    run, data = session.run, session.data.train
    terms = [ActiveTerm(term.loss, term.weight, term.options) for term in run.terms]
    num_samples, size = len(data), run.training.batch_size
    some = np.arange(min(num_samples, 2 * size + num_samples % size))
    session.learner.network.train()
    with reading_maps(session.learner, data, size):
        while True:
            for step in epoch_steps(session, 1, some, terms):
                step.losses["total"].item()
                yield step.num_samples


def _bytes_to_come(study: Study, taps: Sequence[str]) -> int:
    """Two views of teacher outputs, or the windows held; and images to test on."""
    dataset, share = study.dataset, 2.0
    if (rows := study.window_rows(taps)) is not None:
        share = _WINDOWS_HELD * rows / study.cache.num_samples
    tested = len(dataset.test) + (len(dataset.validation) if dataset.validation else 0)
    return int(share * slab_bytes(study.cache, taps)) + tested * math.prod(study.image_shape)


class _SomeOutputs(NoTeacher):
    """Teacher outputs of the right shape: those of the cache's first block, repeated."""

    def __init__(self, cache: TeacherCache, taps: Sequence[str], device: torch.device) -> None:
        block = cache.read_block(cache.manifest.block(0, 0), taps) if taps else {}
        self._block = {tap: torch.from_numpy(values).to(device) for tap, values in block.items()}

    def outputs(self, batch: ViewBatch) -> dict[str, Tensor]:
        return {tap: values[batch.ids % len(values)] for tap, values in self._block.items()}
