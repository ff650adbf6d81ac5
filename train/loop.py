"""The training loop: a run from where it resumes to its end, epoch by epoch, tested in between.

Saves checkpoints, prints its epochs and stops on a signal. The state of a run is its tensors, the
number of the last finished epoch and, within an epoch, of the last step; a run resumed from a
checkpoint equals an uninterrupted one, bit for bit on a CPU.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn

from configs.schema import LossTerm
from nets.error_rates import ErrorRates, count_errors
from nets.precision import autocast
from runtime.signals import StopRequest
from train import TrainError
from train.checkpoint import Partial, refuse_other_steps
from train.learner import reading_maps
from train.records import RunRecorder
from train.results import EpochResult, Tested
from train.run_files import CHECKPOINT_FILE
from train.schedule import weight_at
from train.step import ActiveTerm, Session, Step, active_terms, epoch_steps, start_epoch
from train.terms import loss_named
from train.tracking import tracking
from views.batches import Pixels

_BATCH = 1024
_BATCH_VALUES = 4 * 2**20  # of input numbers: larger images come in smaller batches


class Diverged(TrainError):
    """The loss of a run is no longer a number."""


def train_to_end(
    session: Session,
    *,
    finish: Callable[[], Mapping[str, Any]],
    checkpoint_minutes: float = 10.0,
    console: Console | None = None,
    on_epoch: Callable[[EpochResult], None] | None = None,
    track: Sequence[str] = (),
) -> dict[str, Any]:
    """Train what is left of a run, and close its teacher source; returns the summary.

    finish: called after the last epoch; returns what the summary is to say besides. track: the
    trackers that get its figures. Ctrl-C and SIGTERM save a checkpoint and raise Stopped.
    """
    run = session.run
    try:
        with (
            StopRequest() as stop,
            RunRecorder(
                run, session.learner, checkpoint_minutes=checkpoint_minutes, stop=stop
            ) as recorder,
            tracking(track, run, recorder.first_epoch, console) as log,
        ):
            epochs = run.training.epochs
            first = classifier_epoch(run.terms, epochs)
            printer = EpochPrinter(epochs, recorder.first_epoch, console, first)

            _print_other_threads(recorder, session.learner.device, console)

            def after_epoch(result: EpochResult) -> None:
                recorder.epoch_done(result)
                printer(result)
                log(result)
                if on_epoch is not None:
                    on_epoch(result)

            fit(
                session,
                first_epoch=recorder.first_epoch,
                on_epoch=after_epoch,
                partial=recorder.partial,
                checkpoints=recorder,
            )
            return recorder.finish(finish())
    finally:
        session.teacher.close()


def fit(
    session: Session,
    *,
    first_epoch: int,
    on_epoch: Callable[[EpochResult], None],
    partial: Partial | None = None,
    checkpoints: RunRecorder | None = None,
) -> None:
    """Train from `first_epoch` (1 for a new run) to the last; `on_epoch` after each.

    partial: what was done of the first epoch before. checkpoints: asked after every step and epoch.
    """
    learner, training = session.learner, session.run.training
    learner.train()
    with reading_maps(learner, session.data.train, training.batch_size):
        for epoch in range(first_epoch, training.epochs + 1):
            result = _run_epoch(session, epoch, partial, checkpoints)
            partial = None
            learner.maps.clear()  # those of the last test batch
            on_epoch(result)
            if checkpoints is not None and epoch < training.epochs:
                checkpoints.end_if_asked(epoch)


def _run_epoch(
    session: Session, epoch: int, partial: Partial | None, checkpoints: RunRecorder | None
) -> EpochResult:
    waiting = time.perf_counter()
    order = start_epoch(session, epoch)
    started = time.perf_counter()
    terms = active_terms(session.run.terms, epoch)
    if partial is not None:
        checkpoint, losses_now = session.run.folder / CHECKPOINT_FILE, [each.loss for each in terms]
        refuse_other_steps(partial, losses_now, session.num_steps, checkpoint)
    sums = _Sums.begun(terms, session.learner.device, partial)
    seconds_before = partial.train_seconds if partial else 0.0
    rate = 0.0
    for step in epoch_steps(session, epoch, order, terms, steps_done=sums.num_steps):
        sums.add(step)
        rate = step.learning_rate
        if checkpoints is not None and step.number < session.num_steps and checkpoints.is_due():
            seconds = seconds_before + time.perf_counter() - started
            checkpoints.save(sums.partial(epoch, seconds))
    step_losses, losses = sums.read()
    _refuse_divergence(step_losses, epoch)
    trained = time.perf_counter()
    learner = session.learner
    tested = _test(learner.network, session, epoch)
    average = _test(learner.average.module, session, epoch) if learner.average else None
    return EpochResult(
        epoch=epoch,
        loss=_mean_of_samples(step_losses, session),
        losses={name: total / len(order) for name, total in losses.items()},
        weights={term.loss: term.weight for term in terms},
        errors=tested.errors,
        validation=tested.validation,
        average=average,
        learning_rate=rate,
        num_samples=len(order),
        train_seconds=seconds_before + trained - started,
        wait_seconds=started - waiting,
        evaluate_seconds=time.perf_counter() - trained,
        step_losses=step_losses,
    )


@dataclass
class _Sums:
    """Losses of an epoch's steps so far; on the device, as reading one would wait for it."""

    step_losses: list[Tensor]  # the weighted total of each step
    by_name: dict[str, Tensor]  # sums over samples

    @classmethod
    def begun(
        cls, terms: Sequence[ActiveTerm], device: torch.device, partial: Partial | None
    ) -> _Sums:
        if partial is None:
            return cls([], {term.loss: torch.zeros((), device=device) for term in terms})
        by_name = {name: value.to(device) for name, value in partial.sums.items()}
        return cls(list(partial.step_losses.to(device).unbind()), by_name)

    @property
    def num_steps(self) -> int:
        return len(self.step_losses)

    def add(self, step: Step) -> None:
        self.step_losses.append(step.losses["total"])
        for name in self.by_name:
            self.by_name[name] += step.losses[name] * step.num_samples

    def partial(self, epoch: int, train_seconds: float) -> Partial:
        on_host = {name: value.cpu() for name, value in self.by_name.items()}
        losses = torch.stack(self.step_losses).cpu()
        return Partial(epoch, self.num_steps, losses, on_host, train_seconds)

    def read(self) -> tuple[list[float], dict[str, float]]:
        """Step losses, and sums by name: the one wait of an epoch."""
        values = torch.stack([*self.step_losses, *self.by_name.values()]).tolist()
        sums = dict(zip(self.by_name, values[self.num_steps :], strict=True))
        return values[: self.num_steps], sums


def _mean_of_samples(step_losses: Sequence[float], session: Session) -> float:
    num_samples, size = len(session.data.train), session.run.training.batch_size
    sizes = (min(size, num_samples - step * size) for step in range(len(step_losses)))
    return sum(n * loss for n, loss in zip(sizes, step_losses, strict=True)) / num_samples


def _refuse_divergence(step_losses: Sequence[float], epoch: int) -> None:
    """Raise Diverged at the first loss that is no number: nothing good comes after it."""
    for step, loss in enumerate(step_losses, start=1):
        if not math.isfinite(loss):
            raise Diverged(
                f"the loss became {loss} in epoch {epoch}, step {step}",
                fix="lower training.learning_rate, or the weights of the method's losses",
            )


def _test(network: nn.Module, session: Session, epoch: int) -> Tested:
    """Errors on the test and the validation split, in the epochs that are tested."""
    training, learner, data = session.run.training, session.learner, session.data
    if epoch % training.evaluate_every and epoch != training.epochs:
        return Tested(None, None)

    def errors_on(pixels: Pixels) -> ErrorRates:
        return evaluate(network, pixels, learner.precision, learner.device)

    return Tested(errors_on(data.test), errors_on(data.validation) if data.validation else None)


def evaluate(
    network: nn.Module, pixels: Pixels, precision: str, device: torch.device
) -> ErrorRates:
    """Of the network, in evaluation mode and on `device`, over view 0 of all samples."""
    modes = [(module, module.training) for module in network.modules()]  # some may be frozen
    network.eval()
    try:
        return count_errors(outputs_and_labels(network, pixels, precision, device))
    finally:
        for module, mode in modes:
            module.training = mode


def outputs_and_labels(
    network: nn.Module, pixels: Pixels, precision: str, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """(B, classes) float32 and (B,) of one batch of view 0 after another, as large as is good."""
    size = max(1, min(_BATCH, _BATCH_VALUES // int(np.prod(pixels.shape))))
    for batch in pixels.batches([0], np.arange(len(pixels)), size):
        with autocast(precision, device):
            yield network(batch.inputs).float(), batch.labels


def trial_steps(session: Session) -> Generator[int, None, None]:
    """Steps endlessly, two whole batches and the rest of an epoch; yields each one's images."""
    run, data = session.run, session.data.train
    terms = [ActiveTerm(term.loss, term.weight, term.options) for term in run.terms]
    num_samples, size = len(data), run.training.batch_size
    some = np.arange(min(num_samples, 2 * size + num_samples % size))
    session.learner.train()
    with reading_maps(session.learner, data, size):
        while True:
            for step in epoch_steps(session, 1, some, terms):
                step.losses["total"].item()
                yield step.num_samples


# ---- what is printed


def _print_other_threads(
    recorder: RunRecorder, device: torch.device, console: Console | None
) -> None:
    before, now = recorder.threads_before, torch.get_num_threads()
    if console is not None and device.type == "cpu" and before not in (None, now):
        console.print(
            f"started with {before} threads, resumed with {now}: the last bits may differ from "
            f"those of an uninterrupted run"
        )


class EpochPrinter:
    """Prints errors, rate and time left after each epoch; says nothing without a console."""

    def __init__(
        self,
        epochs: int,
        first_epoch: int,
        console: Console | None,
        classifier_epoch: int = 1,  # the first in which a loss reaches the classifier
    ) -> None:
        self._classifier_epoch = classifier_epoch
        self._epochs, self._first, self._console = epochs, first_epoch, console
        self._seconds = 0.0
        if console is not None and first_epoch > 1:
            console.print(f"resuming after epoch {first_epoch - 1} of {epochs}")

    def __call__(self, result: EpochResult) -> None:
        if self._console is None:
            return
        self._seconds += result.seconds
        left = self._seconds / (result.epoch - self._first + 1) * (self._epochs - result.epoch)
        self._console.print(
            f"epoch {result.epoch:3d}/{self._epochs}  loss {result.loss:8.4f}  "
            f"{_test_text(result)}  "
            f"{result.images_per_second:8,.0f} images/s  ETA {left:4.0f} s"
            f"{self._idle(result.epoch)}"
        )

    def _idle(self, epoch: int) -> str:
        if epoch >= self._classifier_epoch:
            return ""
        if self._classifier_epoch > self._epochs:
            return "  classifier idle"
        return f"  classifier idle until epoch {self._classifier_epoch}"


def classifier_epoch(terms: Sequence[LossTerm], epochs: int) -> int:
    """The first epoch in which a loss reaches the classifier; `epochs` + 1 if there is none."""
    reaching = [term for term in terms if "logits" in loss_named(term.loss).student]
    for epoch in range(1, epochs + 1):
        if any(weight_at(term, epoch) for term in reaching):
            return epoch
    return epochs + 1


def _test_text(result: EpochResult) -> str:
    if (errors := result.errors) is None:
        return "not tested" + " " * 34
    top5 = f" {errors.top5:6.2f} % top-5" if errors.num_classes > 5 else ""
    average = result.average.errors if result.average else None
    averaged = f", averaged weights {average.top1:.2f} %" if average else ""
    return f"test error {errors.top1:6.2f} % top-1{top5}{averaged}"
