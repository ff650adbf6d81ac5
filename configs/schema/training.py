"""The block `training`: the recipe of a teacher or a student."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StrictBool, model_validator
from pydantic.dataclasses import dataclass

from configs.schema.scalars import (
    BLOCK,
    BatchSize,
    Epochs,
    Fraction,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Seed,
    TrainingPrecision,
)


@dataclass(frozen=True, kw_only=True, config=BLOCK)
class MultiStep:
    """Multiply the learning rate by `gamma` after each milestone."""

    kind: Literal["multistep"]
    """Which schedule."""
    milestones: Annotated[tuple[PositiveInt, ...], Field(min_length=1)]
    """Epochs after which the learning rate changes."""
    gamma: PositiveFloat = 0.1
    """Factor of each change."""


@dataclass(frozen=True, kw_only=True, config=BLOCK)
class OneCycle:
    """Raise the learning rate linearly, then lower it to zero as a cosine."""

    kind: Literal["onecycle"]
    """Which schedule."""
    warmup_fraction: Fraction = 0.3
    """Share of all steps in which the learning rate rises."""


Schedule = Annotated[MultiStep | OneCycle, Field(discriminator="kind")]


def _closer(milestones: tuple[int, ...], epochs: int) -> list[int]:
    """The same milestones, scaled so that a sixth of the run follows the last one."""
    scale = epochs * 5 / 6 / max(milestones)
    return sorted({max(1, round(milestone * scale)) for milestone in milestones})


@dataclass(frozen=True, kw_only=True, config=BLOCK)
class Training:
    """A recipe: SGD with momentum under one learning-rate schedule."""

    epochs: Epochs
    """Passes over the training samples, each with the next view."""
    batch_size: BatchSize
    """Samples per step, of all processes together."""
    learning_rate: PositiveFloat
    """The highest learning rate."""
    schedule: Schedule
    """How the learning rate changes."""
    momentum: Fraction = 0.9
    """Momentum of SGD."""
    nesterov: StrictBool = False
    """Nesterov's form of momentum."""
    weight_decay: NonNegativeFloat = 5e-4
    """Weight decay of every parameter."""
    precision: TrainingPrecision = "float32"
    """Arithmetic of the network; `float32` excludes TF32."""
    evaluate_every: PositiveInt = 1
    """Epochs between tests; the last epoch is always tested."""
    compile: StrictBool = False
    """Compile the network with torch.compile: faster steps, a slow first one."""

    @model_validator(mode="after")
    def _milestones_are_reached(self) -> Training:
        if isinstance(self.schedule, MultiStep) and max(self.schedule.milestones) > self.epochs:
            raise ValueError(
                f"schedule.milestones {list(self.schedule.milestones)} go beyond the last epoch, "
                f"{self.epochs}; use such as {_closer(self.schedule.milestones, self.epochs)}"
            )
        return self

    @model_validator(mode="after")
    def _nesterov_has_momentum(self) -> Training:
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov: true needs a momentum above 0")
        return self


@dataclass(frozen=True, kw_only=True, config=BLOCK)
class TeacherTraining(Training):
    """How to train the teacher where its weights are missing.

    It sees a new view in every epoch, drawn like the cache's but not limited to its count.
    """

    seed: Seed = 0
    """Seed of the weights and of the order of samples."""
    limit: PositiveInt | None = None
    """Training samples per class; `null`: all of the training split."""


@dataclass(frozen=True, kw_only=True, config=BLOCK)
class StudentTraining(Training):
    """How to train a student."""

    freeze_idle_classifier: StrictBool = True
    """Leave the classifier unchanged while no loss term reaches it. `false` lets weight decay
    shrink it, as in the original implementation of Early Decay Teacher."""
