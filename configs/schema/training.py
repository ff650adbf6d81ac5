"""The block `training`: the recipe of a teacher or a student."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StrictBool, model_validator
from pydantic.dataclasses import dataclass

from configs.schema.scalars import (
    BLOCK,
    Fraction,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Seed,
    TrainingPrecision,
)


@dataclass(frozen=True, kw_only=True, config=BLOCK)
class MultiStep:
    """Multiply the learning rate by `gamma` after each of `milestones` (in epochs)."""

    kind: Literal["multistep"]
    milestones: Annotated[tuple[PositiveInt, ...], Field(min_length=1)]
    gamma: PositiveFloat = 0.1


@dataclass(frozen=True, kw_only=True, config=BLOCK)
class OneCycle:
    """Rise linearly over `warmup_fraction` of all steps, then fall as a cosine to zero."""

    kind: Literal["onecycle"]
    warmup_fraction: Fraction = 0.3


Schedule = Annotated[MultiStep | OneCycle, Field(discriminator="kind")]


def _closer(milestones: tuple[int, ...], epochs: int) -> list[int]:
    """The same milestones, scaled so that a sixth of the run follows the last one."""
    scale = epochs * 5 / 6 / max(milestones)
    return sorted({max(1, round(milestone * scale)) for milestone in milestones})


@dataclass(frozen=True, kw_only=True, config=BLOCK)
class Training:
    """A recipe: SGD with momentum under one learning-rate schedule."""

    epochs: PositiveInt
    batch_size: PositiveInt
    learning_rate: PositiveFloat
    schedule: Schedule
    momentum: Fraction = 0.9
    nesterov: StrictBool = False
    weight_decay: NonNegativeFloat = 5e-4  # on every parameter
    precision: TrainingPrecision = "float32"
    evaluate_every: PositiveInt = 1  # epochs between tests; the last epoch is always tested
    compile: StrictBool = False  # the network by torch.compile; faster steps, a slow first one

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
    """How to train the teacher where no weights exist.

    It sees a fresh view in every epoch, drawn like the cache's but never limited to its count.
    """

    seed: Seed = 0
    limit: PositiveInt | None = None  # samples per class; default: all the training split has


@dataclass(frozen=True, kw_only=True, config=BLOCK)
class StudentTraining(Training):
    """How to train a student."""

    # While no loss term reaches the classifier, leave it as it is. False lets weight decay
    # shrink it, as the original implementation of Early Decay Teacher does.
    freeze_idle_classifier: StrictBool = True
