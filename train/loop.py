"""The training loop: epochs of shuffled views, tested in between, and points to resume from.

The state of a run is its tensors, the number of the last finished epoch and, within an epoch, of
the last step; a run resumed from a checkpoint equals an uninterrupted one, bit for bit on a CPU.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from nets.error_rates import ErrorRates, count_errors
from nets.precision import autocast
from train.errors import TrainError
from train.learner import reading_maps
from train.step import ActiveTerm, Session, Step, active_terms, epoch_steps, start_epoch
from views.batches import Pixels

_BATCH = 1024
_BATCH_VALUES = 4 * 2**20  # of input numbers: larger images come in smaller batches


class Diverged(TrainError):
    """The loss of a run is no longer a number."""


@dataclass(frozen=True)
class EpochResult:
    """The outcome of an epoch. Losses are means over its samples, before their weights."""

    epoch: int
    loss: float
    losses: dict[str, float]
    weights: dict[str, float]
    errors: ErrorRates | None  # on the test split; None in epochs without a test
    validation: ErrorRates | None
    learning_rate: float
    num_samples: int
    train_seconds: float  # the steps, the teacher's outputs at hand
    wait_seconds: float  # for the feed, before the first step
    evaluate_seconds: float
    step_losses: list[float] = field(repr=False)

    @property
    def seconds(self) -> float:
        return self.wait_seconds + self.train_seconds + self.evaluate_seconds

    @property
    def deciding(self) -> ErrorRates | None:
        """The errors that the best epoch is chosen by."""
        return self.errors if self.validation is None else self.validation

    @property
    def images_per_second(self) -> float:
        return self.num_samples / max(self.train_seconds, 1e-9)


@dataclass(frozen=True)
class Partial:
    """An epoch of which `step` steps are done. Tensors are float32, on the host."""

    epoch: int
    step: int
    step_losses: Tensor
    sums: dict[str, Tensor]
    train_seconds: float


class Checkpoints(Protocol):
    """Says when to save a checkpoint, saves it, and ends the training where asked to."""

    def is_due(self) -> bool:
        """Whether to save one now, within an epoch."""
        ...

    def save(self, partial: Partial) -> None:
        """Save the middle of an epoch. May raise, to end the training there."""
        ...

    def end_if_asked(self, epoch: int) -> None:
        """May raise, to end the training after a whole epoch, which is saved."""
        ...


def fit(
    session: Session,
    *,
    first_epoch: int,
    on_epoch: Callable[[EpochResult], None],
    partial: Partial | None = None,
    checkpoints: Checkpoints | None = None,
) -> None:
    """Train from `first_epoch` (1 for a new run) to the last; `on_epoch` after each.

    partial: what was done of the first epoch before. checkpoints: asked after every step and epoch.
    """
    learner, training = session.learner, session.run.training
    learner.network.train()
    with reading_maps(learner, session.data.train, training.batch_size):
        for epoch in range(first_epoch, training.epochs + 1):
            result = _run_epoch(session, epoch, partial, checkpoints)
            partial = None
            learner.maps.clear()  # those of the last test batch
            on_epoch(result)
            if checkpoints is not None and epoch < training.epochs:
                checkpoints.end_if_asked(epoch)


def _run_epoch(
    session: Session, epoch: int, partial: Partial | None, checkpoints: Checkpoints | None
) -> EpochResult:
    waiting = time.perf_counter()
    order = start_epoch(session, epoch)
    started = time.perf_counter()
    terms = active_terms(session.run.terms, epoch)
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
    errors, validation = _test(session, epoch)
    return EpochResult(
        epoch=epoch,
        loss=_mean_of_samples(step_losses, session),
        losses={name: total / len(order) for name, total in losses.items()},
        weights={term.loss: term.weight for term in terms},
        errors=errors,
        validation=validation,
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


def _test(session: Session, epoch: int) -> tuple[ErrorRates | None, ErrorRates | None]:
    """Errors on the test and the validation split, in the epochs that are tested."""
    training = session.run.training
    if epoch % training.evaluate_every and epoch != training.epochs:
        return None, None
    return _errors_on(session.data.test, session), _errors_on(session.data.validation, session)


def _errors_on(pixels: Pixels | None, session: Session) -> ErrorRates | None:
    if pixels is None:
        return None
    learner = session.learner
    return evaluate(learner.network, pixels, learner.precision, learner.device)


def evaluate(
    network: nn.Module, pixels: Pixels, precision: str, device: torch.device
) -> ErrorRates:
    """Of the network, in evaluation mode and on `device`, over view 0 of all samples."""
    was_training = network.training
    network.eval()
    try:
        return count_errors(outputs_and_labels(network, pixels, precision, device))
    finally:
        network.train(was_training)


def outputs_and_labels(
    network: nn.Module, pixels: Pixels, precision: str, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """(B, classes) float32 and (B,) of one batch of view 0 after another, as large as is good."""
    size = max(1, min(_BATCH, _BATCH_VALUES // int(np.prod(pixels.shape))))
    for batch in pixels.batches([0], np.arange(len(pixels)), size):
        with autocast(precision, device):
            yield network(batch.inputs).float(), batch.labels
