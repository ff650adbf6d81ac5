"""Trains a teacher as the `training:` block of its config says."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console

from configs.commands import teacher_command
from configs.paths import no_weights
from configs.schema import TeacherConfig
from nets.names import check_arch
from nets.weights import save_atomically
from nets.zoo import build_net
from runtime.cost import measured_rate
from runtime.devices import pick_device
from runtime.formats import format_duration
from runtime.inside import remove_leftovers
from store.identity import file_sha256
from train.changed import refuse_other_inputs
from train.distributed import on_batch_of_all, prepare_for_ranks
from train.errors import TrainError
from train.feed import NoTeacher
from train.finetune import start_from
from train.learner import make_learner
from train.loop import train_to_end, trial_steps
from train.ranks import ALONE, Ranks
from train.step import Session
from train.teacher_weights import TeacherExists, TeacherRun, load_teacher_data
from views.dataset_pixels import DatasetPixels, open_dataset_pixels


def train_teacher(
    config: TeacherConfig,
    *,
    device: str,
    console: Console,
    num_workers: int | None = None,
    retrain: bool = False,
    limit_hours: float | None = None,
    track: Sequence[str] = (),
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """Train, or resume training, and save the weights; returns the summary of the training.

    An unfinished training with other settings is discarded by `retrain`, else refused with
    TeacherExists. limit_hours: a new training that takes longer, estimated from a few steps (on a
    CPU in processor time), is refused with TrainError; None: no trial. track: the trackers that get
    its figures. ranks: the processes that train it together, each of which calls this; only rank 0
    prints, tracks, writes, and returns a summary; others return {}.
    """
    if not ranks.is_first:
        console, track = Console(quiet=True), ()
    assert config.training is not None  # see `train.teacher_weights.refuse_untrainable`
    run = TeacherRun(config, load_teacher_data(config, config.training))
    _discard_other(run, retrain, console)
    picked = pick_device(device)
    size = f"{run} on {picked}" + ("" if ranks.is_alone else f" in each of {ranks.world} processes")
    console.print(f"training the teacher {config.name} into {run.weights}: {size}")
    for hint in run.dataset.hints:
        console.print(hint)
    check_arch(config.teacher.arch)
    normalisation = config.dataset.normalisation
    data = open_dataset_pixels(run.dataset, run.views, normalisation, picked, num_workers)
    if limit_hours is not None and not run.has_checkpoint:
        hours = _hours(_open_session(run, data, picked, ranks))
        cost = format_duration(hours) + " of processor time" * (picked.type == "cpu")
        if hours > limit_hours:
            raise _too_long(run, cost, size)
        console.print(f"about {cost} without tests, estimated from a few steps")
    session = _open_session(run, data, picked, ranks)
    if session.learner.start is not None:
        console.print(f"the teacher {session.learner.start.said}")
    finish = functools.partial(_save_weights, session, run)
    summary = train_to_end(session, console=console, finish=finish, track=track)
    return {**summary, "num_classes": run.dataset.num_classes} if summary else {}


def _discard_other(run: TeacherRun, retrain: bool, console: Console) -> None:
    """Say that an unfinished training with other settings is discarded, or raise TeacherExists."""
    unfinished = run.unfinished_otherwise()
    if unfinished and not retrain:
        raise TeacherExists(
            f"{unfinished}\n  those settings resume it; --retrain discards it",
            fix=teacher_command(run.config, "--retrain"),
        )
    if unfinished:
        console.print(f"discarded: {unfinished}")


def _open_session(
    run: TeacherRun, data: DatasetPixels, device: torch.device, ranks: Ranks
) -> Session:
    """A new network and the images that it learns from."""
    network = build_net(
        run.config.teacher,
        num_classes=run.dataset.num_classes,
        image_shape=data.train.shape,
        seed=run.seed,
    )
    training = run.training
    on_batch_of_all(network, training, ranks)
    start = start_from(
        network,
        run.config.teacher.arch,
        training.init,
        training,
        key="training.init",
        stages=run.config.taps.stages,
        image_shape=data.train.shape,
    )
    refuse_other_inputs(run)
    learner = make_learner(network, None, training, device, start=start, ranks=ranks)
    prepare_for_ranks(learner, len(data.train))
    return Session(run, data, learner, NoTeacher())


def _hours(session: Session) -> float:
    """How long the training takes without its tests; spends the learner on a few steps.

    On a CPU the hours are processor time, of all ranks: the same on a busy machine. Every rank
    takes the same steps and returns the hours of rank 0.
    """
    ranks = session.learner.ranks
    on_cpu = session.learner.device.type == "cpu"
    rate = ranks.number_of_first(
        measured_rate(
            trial_steps(session),
            lambda enough: bool(ranks.number_of_first(enough)),
            of_processor=on_cpu,
        )
    )
    images = len(session.data.train) * session.run.training.epochs
    return images / max(rate, 1e-9) / 3600 * (ranks.world if on_cpu else 1)


def _too_long(run: TeacherRun, cost: str, size: str) -> TrainError:
    return TrainError(
        f"{no_weights(run.config, run.weights)}, and training it takes about "
        f"{cost}: {size}\n  correct teacher.weights, or agree to the training "
        f"once (with make: TRAIN_TEACHER=1)",
        fix=teacher_command(run.config, "--train-teacher"),
    )


def _save_weights(session: Session, run: TeacherRun) -> dict[str, Any]:
    """Write the trained weights; returns what the summary says of them."""
    remove_leftovers(run.weights.parent, name=run.weights.name)  # the training is locked
    save_atomically(session.learner.network.state_dict(), run.weights)
    return {
        "weights_sha256": file_sha256(run.weights),
        "torch": torch.__version__,
        "settings": run.identity,
    }
