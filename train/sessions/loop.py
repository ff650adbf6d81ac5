"""The training loop: trains a run to its end, epoch by epoch, with evaluation in between.

It saves checkpoints, prints epochs and stops on a signal. The state of a run is its tensors, the
number of finished epochs and, within an epoch, the number of finished steps. A run resumed from a
checkpoint equals an uninterrupted run, bit for bit on a CPU.

`RunTraining.batches` yields after every batch, so that several runs can share a batch of images one
after the other (`train.sessions.joint`) without threads. Only one run at a time uses networks,
optimizers and random states, and each run computes exactly what it would compute alone. Its clock
excludes other runs. For a single run, the generator is run to its end. The steps come from the
generator `train.engine.step.epoch_steps`, which trials and benchmarks use too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from teach_once.runtime.command.run_to_end import OwnTime
from teach_once.runtime.command.signals import StopRequest
from teach_once.train.engine.comparison import ERRORS_ONLY, Evaluator
from teach_once.train.engine.distributed import broadcast_buffers
from teach_once.train.engine.epoch_result import EpochResult, SplitMetrics
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
from teach_once.train.recording.options import Recording
from teach_once.train.recording.printing import (
    EpochPrinter,
    classifier_epoch,
    print_other_threads,
)
from teach_once.train.recording.recorder import Recorder
from teach_once.train.recording.tracking import tracking
from teach_once.train.runs.files import CHECKPOINT_FILE
from teach_once.views.pixels.batches import Pixels


class Diverged(TrainError):
    """The loss of a run is not a finite number."""


# A run's position between two batches: the epoch, and the number of finished batches in it, first
# training batches, then evaluation batches.
Position = tuple[int, int]


class RunTraining:
    """A run in training: `batches` trains the remaining epochs; afterwards `summary` is the result.

    finish: called after the last epoch on rank 0; returns additional entries of the summary. stop:
    a request to save a checkpoint and raise Stopped.
    """

    def __init__(
        self,
        context: TrainContext,
        recording: Recording,
        stop: StopRequest,
        finish: Callable[[], Mapping[str, Any]],
    ) -> None:
        self._context, self._recording = context, recording
        self._stop, self._finish = stop, finish
        self._clock = OwnTime()
        self.summary: dict[str, Any] = {}

    def batches(self) -> Iterator[Position]:
        """Train the rest of the run and yield after each batch; closes the teacher's outputs."""
        context, clock = self._context, self._clock
        state, recipe = context.train_state, context.run.training
        with closing(context.teacher), self._open_recorder() as (recorder, after_epoch):
            partial = recorder.partial
            state.train()
            with capture_maps(state, context.data.train, recipe.batch_size):
                for number in range(recorder.first_epoch, recipe.epochs + 1):
                    with clock.paused():
                        yield number, partial.step if partial else 0
                    epoch, partial = _Epoch(context, number, partial, clock), None
                    for step in epoch.steps():
                        epoch.sums.add(step)
                        if step.number < context.num_steps and recorder.is_due():
                            recorder.save(epoch.partial())
                        with clock.paused():
                            yield number, step.number
                    epoch.end_steps(step.learning_rate)
                    for batches_done, _ in enumerate(epoch.test_batches(), context.num_steps + 1):
                        with clock.paused():
                            yield number, batches_done
                    state.maps.clear()  # maps of the last test batch
                    after_epoch(epoch.result())
                    if number < recipe.epochs:
                        recorder.end_if_asked(number)
            self.summary = recorder.finish(self._finish)

    @contextmanager
    def _open_recorder(self) -> Iterator[tuple[Recorder, Callable[[EpochResult], None]]]:
        """Open the recorder and the trackers; yields also the function that reports an epoch."""
        run, state, recording = self._context.run, self._context.train_state, self._recording
        console, on_epoch = recording.console, recording.on_epoch
        minutes = recording.checkpoint_minutes
        with Recorder(
            run, state, checkpoint_minutes=minutes, stop=self._stop, clock=self._clock
        ) as recorder:
            first, epochs = recorder.first_epoch, run.training.epochs
            is_resumed = first > 1 or recorder.partial is not None
            with tracking(recording.loggers, run, first, console, is_resumed=is_resumed) as log:
                printer = EpochPrinter(epochs, first, console, classifier_epoch(run.terms, epochs))
                print_other_threads(recorder, state.device, console)

                def after_epoch(result: EpochResult) -> None:
                    recorder.save_epoch(result)
                    printer(result)
                    log(result)
                    if on_epoch is not None:
                        on_epoch(result)

                yield recorder, after_epoch


class _Epoch:
    """One epoch of a run: its terms, its losses so far, its seconds and its metrics."""

    def __init__(
        self, context: TrainContext, number: int, partial: Partial | None, clock: OwnTime
    ) -> None:
        """Start the epoch, and wait for teacher outputs.

        partial: the steps finished before the run was resumed.
        """
        self._context, self._number, self._clock = context, number, clock
        self._began = clock()
        self._order = start_epoch(context, number)
        self._started = clock()
        self._seconds_before = partial.train_seconds if partial else 0.0
        self._terms = active_terms(context.run.terms, number)
        if partial is not None:
            names = [each.loss for each in self._terms]
            checkpoint = context.run.folder / CHECKPOINT_FILE
            check_steps(partial, names, context.num_steps, checkpoint)
        self.sums = _Sums.resume(self._terms, context.train_state, partial)
        self._tested = SplitMetrics(None, None)
        self._average: SplitMetrics | None = None

    def steps(self) -> Iterator[Step]:
        """Yield the remaining training steps."""
        done = self.sums.num_steps
        return epoch_steps(self._context, self._number, self._order, self._terms, steps_done=done)

    def partial(self) -> Partial:
        """Return the finished steps for the checkpoint."""
        seconds = self._seconds_before + self._clock() - self._started
        return self.sums.partial(self._number, seconds)

    def end_steps(self, learning_rate: float) -> None:
        """Read the losses from the device. Raises Diverged if one is not finite."""
        self._step_losses, self._losses = self.sums.read()
        _check_divergence(self._step_losses, self._number, self.sums)
        self._context.teacher.end_epoch()
        self._trained, self._learning_rate = self._clock(), learning_rate

    def test_batches(self) -> Generator[None, None, None]:
        """Test the network, and its weight average if the recipe has one, batch by batch."""
        state = self._context.train_state
        broadcast_buffers(state)
        context, evaluator = self._context, self._context.evaluator
        self._tested = yield from _test(state.network, context, self._number, evaluator)
        if state.average is not None:
            alone = replace(evaluator, connect=None)  # the connectors have no average
            averaged = state.average.module
            self._average = yield from _test(averaged, context, self._number, alone)

    def result(self) -> EpochResult:
        num_samples = len(self._order)
        return EpochResult(
            epoch=self._number,
            loss=_sample_mean(self._step_losses, self._context),
            losses={name: total / num_samples for name, total in self._losses.items()},
            weights={term.loss: term.weight for term in self._terms},
            tested=self._tested,
            average=self._average,
            learning_rate=self._learning_rate,
            num_samples=num_samples,
            train_seconds=self._seconds_before + self._trained - self._started,
            wait_seconds=self._started - self._began,
            evaluate_seconds=self._clock() - self._trained,
            step_losses=self._step_losses,
        )


def _test(
    network: nn.Module, context: TrainContext, epoch: int, evaluator: Evaluator
) -> Generator[None, None, SplitMetrics]:
    """Measure the network on both held-out splits, in epochs with evaluation; a generator.

    Validation images have no teacher outputs, so that only errors are measured there.
    """
    training, train_state, data = context.run.training, context.train_state, context.data
    if epoch % training.eval_every and epoch != training.epochs:
        return SplitMetrics(None, None)

    def metrics_on(pixels: Pixels, evaluator: Evaluator) -> Generator[None, None, dict[str, float]]:
        precision, device = train_state.precision, train_state.device
        return evaluate_batches(network, pixels, precision, device, train_state.ranks, evaluator)

    test = yield from metrics_on(data.test, evaluator)
    if data.validation is None or not evaluator.counts_errors:
        return SplitMetrics(test, None)
    return SplitMetrics(test, (yield from metrics_on(data.validation, ERRORS_ONLY)))


@dataclass
class _Sums:
    """Sums of an epoch's step losses, kept on the device to avoid a synchronization.

    With several ranks, each sums its contributions, which are added when they are read.
    """

    step_losses: list[Tensor]  # the weighted total of each step
    terms: list[Mapping[str, Tensor]]  # losses of each step since the run was started or resumed
    by_name: dict[str, Tensor]  # sums over samples
    ranks: Ranks

    @classmethod
    def resume(
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
        """Return each step's loss, and sums of losses by name; synchronizes once per epoch."""
        values = self._of_all_ranks().tolist()
        sums = dict(zip(self.by_name, values[self.num_steps :], strict=True))
        return values[: self.num_steps], sums

    def terms_of(self, step: int) -> dict[str, float]:
        """Return the losses of step `step`, from 0; {} for a step before the run was resumed."""
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
    """Raise Diverged for the first loss that is not finite, with the values of that step's terms.

    Finite terms are included: their values show whether the weights diverged.
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
    """Take steps endlessly: two whole batches and an epoch's rest; yields images per step."""
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
