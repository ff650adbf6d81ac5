"""The block `training`: the recipe of a teacher or a student."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    StrictBool,
    StrictStr,
    model_serializer,
    model_validator,
)
from pydantic.dataclasses import dataclass

from teach_once.configs.schema.scalars import (
    BLOCK,
    BatchSize,
    Epochs,
    Fraction,
    FractionBelowOne,
    NaturalInt,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Precision,
    Seed,
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


@dataclass(frozen=True, kw_only=True, config=BLOCK)
class Cosine:
    """Raise the learning rate linearly over whole epochs, then lower it as a cosine."""

    kind: Literal["cosine"]
    """Which schedule."""
    warmup_epochs: NaturalInt = 0
    """Epochs in which the learning rate rises."""
    last_learning_rate: NonNegativeFloat = 0.0
    """The learning rate that the cosine ends at."""


Schedule = Annotated[MultiStep | OneCycle | Cosine, Field(discriminator="kind")]


@dataclass(frozen=True, kw_only=True, config=BLOCK)
class Sgd:
    """Stochastic gradient descent, with the momentum that `training.momentum` says."""

    kind: Literal["sgd"]
    """Which optimiser."""


@dataclass(frozen=True, kw_only=True, config=BLOCK)
class AdamW:
    """Adam with decoupled weight decay: `weight_decay` times the learning rate is taken off."""

    kind: Literal["adamw"]
    """Which optimiser."""
    betas: tuple[FractionBelowOne, FractionBelowOne] = (0.9, 0.999)
    """Share that the running means of the gradients and of their squares keep in each step."""
    eps: PositiveFloat = 1e-8
    """Added to the root of the second mean."""


Optimizer = Annotated[Sgd | AdamW, Field(discriminator="kind")]
_OF_SGD = ("momentum", "nesterov")
# Keys that came after runs were first identified, see `configs.schema.scalars.as_identity`.
LATER_TRAINING_KEYS = (
    "optimizer",
    "decay_norms_and_biases",
    "clip_gradient_norm",
    "accumulate",
    "ema",
    "label_smoothing",
    "init",
    "init_rate_factor",
    "frozen_stages",
    "batch_norm",
)


@dataclass(frozen=True, kw_only=True, config=BLOCK)
class Ema:
    """A second set of weights: the exponential moving average of the network's."""

    decay: FractionBelowOne
    """Share of the average that each step keeps; 0.9999 averages over some 10,000 steps."""


def _closer(milestones: tuple[int, ...], epochs: int) -> list[int]:
    """The same milestones, scaled so that a sixth of the run follows the last one."""
    scale = epochs * 5 / 6 / max(milestones)
    return sorted({max(1, round(milestone * scale)) for milestone in milestones})


@dataclass(frozen=True, kw_only=True, config=BLOCK)
class Training:
    """A recipe: an optimiser under one learning-rate schedule."""

    epochs: Epochs
    """Passes over the training samples, each with the next view."""
    batch_size: BatchSize
    """Samples per step, of all processes together."""
    learning_rate: PositiveFloat
    """The highest learning rate."""
    schedule: Schedule
    """How the learning rate changes."""
    optimizer: Optimizer = Sgd(kind="sgd")
    """How gradients change the weights."""
    momentum: Fraction = 0.9
    """Momentum of SGD."""
    nesterov: StrictBool = False
    """Nesterov's form of momentum."""
    weight_decay: NonNegativeFloat = 5e-4
    """Weight decay of every parameter."""
    decay_norms_and_biases: StrictBool = True
    """`false` leaves norms, biases and what else has one dimension out of the weight decay."""
    clip_gradient_norm: PositiveFloat | None = None
    """Longest gradient, over all parameters together; longer ones are shortened. `null`: any."""
    accumulate: PositiveInt = 1
    """Parts that a batch is worked through in, their gradients added up, where it is too large for
    the memory. Batch norm and losses over several samples see one part at a time."""
    batch_norm: Literal["sync", "local"] = "sync"
    """What batch norms see where several processes train together: `sync` all of a batch, as with
    one process; `local` only the process's own slice: less to exchange, but other results."""
    ema: Ema | None = None
    """A moving average of the weights, tested and saved beside the network; `null`: none."""
    init_rate_factor: PositiveFloat = 1.0
    """Factor of the learning rate for all that starts from the weights that `init` names."""
    frozen_stages: NaturalInt = 0
    """The first so many stages, with all before them, keep the weights that `init` names, and batch
    norms there their statistics."""
    precision: Precision = "float32"
    """Arithmetic of the network; `float32` excludes TF32, `float16` scales the loss."""
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
    def _cosine_fits(self) -> Training:
        if not isinstance(self.schedule, Cosine):
            return self
        if self.schedule.warmup_epochs >= self.epochs:
            raise ValueError(
                f"schedule.warmup_epochs is {self.schedule.warmup_epochs} of {self.epochs} epochs; "
                f"use such as {self.epochs // 20}"
            )
        if self.schedule.last_learning_rate > self.learning_rate:
            raise ValueError(
                f"schedule.last_learning_rate is {self.schedule.last_learning_rate}, more than the "
                f"highest, learning_rate: {self.learning_rate}"
            )
        return self

    @model_validator(mode="after")
    def _parts_have_samples(self) -> Training:
        if self.accumulate > self.batch_size:
            raise ValueError(
                f"accumulate is {self.accumulate}, more parts than the batch has samples: "
                f"{self.batch_size}"
            )
        return self

    def refuse_without_init(self, init: str | None, key: str) -> None:
        """Raise ValueError where weights to start from are made use of, and there are none."""
        if init is None and (self.frozen_stages or self.init_rate_factor != 1):
            name = "frozen_stages" if self.frozen_stages else "init_rate_factor"
            raise ValueError(f"training.{name} is for weights that exist: set {key}=WEIGHTS")

    @model_validator(mode="before")
    @classmethod
    def _keys_are_where_they_belong(cls, raw: Any) -> Any:
        optimizer = raw.get("optimizer") if isinstance(raw, dict) else None
        if not isinstance(optimizer, dict):
            return raw
        for key in ("learning_rate", "weight_decay", *_OF_SGD):
            if key in optimizer:
                raise ValueError(f"optimizer.{key} is a key beside optimizer: training.{key}")
        kind = optimizer.get("kind")
        for key in _OF_SGD:
            if kind == "adamw" and raw.get(key) is not None:
                raise ValueError(f"{key} is of optimizer: {{kind: sgd}}; set {key}=null for {kind}")
        return {key: value for key, value in raw.items() if key not in _OF_SGD or value is not None}

    @model_serializer(mode="wrap")
    def _without_what_is_not_used(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        plain: dict[str, Any] = handler(self)
        is_sgd = isinstance(self.optimizer, Sgd)
        return {key: value for key, value in plain.items() if is_sgd or key not in _OF_SGD}

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
    label_smoothing: Fraction = 0.0
    """Share of each label that is spread over all classes; of a student an option of `ce`."""
    init: StrictStr | None = None
    """Weights to start from: a file, `torchvision:NAME` or `timm:MODEL`; `null`: random ones."""

    @model_validator(mode="after")
    def _fine_tuning_has_weights(self) -> TeacherTraining:
        self.refuse_without_init(self.init, "training.init")
        return self


@dataclass(frozen=True, kw_only=True, config=BLOCK)
class StudentTraining(Training):
    """How to train a student."""

    freeze_idle_classifier: StrictBool = True
    """Leave the classifier unchanged while no loss term reaches it. `false` lets weight decay
    shrink it, as in the original implementation of Early Decay Teacher."""
