"""Assembles and trains one student, from the cache or with the teacher in the loop."""

from __future__ import annotations

import functools
import platform
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from rich.console import Console

from configs.commands import cache_command
from configs.schema import LossTerm
from nets.archs import stem_hint
from nets.taps import taps_stored
from nets.teacher import load_teacher_network
from nets.zoo import build
from runtime.devices import pick_device
from runtime.signals import StopRequest
from store.errors import fixes_spelled_by
from store.identity import identity_sha256
from store.reader import WITHOUT_CHECKSUMS
from train.connectors import Connectors, connectors_for, student_stages
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
from train.loop import (
    EpochResult,
    Learner,
    SplitPixels,
    Task,
    active_terms,
    fit,
    make_learner,
    open_splits,
)
from train.needs import missing_error, missing_taps
from train.progress import EpochPrinter, classifier_epoch
from train.records import RunRecorder
from train.study import Run, Study, TrainError
from train.terms import check_options
from views.pixels import VerifiedPixels, calibration_batches


def train_student(
    run: Run,
    *,
    device: str = "auto",
    num_workers: int | None = None,
    checkpoint_minutes: float = 10.0,
    console: Console | None = None,
    on_epoch: Callable[[EpochResult], None] | None = None,
) -> dict[str, Any]:
    """Train one student, or resume an unfinished run; returns the summary.

    A finished run is left alone and its summary returned. Ctrl-C and SIGTERM save a checkpoint and
    raise Stopped.
    """
    if (done := run.summary) is not None:
        return done
    study, place = run.study, pick_device(device)
    task, learner, source = assemble(run, place, num_workers=num_workers)
    if console is not None:
        net = study.config.student
        if hint := stem_hint(net.arch, net.stem, study.image_shape, "student.stem"):
            console.print(hint)
        console.print(f"images {task.data.train.where}; teacher outputs {source.where}")
        if study.cache.sample_crc32c is None:
            _tell_once(console, f"{study.cache.path} {WITHOUT_CHECKSUMS}")
    with StopRequest() as stop:
        recorder = RunRecorder(
            run.folder,
            run.identity,
            learner,
            checkpoint_minutes=checkpoint_minutes,
            stop=stop,
        )
        first = classifier_epoch(task.terms, task.training.epochs)
        report = EpochPrinter(task.training.epochs, recorder.first_epoch, console, first)

        def after_epoch(result: EpochResult) -> None:
            recorder.epoch_done(result)
            report(result)
            if on_epoch is not None:
                on_epoch(result)

        try:
            fit(
                task,
                learner,
                source,
                first_epoch=recorder.first_epoch,
                on_epoch=after_epoch,
                partial=recorder.partial,
                pause=recorder,
            )
            return recorder.finish(_summary_extras(run, place))
        finally:
            source.close()
            recorder.close()


class Assembled(NamedTuple):
    """All that a run needs; the source is to be closed."""

    task: Task
    learner: Learner
    source: TeacherSource


def assemble(
    run: Run,
    device: torch.device,
    *,
    num_workers: int | None = None,
    data: SplitPixels | None = None,
) -> Assembled:
    """A new student and where its images and its teacher's outputs come from.

    data: instead of the study's own splits. Raises TrainError, DatasetError, ArchError.
    """
    study = run.study
    check_methods(study, [run.method])
    normalisation = study.teacher.dataset.normalisation
    if data is None:
        data = open_splits(study.dataset, study.teacher.views, normalisation, device, num_workers)
        data = _held_to_the_cache(study, data)
    task, connectors, network = _prepare(run, device, data)
    learner = make_learner(network, connectors, task.training, device)
    return Assembled(task, learner, _teacher_source(run, device, data))


def _held_to_the_cache(study: Study, data: SplitPixels) -> SplitPixels:
    """Refuse, as it is read, a training sample whose bytes are not those that the teacher saw."""
    checksums, cache = study.cache.sample_crc32c, study.cache
    if checksums is None:
        return data
    again = cache_command(study.teacher, caches_dir=cache.path.parent)
    fix = f"restore it; or, if it is right as it is: rm -r {cache.path}, and {again}"
    verified = VerifiedPixels(data.train, study.dataset.train, checksums, fix)
    return data._replace(train=verified)


@functools.lru_cache(maxsize=8)
def _tell_once(console: Console, line: str) -> None:
    console.print(line)


def _prepare(
    run: Run, device: torch.device, data: SplitPixels
) -> tuple[Task, Connectors | None, torch.nn.Module]:
    study, terms, seed = run.study, run.terms, run.seed
    student = study.config.student
    network = build(
        student.arch,
        num_classes=study.dataset.num_classes,
        in_channels=study.image_shape[2],
        stem=student.stem,
        seed=seed,
    )
    connectors = connectors_for(network, student, terms, study.cache.taps, study.image_shape, seed)
    task = Task(
        data=data,
        num_views=study.num_views,
        training=study.config.training,
        terms=terms,
        stages=student_stages(student, terms),
        seed=seed,
        device=device,
        freeze_idle_classifier=study.config.training.freeze_idle_classifier,
    )
    return task, connectors, network


def _teacher_source(run: Run, device: torch.device, data: SplitPixels) -> TeacherSource:
    study, taps = run.study, run.needed_taps
    if not taps:
        return NoTeacher()
    if not run.live_teacher:
        if (rows := run.window_rows) is not None:
            return WindowedTeacher(study.cache, taps, study.num_views, device, rows)
        asked: Location | None = study.feed if study.feed in ("device", "host") else None
        location = asked or location_for(slab_bytes(study.cache, taps), device)
        return CachedTeacher(study.cache, taps, study.num_views, device, location)
    teacher = load_teacher_network(
        study.teacher.teacher,
        study.teacher_stages,
        num_classes=study.dataset.num_classes,
        in_channels=study.image_shape[2],
        device=device,
        calibration=calibration_batches(data.train),
    )
    return LiveTeacher(teacher, taps_stored({tap: study.cache.taps[tap] for tap in taps}))


def check_methods(study: Study, methods: Sequence[str]) -> None:
    """Raise TrainError where a method cannot work, or needs what the cache lacks: all of it.

    CacheIncomplete where it needs what the cache is to hold and is not finished.
    """
    stages, epochs = list(study.teacher_stages), study.config.training.epochs
    for method in methods:
        check_terms(method, study.config.methods[method], epochs)
    missing = missing_taps(study.config, methods, stages, list(study.cache.manifest.taps))
    if missing:
        path = study.cache.path
        raise missing_error(missing, methods, f"{path} lacks", study.teacher, stages, path.parent)
    with fixes_spelled_by(functools.partial(_command_for, study)):
        for method in methods:
            study.cache.refuse_incomplete(study.run(method, 0).needed_taps)


def _command_for(study: Study, more: list[str]) -> str:
    return cache_command(study.teacher, caches_dir=study.cache.path.parent, more=more)


def check_terms(method: str, terms: tuple[LossTerm, ...], epochs: int) -> None:
    """Raise TrainError where a term never acts, or where in some epoch none does."""
    names = [term.loss for term in terms]
    if len(set(names)) != len(names):
        raise TrainError(f"methods.{method}: a loss stands twice; give it one term")
    for number, term in enumerate(terms):
        check_options(f"methods.{method}.{number}", term)
        if term.start_epoch > epochs:
            raise TrainError(
                f"methods.{method}.{number}.start_epoch is {term.start_epoch}, but training ends "
                f"after epoch {epochs}: this term would never act"
            )
    for epoch in range(1, epochs + 1):
        if not active_terms(terms, epoch):
            raise TrainError(f"methods.{method}: every weight is zero in epoch {epoch}")


def _summary_extras(run: Run, device: torch.device) -> dict[str, Any]:
    study = run.study
    return {
        "student": study.config.name,
        "model": study.config.student.arch,
        "num_samples": len(study.dataset.train),
        "num_classes": study.dataset.num_classes,
        "is_taught": bool(run.needed_taps),
        "method": run.method,
        "seed": run.seed,
        "cache": study.cache.path.name,
        "cache_sha256": identity_sha256(study.cache.identity),
        "teacher": study.cache.measured,
        "device": str(device),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }
