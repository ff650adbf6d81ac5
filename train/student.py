"""Assembles and trains one student, from the cache or with the teacher in the loop; tries a run."""

from __future__ import annotations

import functools
import math
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from configs.schema import TeacherConfig
from nets.archs import stem_hint
from nets.taps import taps_stored
from nets.teacher import load_teacher_network
from runtime.cost import Memory, measured_rate, memory_with
from runtime.devices import pick_device
from runtime.formats import counted
from store import TeacherCache
from store.identity import identity_sha256
from store.reader import WITHOUT_CHECKSUMS
from train.check import check_methods
from train.connectors import connectors_for, student_classifiers, student_stages
from train.feed import (
    CachedTeacher,
    LiveTeacher,
    Location,
    NoTeacher,
    TeacherSource,
    WindowedTeacher,
    location_for,
    slab_bytes,
)
from train.finetune import start_student
from train.learner import make_learner
from train.loop import outputs_and_labels, train_to_end, trial_steps
from train.merged import MergedTaps, MergedTeachers, merged_taps
from train.repeat import take_place
from train.residual import build_student, hint_stage, is_pair, thinner
from train.results import EpochResult
from train.step import Session
from train.study import Run, Study
from views.batches import ViewBatch
from views.dataset_pixels import DatasetPixels
from views.pixels import calibration_batches, open_pixels

_STEPS_BEFORE = 3  # memory still grows in the first ones, and with a batch of another size
_WINDOWS_HELD = 3  # a batch may span two of them while the one after is being read


def train_student(
    run: Run,
    *,
    device: str = "auto",
    num_workers: int | None = None,
    checkpoint_minutes: float = 10.0,
    console: Console | None = None,
    on_epoch: Callable[[EpochResult], None] | None = None,
    track: Sequence[str] = (),
) -> dict[str, Any]:
    """Train one student, or resume an unfinished run; returns the summary.

    track: the trackers that get its figures, see `train.tracking`. A finished run is left alone and
    its summary returned. Ctrl-C and SIGTERM save a checkpoint and raise Stopped.
    """
    to_train = run.repetition or run
    summary = to_train.summary
    if summary is None:
        session = open_session(to_train, pick_device(device), num_workers=num_workers)
        if console is not None:
            _announce(session, run.study, console)
        summary = train_to_end(
            session,
            finish=functools.partial(_summary_extras, run, session.learner.device),
            checkpoint_minutes=checkpoint_minutes,
            console=console,
            on_epoch=on_epoch,
            track=track,
        )
    if to_train.is_repetition:
        take_place(run.folder)
    return summary


def open_session(
    run: Run,
    device: torch.device,
    *,
    num_workers: int | None = None,
    data: DatasetPixels | None = None,
) -> Session:
    """A new student, its images, and the source of its teacher's outputs, which is to be closed.

    data: instead of the study's own images. Raises TrainError, DatasetError, ArchError.
    """
    study, student = run.study, run.study.config.student
    check_methods(study, [run.method])
    data = data or study.pixels(device, num_workers)
    network = build_student(
        study.config,
        run.terms,
        hint_stage(study.cache.taps),
        num_classes=study.dataset.num_classes,
        image_shape=study.image_shape,
        seed=run.seed,
    )
    start = start_student(network, study.config, study.image_shape)
    merged = merged_of(study)
    taps = merged.specs if merged else study.cache.taps
    learner = make_learner(
        network,
        connectors_for(network, student, run.terms, taps, study.image_shape, run.seed, merged),
        run.training,
        device,
        stages=student_stages(student, run.terms),
        classifiers=student_classifiers(network, run.terms, study.image_shape),
        freeze_idle_classifier=run.training.freeze_idle_classifier,
        start=start,
    )
    return Session(run, data, learner, _teacher_source(run, device, data))


def _announce(session: Session, study: Study, console: Console) -> None:
    net = study.config.student
    slow_stem = stem_hint(net.arch, net.stem, study.image_shape, "student.stem")
    for hint in filter(None, (slow_stem, study.dataset.untested_hint)):
        console.print(hint)
    if session.learner.start is not None:
        console.print(f"the student {session.learner.start.said}")
    device, threads = session.learner.device, torch.get_num_threads()
    computed = f"on {device}"
    if device.type == "cpu":
        computed += f" with {counted(threads, 'thread')}"
    console.print(
        f"images {session.data.train.where}; teacher outputs {session.teacher.where}; {computed}"
    )
    for cache in study.caches:
        if cache.sample_crc32c is None:
            _print_once(console, f"{cache.path} {WITHOUT_CHECKSUMS}")


@functools.lru_cache(maxsize=8)
def _print_once(console: Console, line: str) -> None:
    console.print(line)


def _teacher_source(run: Run, device: torch.device, data: DatasetPixels) -> TeacherSource:
    study = run.study
    needed = run.needed_of_each
    if not needed[0]:
        return NoTeacher()
    of_each = [(study.teacher, study.cache, study.teacher_stages)]
    of_each += [(other.config, other.cache, other.stages) for other in study.further]
    sources = [
        _live(run, config, cache, stages, taps, device, data)
        if run.live_teacher
        else _cached(run, cache, taps, device)
        for (config, cache, stages), taps in zip(of_each, needed, strict=True)
    ]
    if len(sources) == 1:
        return sources[0]
    normalisations = [config.dataset.normalisation for config, _, _ in of_each]
    return MergedTeachers(
        sources,
        study.config.weight_of_each,
        [len(stages) for _, _, stages in of_each],
        normalisations if run.live_teacher else (),
    )


def _cached(
    run: Run, cache: TeacherCache, taps: Sequence[str], device: torch.device
) -> TeacherSource:
    study = run.study
    if (rows := run.window_rows) is not None:
        return WindowedTeacher(cache, taps, study.num_views, device, rows)
    asked: Location | None = study.feed if study.feed in ("device", "host") else None
    location = asked or location_for(slab_bytes(cache, taps), device)
    return CachedTeacher(cache, taps, study.num_views, device, location)


def _live(
    run: Run,
    config: TeacherConfig,
    cache: TeacherCache,
    stages: Mapping[str, str],
    taps: Sequence[str],
    device: torch.device,
    data: DatasetPixels,
) -> TeacherSource:
    teacher = load_teacher_network(
        config.teacher,
        stages,
        num_classes=run.study.dataset.num_classes if config.taps.logits else 0,
        image_shape=run.study.image_shape,
        device=device,
        calibration=calibration_batches(data.train),
        has_embedding="embedding" in taps,
    )
    return LiveTeacher(teacher, taps_stored({tap: cache.taps[tap] for tap in taps}))


def merged_of(study: Study) -> MergedTaps | None:
    """The taps of several teachers under one numbering; None where there is one."""
    if not study.further:
        return None
    taps = [study.cache.taps, *(other.cache.taps for other in study.further)]
    return merged_taps(taps, study.config.weight_of_each)


def _summary_extras(run: Run, device: torch.device) -> dict[str, Any]:
    study, net = run.study, run.study.config.student
    return {
        "student": study.config.name,
        "model": f"2 x {thinner(net).arch}" if is_pair(run.terms) else net.arch,
        "num_samples": len(study.dataset.train),
        "num_classes": study.dataset.num_classes,
        "is_taught": bool(run.needed_taps),
        "method": run.method,
        "seed": run.seed,
        "cache": study.cache.path.name,
        "num_teachers": 1 + len(study.further),
        "cache_sha256": identity_sha256(study.cache.identity),
        "teacher": study.cache.measured,
        "device": str(device),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }


# ---- a trial


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
        next(outputs_and_labels(learner.network, pixels, learner.precision, device))
    return Trial(rate, memory_with(_bytes_to_come(run), device))


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
