"""Trains a run to its end: resumes it, saves checkpoints, prints its epochs, stops on a signal."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console

from configs.schema import LossTerm
from nets.error_rates import ErrorRates
from runtime.signals import StopRequest
from train.loop import EpochResult, fit
from train.records import RunRecorder
from train.schedule import weight_at
from train.step import Session
from train.terms import loss_named


def train_to_end(
    session: Session,
    *,
    finish: Callable[[], Mapping[str, Any]],
    checkpoint_minutes: float = 10.0,
    console: Console | None = None,
    on_epoch: Callable[[EpochResult], None] | None = None,
) -> dict[str, Any]:
    """Train what is left of a run, and close its teacher source; returns the summary.

    finish: called after the last epoch; returns what the summary is to say besides. Ctrl-C and
    SIGTERM save a checkpoint and raise Stopped.
    """
    run = session.run
    try:
        with (
            StopRequest() as stop,
            RunRecorder(
                run, session.learner, checkpoint_minutes=checkpoint_minutes, stop=stop
            ) as recorder,
        ):
            epochs = run.training.epochs
            first = classifier_epoch(run.terms, epochs)
            printer = EpochPrinter(epochs, recorder.first_epoch, console, first)

            def after_epoch(result: EpochResult) -> None:
                recorder.epoch_done(result)
                printer(result)
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
            f"{_test_text(result.errors)}  "
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


def _test_text(errors: ErrorRates | None) -> str:
    if errors is None:
        return "not tested" + " " * 34
    top5 = f" {errors.top5:6.2f} % top-5" if errors.num_classes > 5 else ""
    return f"test error {errors.top1:6.2f} % top-1{top5}"
