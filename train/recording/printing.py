"""Lines printed about the epochs of a run."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from rich.console import Console

from teach_once.configs.schema import LossTerm
from teach_once.runtime.formats import format_rate
from teach_once.runtime.metrics import deciding_metric, format_epoch
from teach_once.train.engine.epoch_result import EpochResult
from teach_once.train.recording.recorder import Recorder
from teach_once.train.schedule import weight_at
from teach_once.train.terms import loss_named

_NUMBER_WIDTH = 6  # of metrics, so that the lines of epochs align


def print_other_threads(recorder: Recorder, device: torch.device, console: Console | None) -> None:
    before, now = recorder.threads_before, torch.get_num_threads()
    if console is not None and device.type == "cpu" and before not in (None, now):
        console.print(
            f"started with {before} threads, resumed with {now}: the last bits may differ from "
            f"those of an uninterrupted run"
        )


@functools.lru_cache(maxsize=8)
def print_once(console: Console, line: str) -> None:
    """Print a line common to several runs once per console."""
    console.print(line)


class EpochPrinter:
    """Printer of errors, rate and time left after each epoch; silent without a console."""

    def __init__(
        self,
        epochs: int,
        first_epoch: int,
        console: Console | None,
        classifier_epoch: int = 1,  # first epoch in which a loss reaches the classifier
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
        loss = f"loss {result.loss:8.4f}{_parts_text(result)}"
        self._console.print(
            f"epoch {result.epoch:3d}/{self._epochs}  {loss}  {_test_text(result)}  "
            f"{format_rate(result.images_per_second):>8} images/s  ETA {left:4.0f} s"
            f"{self._idle(result.epoch)}"
        )

    def _idle(self, epoch: int) -> str:
        if epoch >= self._classifier_epoch:
            return ""
        if self._classifier_epoch > self._epochs:
            return "  no classifier"
        return f"  classifier idle until epoch {self._classifier_epoch}"


def classifier_epoch(terms: Sequence[LossTerm], epochs: int) -> int:
    """Return the first epoch whose losses reach the classifier; `epochs` + 1 if there is none."""
    reaching = [term for term in terms if "logits" in loss_named(term.loss).student]
    for epoch in range(1, epochs + 1):
        if any(weight_at(term, epoch) for term in reaching):
            return epoch
    return epochs + 1


def _parts_text(result: EpochResult) -> str:
    """Return the weighted terms of the loss; "" for a single term."""
    if len(result.losses) < 2:
        return ""
    parts = (f"{name} {result.weights[name] * loss:.3g}" for name, loss in result.losses.items())
    return f" = {' + '.join(parts)}"


def _test_text(result: EpochResult) -> str:
    if (values := result.tested.test) is None:
        return "not tested" + " " * 34
    metric = deciding_metric(values)
    average = result.average.test if result.average else None
    averaged = f", averaged weights {metric.format(average[metric.name])}" if average else ""
    return f"test {format_epoch(values, _NUMBER_WIDTH)}{averaged}"
