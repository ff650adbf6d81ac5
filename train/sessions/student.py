"""Build and train one student, from the cache or with a live teacher."""

from __future__ import annotations

import functools
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from teach_once.configs.schema import AdamW, TeacherConfig
from teach_once.nets.networks.archs import stem_hint
from teach_once.nets.networks.precision import bfloat16_hint
from teach_once.nets.student import (
    StudentParts,
    build_student,
    describe_student,
    is_pair,
    thinner,
)
from teach_once.nets.teacher.classes import teacher_classes
from teach_once.nets.teacher.taps import taps_stored
from teach_once.nets.teacher.teacher import load_teacher_network, use_batch_statistics
from teach_once.nets.weights.start import start_student
from teach_once.runtime.command.options import Compute
from teach_once.runtime.command.signals import StopRequest
from teach_once.runtime.formats import counted
from teach_once.runtime.machine.devices import pick_device
from teach_once.store import TeacherCache
from teach_once.store.identity import identity_sha256
from teach_once.train.engine.distributed import convert_sync_batchnorm, wrap_ddp
from teach_once.train.engine.epoch_result import EpochResult
from teach_once.train.engine.ranks import ALONE, Ranks
from teach_once.train.engine.step import TrainContext
from teach_once.train.engine.train_state import build_train_state
from teach_once.train.errors import TrainError
from teach_once.train.method.connector_ends import format_linear, mean_squares
from teach_once.train.method.connectors import Connectors, connectors_for, hint_stage
from teach_once.train.method.ensemble_taps import combine_taps
from teach_once.train.outputs.cached_teacher import (
    CachedTeacher,
    Placement,
    WindowedTeacher,
    choose_placement,
    view_bytes,
)
from teach_once.train.outputs.ensemble import TeacherEnsemble
from teach_once.train.outputs.filling_teacher import FillingTeacher, ViewFiller
from teach_once.train.outputs.shuffle_buffer import ShuffleBuffer
from teach_once.train.outputs.teacher_outputs import LiveTeacher, NoTeacher, TeacherOutputs
from teach_once.train.recording.options import Recording
from teach_once.train.recording.printing import print_once
from teach_once.train.runs.check_methods import check_methods
from teach_once.train.runs.evaluation import evaluator_of, num_outputs
from teach_once.train.runs.retrain import take_place
from teach_once.train.runs.study import Run
from teach_once.train.runs.teachers import StudyTeacher, pass_command
from teach_once.train.sessions.changed import check_inputs, check_teacher_weights
from teach_once.train.sessions.loop import RunTraining
from teach_once.train.terms import looked_at
from teach_once.views.pixels.resident import DatasetPixels, calibration_batches

OpenOutputs = Callable[[TeacherCache, Sequence[str]], TeacherOutputs]  # opens taps of a cache


def train_student(
    run: Run,
    *,
    device: str = "auto",
    num_workers: int | None = None,
    checkpoint_minutes: float = 10.0,
    console: Console | None = None,
    on_epoch: Callable[[EpochResult], None] | None = None,
    loggers: Sequence[str] = (),
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """Train one student, or resume an unfinished run; returns the summary.

    For callers without a command line: see `train_run` and `Recording`.
    """
    recording = Recording(checkpoint_minutes, loggers, console, on_epoch)
    return train_run(run, Compute(device, num_workers), recording, ranks)


def train_run(
    run: Run,
    compute: Compute,
    recording: Recording,
    ranks: Ranks = ALONE,
    fillers: Sequence[ViewFiller] = (),
) -> dict[str, Any]:
    """Train one student, or resume an unfinished run; returns the summary.

    A finished run is unchanged and its summary is returned. A started repetition is trained in its
    place and replaces the result at the end. Ctrl-C and SIGTERM save a checkpoint and raise
    Stopped. ranks: the processes that train together, each of which calls this; only rank 0 prints,
    tracks and returns a summary. fillers: one per teacher, if views may be missing.
    """
    to_train = run.repetition or run
    summary = to_train.summary
    if summary is None:
        with StopRequest() as stop:
            device = pick_device(compute.device)
            if fillers:
                context = _open_filling(to_train, device, compute.workers, fillers)
            else:
                context = open_context(to_train, device, num_workers=compute.workers, ranks=ranks)
            training = student_training(context, to_train, recording.on_rank(ranks), stop)
            for _ in training.batches():
                pass
        summary = training.summary
    if to_train.is_repetition and ranks.is_first:
        take_place(run.folder)
    return summary


def student_training(
    context: TrainContext, run: Run, recording: Recording, stop: StopRequest
) -> RunTraining:
    """Build the training of an open run, and announce it on the recording's console."""
    if recording.console is not None:
        _announce(context, run, recording.console)
    finish = functools.partial(_summary_extras, run, context.train_state.device)
    return RunTraining(context, recording, stop, finish)


def open_context(
    run: Run,
    device: torch.device,
    *,
    num_workers: int | None = None,
    data: DatasetPixels | None = None,
    cached: OpenOutputs | None = None,
    ranks: Ranks = ALONE,
) -> TrainContext:
    """Build a new student, load its images, and open the source of its teacher's outputs.

    The caller must close the source. data: replaces the study's images. cached: replaces the run's
    source. ranks: the processes that train together, each of which calls this. Raises TrainError,
    DatasetError or ArchError.
    """
    study = run.study
    check_methods(study, [run.method])
    if run.live_bn and not ranks.is_alone:
        raise TrainError(
            f"--live-bn needs the statistics of whole batches, but each of {ranks.world} processes "
            f"has only a part",
            fix="train in one process",
        )
    data = data or study.pixels(device, num_workers)
    network, parts, connectors = _fresh_networks(run)
    for each in (network, connectors):
        if each is not None:
            convert_sync_batchnorm(each, run.training, ranks)
    start = start_student(network, study.config, study.image_shape)
    check_inputs(run)
    train_state = build_train_state(
        network,
        connectors,
        run.training,
        device,
        stages=parts.modules,
        classifiers=parts.classifiers,
        freeze_idle_classifier=run.training.freeze_idle_classifier,
        start=start,
        mean_squares=mean_squares(study) if "means" in looked_at(run.terms) else (),
        ranks=ranks,
    )
    wrap_ddp(train_state, len(data.train))
    cached = cached or functools.partial(cached_outputs, run, device, num_ranks=ranks.world)
    teacher = _teacher_outputs(run, device, data, cached)
    evaluator = evaluator_of(run, network, connectors)
    return TrainContext(run, data, train_state, teacher, _shuffle(run), evaluator)


def _fresh_networks(run: Run) -> tuple[nn.Module, StudentParts, Connectors | None]:
    study, net, outputs = run.study, run.study.config.student, looked_at(run.terms)
    taps = [each.cache.taps for each in study.teachers]
    teachers = combine_taps(taps, [each.weight for each in study.teachers])
    network = build_student(
        net,
        outputs,
        hint_stage(teachers.specs),
        num_classes=num_outputs(run),
        image_shape=study.image_shape,
        seed=run.seed,
    )
    parts = describe_student(network, net, outputs, study.image_shape)
    linear = run.linear_connectors
    connectors = connectors_for(parts, net.connector, outputs, teachers, run.seed, linear)
    return network, parts, connectors


def fresh_network(run: Run) -> nn.Module:
    """Build a run's network with its initial random weights. Raises as `open_context` does."""
    return _fresh_networks(run)[0]


def train_state_bytes(run: Run) -> int:
    """Return the bytes of a student's weights, gradients, optimizer state and weight average."""
    network, _, connectors = _fresh_networks(run)
    weights = sum(_bytes_of(each) for each in (network, connectors) if each is not None)
    momenta = 2 if isinstance(run.training.optimizer, AdamW) else 1
    average = _bytes_of(network) if run.training.ema is not None else 0
    return (2 + momenta) * weights + average


def _bytes_of(module: nn.Module) -> int:
    return sum(each.nbytes for each in (*module.parameters(), *module.buffers()))


def _announce(context: TrainContext, run: Run, console: Console) -> None:
    study, net = run.study, run.study.config.student
    slow_stem = stem_hint(net.arch, net.stem, study.image_shape, "student.stem")
    for hint in filter(None, (slow_stem, *study.dataset.hints)):
        console.print(hint)
    if context.train_state.start is not None:
        console.print(f"the student {context.train_state.start.said}")
    if hint := bfloat16_hint(run.training.precision, context.train_state.device):
        console.print(hint)
    if line := format_linear(run.linear_connectors):
        print_once(console, line)
    if study.reference is None:
        adds = pass_command(study.teacher, study.cache.path.parent)
        print_once(
            console,
            f"note: {study.cache.path} has no teacher outputs of these test images, so the student "
            f"is not compared with its teacher; to add them: {adds}",
        )
    device, threads = context.train_state.device, torch.get_num_threads()
    computed = f"on {device}"
    if device.type == "cpu":
        computed += f" with {counted(threads, 'thread')}"
    if not (ranks := context.train_state.ranks).is_alone:
        computed += f" in each of {ranks.world} processes"
    console.print(
        f"images {context.data.train.where}; teacher outputs {context.teacher.where}; {computed}"
    )


def _teacher_outputs(
    run: Run, device: torch.device, data: DatasetPixels, cached: OpenOutputs
) -> TeacherOutputs:
    study = run.study
    needed = run.needed_of_each
    if not needed[0]:
        return NoTeacher()
    sources = [
        _live(run, teacher, taps, device, data) if run.live_teacher else cached(teacher.cache, taps)
        for teacher, taps in zip(study.teachers, needed, strict=True)
    ]
    if len(sources) == 1:
        return sources[0]
    normalizations = [each.config.dataset.normalization for each in study.teachers]
    return TeacherEnsemble(
        sources,
        [each.weight for each in study.teachers],
        [len(each.stages) for each in study.teachers],
        normalizations if run.live_teacher else (),
    )


def cached_outputs(
    run: Run,
    device: torch.device,
    cache: TeacherCache,
    taps: Sequence[str],
    *,
    num_ranks: int = 1,
) -> TeacherOutputs:
    """Open taps of a cache in the run's placement; each of `num_ranks` keeps its own samples."""
    if (rows := run.window_rows) is not None:
        return WindowedTeacher(cache, taps, device, rows)
    placement, fraction = run.study.placement, 1 / num_ranks
    asked: Placement | None = placement if placement in ("device", "host") else None
    placement = asked or choose_placement(int(view_bytes(cache, taps) * fraction), device)
    return CachedTeacher(cache, taps, device, placement, fraction=fraction)


def _open_filling(
    run: Run, device: torch.device, num_workers: int | None, fillers: Sequence[ViewFiller]
) -> TrainContext:
    """Build the context of a run whose caches may lack views; fillers: one per teacher."""
    for cache, filler in zip(run.study.caches, fillers, strict=True):
        cache.taps |= filler.taps  # also those that view 0 lacks so far
    data = run.study.pixels(device, num_workers, digests=fillers[0].digests)
    cached = functools.partial(_filled_outputs, run, device, fillers)
    return open_context(run, device, data=data, cached=cached)


def _filled_outputs(
    run: Run,
    device: torch.device,
    fillers: Sequence[ViewFiller],
    cache: TeacherCache,
    taps: Sequence[str],
) -> TeacherOutputs:
    """Open taps of a cache that may lack views; fillers: one for each teacher, in order."""
    teachers = run.study.teachers
    number = [each.cache.path for each in teachers].index(cache.path)
    first, own = (each.config.dataset.normalization for each in (teachers[0], teachers[number]))
    return FillingTeacher(
        fillers[number],
        taps,
        lambda filled: cached_outputs(run, device, filled, taps),
        shares_inputs=own == first,
    )


def _shuffle(run: Run) -> ShuffleBuffer | None:
    """Return the run's shuffle buffer; None if it does not use windows."""
    needs_teacher = bool(run.needed_of_each[0])
    if run.live_teacher or not needs_teacher or (rows := run.window_rows) is None:
        return None
    manifest = run.study.cache.manifest
    return ShuffleBuffer(manifest.num_samples, manifest.block_rows, rows)


def _live(
    run: Run,
    of_study: StudyTeacher,
    taps: Sequence[str],
    device: torch.device,
    data: DatasetPixels,
) -> TeacherOutputs:
    config, cache = of_study.config, of_study.cache
    teacher = load_teacher_network(
        config.teacher,
        of_study.stages,
        num_classes=teacher_classes(config, run.study.dataset.num_classes),
        image_shape=run.study.image_shape,
        device=device,
        calibration=calibration_batches(data.train),
        has_embedding="embedding" in taps,
    )
    check_teacher_weights(run, config.teacher.weights, cache)
    if run.live_bn:
        use_batch_statistics(teacher.network, config.teacher.arch)
    return LiveTeacher(teacher, taps_stored({tap: cache.taps[tap] for tap in taps}))


def _weights_name(teacher: TeacherConfig) -> str:
    """Return the name of the weights file without its folders, or a published name."""
    return Path(teacher.teacher.weights).name


def _measured(run: Run) -> dict[str, Any]:
    """Return the measurements in the first teacher's cache, also if the run has completed it."""
    cache = run.study.cache
    if cache.manifest.measured_views < run.num_views:
        cache = TeacherCache.open(cache.path, num_views=1, taps=())
    return cache.measured


def _summary_extras(run: Run, device: torch.device) -> dict[str, Any]:
    study, net = run.study, run.study.config.student
    return {
        "student": study.config.name,
        "model": f"2 x {thinner(net).arch}" if is_pair(looked_at(run.terms)) else net.arch,
        "num_samples": len(study.dataset.train),
        "num_classes": study.dataset.num_classes,
        "is_taught": bool(run.needed_taps),
        "method": run.method,
        "seed": run.seed,
        "cache": study.cache.path.name,
        "num_teachers": len(study.teachers),
        "cache_sha256": identity_sha256(study.cache.identity),
        "teacher": _measured(run),
        "teacher_weights": [_weights_name(each.config) for each in study.teachers],
        "device": str(device),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }
