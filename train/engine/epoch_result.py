"""The result of an epoch of training."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from teach_once.runtime.metrics import Values


class SplitMetrics(NamedTuple):
    """Metrics on the test and validation splits; None if not evaluated or without such a split."""

    test: Values | None
    validation: Values | None

    @property
    def deciding(self) -> Values | None:
        """The metrics by which the best epoch is chosen."""
        return self.test if self.validation is None else self.validation


@dataclass(frozen=True)
class EpochResult:
    """The result of an epoch. Losses are means over its samples, before weighting."""

    epoch: int
    loss: float
    losses: dict[str, float]
    weights: dict[str, float]
    tested: SplitMetrics
    average: SplitMetrics | None  # of the averaged weights, if the recipe has them
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
            **_by_split("", self.tested),
            **(_by_split("ema_", self.average) if self.average else {}),
            "learning_rate": self.learning_rate,
            "train_seconds": self.train_seconds,
            "wait_seconds": self.wait_seconds,
        }


def _by_split(prefix: str, tested: SplitMetrics) -> dict[str, Any]:
    return {f"{prefix}{split}": values for split, values in tested._asdict().items()}
