"""The training loop: a run from where it resumes to its end, epoch by epoch, tested in between.

A run advances batch by batch, so that several may be trained in turn (`train.sessions.joint`). It
saves checkpoints, prints its epochs and stops on a signal. Its state is its tensors, the number of
the last finished epoch and, within an epoch, of the last step; a run resumed from a checkpoint
equals an uninterrupted one, bit for bit on a CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn

from teach_once.nets.metrics import ErrorRates
from teach_once.runtime.command.run_to_end import OwnTime, last_of
from teach_once.runtime.command.signals import StopRequest
from teach_once.train.engine.distributed import broadcast_buffers
from teach_once.train.engine.epoch_result import EpochResult, Tested
from teach_once.train.engine.evaluation import evaluate_batches
from teach_once.train.engine.ranks import Ranks
from teach_once.train.engine.step import (
    ActiveTerm,
    Step,
    TrainContext,
    active_terms,
    epoch_steps,
    start_epoch,
)
from teach_once.train.engine.train_state import TrainState, capture_maps
from teach_once.train.errors import TrainError
from teach_once.train.recording.checkpoint import Partial, check_steps
from teach_once.train.recording.printing import (
    EpochPrinter,
    classifier_epoch,
    print_other_threads,
)
from teach_once.train.recording.recorder import Recorder
from teach_once.train.recording.tracking import tracking
from teach_once.train.runs.files import CHECKPOINT_FILE
from teach_once.views.pixels.batches import Pixels

Result = TypeVar("Result")


class Diverged(TrainError):
    """The loss of a run is no longer a number."""


# Where a run stands between two batches: the epoch, and how many batches of it are done, those that
# it was tested on counted after those that it was trained on.
Position = tuple[int, int]
# A run that is trained one batch each time it is advanced: it says where it stands, and in the end
# gives its summary.
Training = Generator[Position, None, dict[str, Any]]


def train_to_end(
    context: TrainContext,
    *,
    finish: Callable[[], Mapping[str, Any]],
    console: Console | None = None,
    track: Sequence[str] = (),
) -> dict[str, Any]:
    """Train what is left of a run, at a stretch; see `training`."""
    with StopRequest() as stop:
        return last_of(training(context, finish=finish, stop=stop, console=console, track=track))


def training(
    context: TrainContext,
    *,
    finish: Callable[[], Mapping[str, Any]],
    stop: StopRequest,
    checkpoint_minutes: float = 10.0,
    console: Console | None = None,
    on_epoch: Callable[[EpochResult], None] | None = None,
    track: Sequence[str] = (),
) -> Training:
    """Train what is left of a run, batch by batch, and close its teacher source; gives the summary.

    Other runs may be trained between two batches: nothing global is changed then, and their time is
    not counted. finish: called after the last epoch; returns what the summary is to say besides.
    stop: a request to save a checkpoint and to raise Stopped. track: the trackers that get its
    figures.
    """
    run, clock = context.run, OwnTime()
    try:
        with (
            Recorder(
                run,
                context.train_state,
                checkpoint_minutes=checkpoint_minutes,
                stop=stop,
                clock=clock,
            ) as recorder,
            tracking(
                track,
                run,
                recorder.first_epoch,
                console,
                is_resumed=recorder.first_epoch > 1 or recorder.partial is not None,
            ) as log,
        ):
            epochs = run.training.epochs
            first = classifier_epoch(run.terms, epochs)
            printer = EpochPrinter(epochs, recorder.first_epoch, console, first)

            print_other_threads(recorder, context.train_state.device, console)

            def after_epoch(result: EpochResult) -> None:
                recorder.save_epoch(result)
                printer(result)
                log(result)
                if on_epoch is not None:
                    on_epoch(result)

            with closing(_fit(context, recorder, after_epoch, clock)) as batches:
                for position in batches:
                    with clock.paused():
                        yield position
            return recorder.finish(finish)
    finally:
        context.teacher.close()


def _fit(
    context: TrainContext,
    recorder: Recorder,
    on_epoch: Callable[[EpochResult], None],
    clock: OwnTime,
) -> Generator[Position, None, None]:
    """Train from where the run resumes to the last epoch; `on_epoch` after each."""
    train_state, training = context.train_state, context.run.training
    partial = recorder.partial
    train_state.train()
    with capture_maps(train_state, context.data.train, training.batch_size):
        for epoch in range(recorder.first_epoch, training.epochs + 1):
            yield epoch, partial.step if partial else 0
            result = yield from _run_epoch(context, epoch, partial, recorder, clock)
            partial = None
            train_state.maps.clear()  # those of the last test batch
            on_epoch(result)
            if epoch < training.epochs:
                recorder.end_if_asked(epoch)


def _run_epoch(
    context: TrainContext, epoch: int, partial: Partial | None, recorder: Recorder, clock: OwnTime
) -> Generator[Position, None, EpochResult]:
    waiting = clock()
    order = start_epoch(context, epoch)
    started = clock()
    terms = active_terms(context.run.terms, epoch)
    if partial is not None:
        checkpoint, losses_now = context.run.folder / CHECKPOINT_FILE, [each.loss for each in terms]
        check_steps(partial, losses_now, context.num_steps, checkpoint)
    sums = _Sums.begun(terms, context.train_state, partial)
    seconds_before = partial.train_seconds if partial else 0.0
    rate = 0.0
    for step in epoch_steps(context, epoch, order, terms, steps_done=sums.num_steps):
        sums.add(step)
        rate = step.learning_rate
        if step.number < context.num_steps and recorder.is_due():
            recorder.save(sums.partial(epoch, seconds_before + clock() - started))
        yield epoch, step.number
    step_losses, losses = sums.read()
    _check_divergence(step_losses, epoch, sums)
    trained = clock()
    tested, average = yield from _in_turn(_tests(context, epoch), epoch, context.num_steps)
    return EpochResult(
        epoch=epoch,
        loss=_sample_mean(step_losses, context),
        losses={name: total / len(order) for name, total in losses.items()},
        weights={term.loss: term.weight for term in terms},
        errors=tested.errors,
        validation=tested.validation,
        average=average,
        learning_rate=rate,
        num_samples=len(order),
        train_seconds=seconds_before + trained - started,
        wait_seconds=started - waiting,
        evaluate_seconds=clock() - trained,
        step_losses=step_losses,
    )


def _in_turn(
    work: Generator[None, None, Result], epoch: int, batches_done: int
) -> Generator[Position, None, Result]:
    """Work that says only when a batch is done, as one that says where it stands."""
    with closing(work):
        while True:
            try:
                next(work)
            except StopIteration as end:
                result: Result = end.value
                return result
            batches_done += 1
            yield epoch, batches_done


def _tests(
    context: TrainContext, epoch: int
) -> Generator[None, None, tuple[Tested, Tested | None]]:
    """Errors of the network and, where the recipe has one, of the average of its weights."""
    train_state = context.train_state
    broadcast_buffers(train_state)
    tested = yield from _test(train_state.network, context, epoch)
    if train_state.average is None:
        return tested, None
    return tested, (yield from _test(train_state.average.module, context, epoch))


def _test(network: nn.Module, context: TrainContext, epoch: int) -> Generator[None, None, Tested]:
    """Errors on the test and the validation split, in the epochs that are tested."""
    training, train_state, data = context.run.training, context.train_state, context.data
    if epoch % training.evaluate_every and epoch != training.epochs:
        return Tested(None, None)

    def errors_on(pixels: Pixels) -> Generator[None, None, ErrorRates]:
        return evaluate_batches(
            network, pixels, train_state.precision, train_state.device, train_state.ranks
        )

    errors = yield from errors_on(data.test)
    return Tested(errors, (yield from errors_on(data.validation)) if data.validation else None)


@dataclass
class _Sums:
    """Losses of an epoch's steps so far; on the device, as reading one would wait for it.

    Of several ranks each has its share, which are added up where they are read.
    """

    step_losses: list[Tensor]  # the weighted total of each step
    terms: list[Mapping[str, Tensor]]  # the losses of each step since the run began or resumed
    by_name: dict[str, Tensor]  # sums over samples
    ranks: Ranks

    @classmethod
    def begun(
        cls, terms: Sequence[ActiveTerm], train_state: TrainState, partial: Partial | None
    ) -> _Sums:
        device, ranks = train_state.device, train_state.ranks
        if partial is None:
            zeros = {term.loss: torch.zeros((), device=device) for term in terms}
            return cls([], [], zeros, ranks)
        by_name = {
            name: ranks.keep_on_first(value.to(device)) for name, value in partial.sums.items()
        }
        step_losses = ranks.keep_on_first(partial.step_losses.to(device))
        return cls(list(step_losses.unbind()), [], by_name, ranks)

    @property
    def num_steps(self) -> int:
        return len(self.step_losses)

    def add(self, step: Step) -> None:
        self.step_losses.append(step.losses["total"])
        self.terms.append(step.losses)
        for name in self.by_name:
            self.by_name[name] += step.losses[name] * step.num_samples

    def partial(self, epoch: int, train_seconds: float) -> Partial:
        values = self._of_all_ranks().cpu()
        step_losses, totals = values[: self.num_steps], values[self.num_steps :]
        on_host = {name: total.clone() for name, total in zip(self.by_name, totals, strict=True)}
        return Partial(epoch, self.num_steps, step_losses.clone(), on_host, train_seconds)

    def read(self) -> tuple[list[float], dict[str, float]]:
        """Step losses, and sums by name: the one wait of an epoch."""
        values = self._of_all_ranks().tolist()
        sums = dict(zip(self.by_name, values[self.num_steps :], strict=True))
        return values[: self.num_steps], sums

    def terms_of(self, step: int) -> dict[str, float]:
        """The losses of step `step`, from 0; {} if it was taken before the run was resumed."""
        index = step - (self.num_steps - len(self.terms))
        if index < 0:
            return {}
        values = self.ranks.all_reduce(
            torch.stack([self.terms[index][name] for name in self.by_name])
        )
        return dict(zip(self.by_name, values.tolist(), strict=True))

    def _of_all_ranks(self) -> Tensor:
        return self.ranks.all_reduce(torch.stack([*self.step_losses, *self.by_name.values()]))


def _sample_mean(step_losses: Sequence[float], context: TrainContext) -> float:
    num_samples, size = len(context.data.train), context.run.training.batch_size
    sizes = (min(size, num_samples - step * size) for step in range(len(step_losses)))
    return sum(n * loss for n, loss in zip(sizes, step_losses, strict=True)) / num_samples


def _check_divergence(step_losses: Sequence[float], epoch: int, sums: _Sums) -> None:
    """Raise Diverged at the first loss that is not a finite number, naming the terms of that step.

    Terms that are finite themselves are told too: their values show whether the weights exploded.
    """
    for step, loss in enumerate(step_losses, start=1):
        if not math.isfinite(loss):
            terms = (f"{name} {value:.4g}" for name, value in sums.terms_of(step - 1).items())
            told = f": {told}" if (told := ", ".join(terms)) else ""
            raise Diverged(
                f"the loss became {loss} in epoch {epoch}, step {step}{told}",
                fix="lower training.learning_rate, or the weights of the method's losses",
            )


def trial_steps(context: TrainContext) -> Generator[int, None, None]:
    """Steps endlessly, two whole batches and the rest of an epoch; yields each one's images."""
    run, data = context.run, context.data.train
    terms = [ActiveTerm(term.loss, term.weight, term.options) for term in run.terms]
    num_samples, size = len(data), run.training.batch_size
    some = np.arange(min(num_samples, 2 * size + num_samples % size))
    context.train_state.train()
    with capture_maps(context.train_state, data, size):
        while True:
            for step in epoch_steps(context, 1, some, terms):
                step.losses["total"].item()
                yield step.num_samples
