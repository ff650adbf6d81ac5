"""What a run says while it trains: one line per epoch."""

from __future__ import annotations

from rich.console import Console

from nets.errors import Errors
from train.loop import EpochResult


class EpochPrinter:
    """Prints errors, rate and time left after each epoch; says nothing without a console."""

    def __init__(self, epochs: int, first_epoch: int, console: Console | None) -> None:
        self._epochs, self._first, self._console = epochs, first_epoch, console
        self._seconds = 0.0
        if console is not None and first_epoch > 1:
            console.print(f"continuing after epoch {first_epoch - 1} of {epochs}")

    def __call__(self, result: EpochResult) -> None:
        if self._console is None:
            return
        self._seconds += result.seconds
        left = self._seconds / (result.epoch - self._first + 1) * (self._epochs - result.epoch)
        self._console.print(
            f"epoch {result.epoch:3d}/{self._epochs}  loss {result.loss:8.4f}  "
            f"{_test_text(result.errors)}  "
            f"{result.images_per_second:8,.0f} images/s  ETA {left:4.0f} s"
        )


def _test_text(errors: Errors | None) -> str:
    if errors is None:
        return "not tested" + " " * 34
    return f"test error {errors.top1:6.2f} % top-1 {errors.top5:6.2f} % top-5"
