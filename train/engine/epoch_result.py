"""The result of an epoch of training."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from teach_once.nets.metrics import ErrorRates


class Tested(NamedTuple):
    """Errors on the test and validation splits; None if not evaluated or without such a split."""

    errors: ErrorRates | None
    validation: ErrorRates | None

    @property
    def deciding(self) -> ErrorRates | None:
        """The errors by which the best epoch is chosen."""
        return self.errors if self.validation is None else self.validation


@dataclass(frozen=True)
class EpochResult:
    """The result of an epoch. Losses are means over its samples, before weighting."""

    epoch: int
    loss: float
    losses: dict[str, float]
    weights: dict[str, float]
    errors: ErrorRates | None  # on the test split; None in epochs without evaluation
    validation: ErrorRates | None
    average: Tested | None  # of the averaged weights, if the recipe has them
    learning_rate: float
    num_samples: int
    train_seconds: float  # the steps, with the teacher's outputs loaded
    wait_seconds: float  # waiting for teacher outputs before the first step
    evaluate_seconds: float
    step_losses: list[float] = field(repr=False)

    @property
    def seconds(self) -> float:
        return self.wait_seconds + self.train_seconds + self.evaluate_seconds

    @property
    def images_per_second(self) -> float:
        return self.num_samples / max(self.train_seconds, 1e-9)

    def metrics(self) -> dict[str, Any]:
        """Build a line of metrics.jsonl."""
        return {
            "epoch": self.epoch,
            "loss": self.loss,
            "losses": self.losses,
            "weights": self.weights,
            "top1_error": self.errors and self.errors.top1,
            "top5_error": self.errors and self.errors.top5,
            "validation_top1_error": self.validation and self.validation.top1,
            **_average_metrics(self.average),
            "learning_rate": self.learning_rate,
            "train_seconds": self.train_seconds,
            "wait_seconds": self.wait_seconds,
        }


def _average_metrics(average: Tested | None) -> dict[str, Any]:
    if average is None:
        return {}
    errors, validation = average
    return {
        "ema_top1_error": errors and errors.top1,
        "ema_top5_error": errors and errors.top5,
        "ema_validation_top1_error": validation and validation.top1,
    }
