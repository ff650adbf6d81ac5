"""Train a teacher with the `training:` block of its config."""

from __future__ import annotations

import functools
from typing import Any

import torch
from rich.console import Console

from teach_once.configs.commands import teacher_command
from teach_once.configs.paths import no_weights
from teach_once.configs.schema import TeacherConfig
from teach_once.nets.networks.names import check_arch
from teach_once.nets.networks.zoo import build_net
from teach_once.nets.weights.files import save_atomically
from teach_once.nets.weights.start import start_from
from teach_once.runtime.command.cost import measured_rate
from teach_once.runtime.command.options import Compute
from teach_once.runtime.command.signals import StopRequest
from teach_once.runtime.formats import format_duration
from teach_once.runtime.machine.devices import pick_device
from teach_once.runtime.safe.confined import remove_leftovers
from teach_once.store.identity import file_sha256
from teach_once.train.engine.distributed import convert_sync_batchnorm, wrap_ddp
from teach_once.train.engine.ranks import ALONE, Ranks
from teach_once.train.engine.step import TrainContext
from teach_once.train.engine.train_state import build_train_state
from teach_once.train.errors import TrainError
from teach_once.train.outputs.teacher_outputs import NoTeacher
from teach_once.train.recording.options import Recording
from teach_once.train.runs.weights import TeacherExists, TeacherRun, load_teacher_data
from teach_once.train.sessions.changed import check_inputs
from teach_once.train.sessions.loop import RunTraining, trial_steps
from teach_once.views.pixels.resident import DatasetPixels, open_dataset_pixels


def train_teacher(
    config: TeacherConfig,
    compute: Compute,
    recording: Recording,
    *,
    retrain: bool = False,
    limit_hours: float | None = None,
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """Train, or resume training, and save the weights; returns the summary of the training.

    An unfinished training with other settings raises TeacherExists, or is discarded with `retrain`.
    limit_hours: a new training that would take longer, estimated from a few steps (on a CPU in
    processor time), raises TrainError; None: no trial. ranks: the processes that train together,
    each of which calls this; only rank 0 prints, tracks, writes, and returns a summary; others
    return {}.
    """
    recording = recording.on_rank(ranks)
    console = recording.console or Console(quiet=True)
    assert config.training is not None  # see `train.runs.weights.check_trainable`
    run = TeacherRun(config, load_teacher_data(config, config.training))
    _discard_other(run, retrain, console)
    picked = pick_device(compute.device)
    size = f"{run} on {picked}" + ("" if ranks.is_alone else f" in each of {ranks.world} processes")
    console.print(f"training the teacher {config.name} into {run.weights}: {size}")
    for hint in run.dataset.hints:
        console.print(hint)
    check_arch(config.teacher.arch)
    normalization = config.dataset.normalization
    data = open_dataset_pixels(run.dataset, run.views, normalization, picked, compute.workers)
    if limit_hours is not None and not run.has_checkpoint:
        hours = _hours(_open_context(run, data, picked, ranks))
        cost = format_duration(hours) + " of processor time" * (picked.type == "cpu")
        if hours > limit_hours:
            raise _too_long(run, cost, size)
        console.print(f"about {cost} without tests, estimated from a few steps")
    context = _open_context(run, data, picked, ranks)
    if context.train_state.start is not None:
        console.print(f"the teacher {context.train_state.start.said}")
    finish = functools.partial(_save_weights, context, run)
    with StopRequest() as stop:
        training = RunTraining(context, recording, stop, finish)
        for _ in training.batches():
            pass
    summary = training.summary
    return {**summary, "num_classes": run.dataset.num_classes} if summary else {}


def _discard_other(run: TeacherRun, retrain: bool, console: Console) -> None:
    """Announce that an unfinished other training is discarded, or raise TeacherExists."""
    unfinished = run.unfinished_otherwise()
    if unfinished and not retrain:
        raise TeacherExists(
            f"{unfinished}\n  those settings resume it; --retrain discards it",
            fix=teacher_command(run.config, "--retrain"),
        )
    if unfinished:
        console.print(f"discarded: {unfinished}")


def _open_context(
    run: TeacherRun, data: DatasetPixels, device: torch.device, ranks: Ranks
) -> TrainContext:
    """Build a new network and its images."""
    network = build_net(
        run.config.teacher,
        num_classes=run.dataset.num_classes,
        image_shape=data.train.shape,
        seed=run.seed,
    )
    training = run.training
    convert_sync_batchnorm(network, training, ranks)
    start = start_from(
        network,
        run.config.teacher.arch,
        training.init,
        training,
        key="training.init",
        stages=run.config.taps.stages,
        image_shape=data.train.shape,
    )
    check_inputs(run)
    train_state = build_train_state(network, None, training, device, start=start, ranks=ranks)
    wrap_ddp(train_state, len(data.train))
    return TrainContext(run, data, train_state, NoTeacher())


def _hours(context: TrainContext) -> float:
    """Estimate the hours of the training without tests; the train state is used up by a few steps.

    On a CPU these are hours of processor time of all ranks, which do not depend on other load.
    Every rank takes the same steps and returns rank 0's hours.
    """
    ranks = context.train_state.ranks
    on_cpu = context.train_state.device.type == "cpu"
    rate = ranks.broadcast_number(
        measured_rate(
            trial_steps(context),
            lambda enough: bool(ranks.broadcast_number(enough)),
            of_processor=on_cpu,
        )
    )
    images = len(context.data.train) * context.run.training.epochs
    return images / max(rate, 1e-9) / 3600 * (ranks.world if on_cpu else 1)


def _too_long(run: TeacherRun, cost: str, size: str) -> TrainError:
    return TrainError(
        f"{no_weights(run.config, run.weights)}, and training it takes about "
        f"{cost}: {size}\n  correct teacher.weights, or agree to the training "
        f"once (with make: TRAIN_TEACHER=1)",
        fix=teacher_command(run.config, "--train-teacher"),
    )


def _save_weights(context: TrainContext, run: TeacherRun) -> dict[str, Any]:
    """Write the trained weights; returns their entries of the summary."""
    remove_leftovers(
        run.weights.parent, name=run.weights.name
    )  # this process has locked the training
    save_atomically(context.train_state.network.state_dict(), run.weights)
    return {
        "weights_sha256": file_sha256(run.weights),
        "torch": torch.__version__,
        "settings": run.identity,
    }
