"""Try a run: take a few steps to estimate the time and memory of all of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from teach_once.configs.schema import StudentConfig, TeacherConfig
from teach_once.nets.networks.precision import autocast
from teach_once.nets.networks.zoo import build_net
from teach_once.nets.teacher.draws import seeded
from teach_once.runtime.command.cost import Memory, measured_rate, memory_with
from teach_once.runtime.formats import format_rate
from teach_once.store import TeacherCache
from teach_once.train.engine.evaluation import compute_logits, evaluation_batches
from teach_once.train.engine.step import active_terms, compute_losses
from teach_once.train.engine.train_state import capture_maps
from teach_once.train.outputs.cached_teacher import view_bytes
from teach_once.train.outputs.ensemble import TeacherEnsemble
from teach_once.train.outputs.teacher_outputs import NoTeacher, TeacherOutputs
from teach_once.train.runs.study import Run
from teach_once.train.sessions.loop import trial_steps
from teach_once.train.sessions.student import open_context
from teach_once.views.augment.augment import view_shape
from teach_once.views.datasets import load_dataset
from teach_once.views.pixels.batches import ViewBatch
from teach_once.views.pixels.resident import DatasetPixels, open_pixels

_STEPS_BEFORE = 3  # memory still grows in the first steps, and with another batch size
_WINDOWS_HELD = 3  # a batch may span two while the next is being read


@dataclass(frozen=True)
class Trial:
    """Result of a trial. images_per_second: in steps, without tests. memory: of a whole run."""

    images_per_second: float
    memory: Memory


def try_run(run: Run, device: torch.device) -> Trial:
    """Take a few steps and evaluate a test batch; writes nothing. Raises as `train_student` does.

    All terms of the method are active, with teacher outputs of other samples.
    """
    study = run.study
    views, normalization = study.teacher.views, study.teacher.dataset.normalization
    pixels = open_pixels(study.dataset.train, views, normalization, device)
    context = open_context(run, device, data=DatasetPixels(pixels, None, pixels))
    context.teacher.close()
    context = replace(context, teacher=_some_outputs(run, device))
    train_state = context.train_state
    steps = trial_steps(context)
    for _ in range(_STEPS_BEFORE):
        next(steps)
    rate = measured_rate(steps)
    steps.close()
    train_state.network.eval()
    with torch.no_grad():
        batch = next(evaluation_batches(pixels))
        compute_logits(train_state.network, batch, train_state.precision, device)
    return Trial(rate, memory_with(_bytes_to_come(run), device))


def first_losses(run: Run, device: torch.device) -> dict[str, float]:
    """Return the losses of a batch before the first step; writes nothing.

    The samples are spread over the cache's first block, with their own teacher outputs.
    """
    study = run.study
    pixels = open_pixels(
        study.dataset.train, study.teacher.views, study.teacher.dataset.normalization, device
    )
    context = open_context(run, device, data=DatasetPixels(pixels, None, pixels))
    context.teacher.close()
    train_state, teacher = context.train_state, _some_outputs(run, device)
    rows, size = study.cache.manifest.block(0, 0).rows, run.training.batch_size
    ids = np.unique(np.linspace(0, rows - 1, min(size, rows)).astype(np.int64))
    train_state.train()
    with capture_maps(train_state, pixels, size), seeded(run.seed), torch.no_grad():
        batch = next(pixels.batches([0], ids, size))
        losses = compute_losses(train_state, teacher.rows(batch), batch, active_terms(run.terms, 1))
    return {name: loss.item() for name, loss in losses.items()}


def _bytes_to_come(run: Run) -> int:
    """Return the bytes of two views or windows of teacher outputs, and of test images."""
    study = run.study
    dataset, share = study.dataset, 2.0
    if (rows := study.window_rows(run.needed_taps)) is not None:
        share = _WINDOWS_HELD * rows / study.cache.num_samples
    tested = len(dataset.test) + (len(dataset.validation) if dataset.validation else 0)
    held = sum(map(view_bytes, study.caches, run.needed_of_each))
    return int(share * held) + tested * math.prod(study.image_shape)


def _some_outputs(run: Run, device: torch.device) -> TeacherOutputs:
    study, needed = run.study, run.needed_of_each
    sources = [
        _RepeatedBlock(c, taps, device) for c, taps in zip(study.caches, needed, strict=True)
    ]
    if len(sources) == 1:
        return sources[0]
    weights = [each.weight for each in study.teachers]
    return TeacherEnsemble(sources, weights, [len(each.stages) for each in study.teachers])


class _RepeatedBlock(NoTeacher):
    """Teacher outputs of the right shape: the cache's first block, repeated."""

    def __init__(self, cache: TeacherCache, taps: Sequence[str], device: torch.device) -> None:
        block = cache.read_block(cache.manifest.block(0, 0), taps) if taps else {}
        self._block = {tap: torch.from_numpy(values).to(device) for tap, values in block.items()}

    def rows(self, batch: ViewBatch) -> dict[str, Tensor]:
        return {tap: values[batch.ids % len(values)] for tap, values in self._block.items()}


FASTER = 1.1  # smaller ratios of two trials are not significant
_BATCH_SIZE = 8  # enough to compare precisions, and at most 2 s for a large network


def precision_hint(
    config: StudentConfig, teacher: TeacherConfig, caches_dir: Path, device: torch.device
) -> str:
    """Return a hint if the config's precision is slower than float32 on this CPU, otherwise "".

    Raises DatasetError or ArchError if it cannot be measured.
    """
    precision = config.training.precision
    if device.type != "cpu" or precision == "float32":
        return ""
    dataset = load_dataset(teacher.dataset, caches_dir)
    shape = view_shape(dataset.train.first_shape, teacher.views.augment)
    num_classes = dataset.num_classes or 2  # of any plain classifier, without labels
    rates = {
        each: measured_rate(_steps(config, shape, num_classes, each), of_processor=True)
        for each in (precision, "float32")
    }
    if rates["float32"] < FASTER * rates[precision]:
        return ""
    return format_slower(precision, rates[precision], rates["float32"])


def format_slower(precision: str, rate: float, float32_rate: float) -> str:
    """Return the hint about a slower precision. Rates are images per second."""
    slower = f"{format_rate(rate)} against {format_rate(float32_rate)} images/s"
    return f"hint: training.precision: {precision} is slower than float32 on this CPU: {slower}"


def _steps(
    config: StudentConfig, shape: tuple[int, int, int], num_classes: int, precision: str
) -> Iterator[int]:
    """Take steps of plain cross-entropy endlessly; yields the number of images in each."""
    network = build_net(config.student, num_classes=num_classes, image_shape=shape, seed=0)
    network.train()
    height, width, channels = shape
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(_BATCH_SIZE, channels, height, width, generator=generator)
    labels = torch.randint(num_classes, (_BATCH_SIZE,), generator=generator)
    images = images.to(memory_format=torch.channels_last)
    while True:
        network.zero_grad()
        with autocast(precision, images.device):
            logits = network(images)
        F.cross_entropy(logits.float(), labels).backward()  # type: ignore[no-untyped-call]
        yield _BATCH_SIZE
