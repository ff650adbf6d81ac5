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

    type: Literal["multistep"]
    """Type of the schedule."""
    milestones: Annotated[tuple[PositiveInt, ...], Field(min_length=1)]
    """Epochs after which the learning rate changes."""
    gamma: PositiveFloat = 0.1
    """Factor by which each milestone multiplies the learning rate."""


@dataclass(frozen=True, kw_only=True, config=BLOCK)
class OneCycle:
    """Raise the learning rate linearly, then lower it to zero as a cosine."""

    type: Literal["onecycle"]
    """Type of the schedule."""
    warmup_fraction: Fraction = 0.3
    """Fraction of all steps in which the learning rate rises."""


@dataclass(frozen=True, kw_only=True, config=BLOCK)
class Cosine:
    """Raise the learning rate linearly over whole epochs, then lower it as a cosine."""

    type: Literal["cosine"]
    """Type of the schedule."""
    warmup_epochs: NaturalInt = 0
    """Epochs over which the learning rate rises."""
    final_learning_rate: NonNegativeFloat = 0.0
    """Learning rate at the end of the cosine."""


Schedule = Annotated[MultiStep | OneCycle | Cosine, Field(discriminator="type")]


@dataclass(frozen=True, kw_only=True, config=BLOCK)
class Sgd:
    """Stochastic gradient descent with `training.momentum`."""

    type: Literal["sgd"]
    """Type of the optimizer."""


@dataclass(frozen=True, kw_only=True, config=BLOCK)
class AdamW:
    """Adam with decoupled weight decay."""

    type: Literal["adamw"]
    """Type of the optimizer."""
    betas: tuple[FractionBelowOne, FractionBelowOne] = (0.9, 0.999)
    """Decay rates of the running means of the gradient and of its square."""
    eps: PositiveFloat = 1e-8
    """Added to the denominator for numerical stability."""


Optimizer = Annotated[Sgd | AdamW, Field(discriminator="type")]
_OF_SGD = ("momentum", "nesterov")


@dataclass(frozen=True, kw_only=True, config=BLOCK)
class Ema:
    """An exponential moving average of the network's weights."""

    decay: FractionBelowOne
    """Decay rate per step; 0.9999 averages over about 10,000 steps."""


def _closer(milestones: tuple[int, ...], epochs: int) -> list[int]:
    """Return the milestones scaled so that a sixth of the run follows the last one."""
    scale = epochs * 5 / 6 / max(milestones)
    return sorted({max(1, round(milestone * scale)) for milestone in milestones})


@dataclass(frozen=True, kw_only=True, config=BLOCK)
class Training:
    """A training recipe: an optimizer with one learning-rate schedule."""

    epochs: Epochs
    """Passes over the training samples; each epoch uses the next view."""
    batch_size: BatchSize
    """Samples per step, summed over all processes."""
    learning_rate: PositiveFloat
    """Peak learning rate."""
    schedule: Schedule
    """Learning-rate schedule."""
    optimizer: Optimizer = Sgd(type="sgd")
    """Optimizer."""
    momentum: Fraction = 0.9
    """Momentum of SGD."""
    nesterov: StrictBool = False
    """Use Nesterov momentum."""
    weight_decay: NonNegativeFloat = 5e-4
    """Weight decay of every parameter."""
    weight_decay_norm_bias: StrictBool = True
    """`false` excludes norms, biases and other one-dimensional parameters from weight decay."""
    max_grad_norm: PositiveFloat | None = None
    """Maximum norm of the gradient of all parameters together; `null`: no clipping."""
    gradient_accumulation: PositiveInt = 1
    """Micro-batches per batch, for a batch that does not fit into memory. Batch norm, and losses
    that compare samples, see one micro-batch at a time."""
    batch_norm: Literal["sync", "local"] = "sync"
    """Batch statistics with several processes: `sync` uses the whole batch, as one process does;
    `local` uses each process's own slice, which is cheaper and gives different results."""
    ema: Ema | None = None
    """Moving average of the weights, evaluated and saved next to the network; `null`: none."""
    pretrained_lr_factor: PositiveFloat = 1.0
    """Multiplies the learning rate of parameters that start from the weights of `init`."""
    frozen_stages: NaturalInt = 0
    """Number of first stages, including the layers before them, that keep the weights of `init` and
    their batch norm statistics."""
    precision: Precision = "float32"
    """Precision of the network's arithmetic; `float32` disables TF32, `float16` scales the loss."""
    eval_every: PositiveInt = 1
    """Epochs between evaluations; the last epoch is always evaluated."""
    compile: StrictBool = False
    """Compile the network with torch.compile: a slow first step, then faster ones."""

    @model_validator(mode="after")
    def _milestones_are_reached(self) -> Training:
        if isinstance(self.schedule, MultiStep) and max(self.schedule.milestones) > self.epochs:
            raise ValueError(
                f"schedule.milestones {list(self.schedule.milestones)} exceed the last epoch, "
                f"{self.epochs}; use, for example, {_closer(self.schedule.milestones, self.epochs)}"
            )
        return self

    @model_validator(mode="after")
    def _cosine_fits(self) -> Training:
        if not isinstance(self.schedule, Cosine):
            return self
        if self.schedule.warmup_epochs >= self.epochs:
            raise ValueError(
                f"schedule.warmup_epochs is {self.schedule.warmup_epochs} of {self.epochs} epochs; "
                f"use, for example, {self.epochs // 20}"
            )
        if self.schedule.final_learning_rate > self.learning_rate:
            raise ValueError(
                f"schedule.final_learning_rate is {self.schedule.final_learning_rate}, above the "
                f"peak learning_rate: {self.learning_rate}"
            )
        return self

    @model_validator(mode="after")
    def _parts_have_samples(self) -> Training:
        if self.gradient_accumulation > self.batch_size:
            raise ValueError(
                f"gradient_accumulation is {self.gradient_accumulation}, more than batch_size, "
                f"{self.batch_size}"
            )
        return self

    def check_init(self, init: str | None, key: str) -> None:
        """Raise ValueError if a key for pretrained weights is set without such weights."""
        if init is None and (self.frozen_stages or self.pretrained_lr_factor != 1):
            name = "frozen_stages" if self.frozen_stages else "pretrained_lr_factor"
            raise ValueError(f"training.{name} requires pretrained weights: set {key}=WEIGHTS")

    @model_validator(mode="before")
    @classmethod
    def _keys_are_where_they_belong(cls, raw: Any) -> Any:
        optimizer = raw.get("optimizer") if isinstance(raw, dict) else None
        if not isinstance(optimizer, dict):
            return raw
        for key in ("learning_rate", "weight_decay", *_OF_SGD):
            if key in optimizer:
                raise ValueError(f"optimizer.{key} is not a key of optimizer; use training.{key}")
        name = optimizer.get("type")
        for key in _OF_SGD:
            if name == "adamw" and raw.get(key) is not None:
                raise ValueError(
                    f"{key} requires optimizer {{type: sgd}}; set {key}=null for {name}"
                )
        return {key: value for key, value in raw.items() if key not in _OF_SGD or value is not None}

    @model_serializer(mode="wrap")
    def _without_what_is_not_used(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        plain: dict[str, Any] = handler(self)
        is_sgd = isinstance(self.optimizer, Sgd)
        return {key: value for key, value in plain.items() if is_sgd or key not in _OF_SGD}

    @model_validator(mode="after")
    def _nesterov_has_momentum(self) -> Training:
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov: true requires a momentum above 0")
        return self


@dataclass(frozen=True, kw_only=True, config=BLOCK)
class TeacherTraining(Training):
    """Training recipe of the teacher, used if its weights are missing.

    Each epoch uses a new view, sampled like the cache's views but not limited to their count.
    """

    seed: Seed = 0
    """Seed of the initial weights and of the sample order."""
    max_per_class: PositiveInt | None = None
    """Training samples per class; `null`: the whole training split."""
    label_smoothing: Fraction = 0.0
    """Fraction of each label that is spread over all classes. For students it is an option of
    `ce`."""
    init: StrictStr | None = None
    """Initial weights: a file, `torchvision:NAME` or `timm:MODEL`; `null`: random weights."""

    @model_validator(mode="after")
    def _fine_tuning_has_weights(self) -> TeacherTraining:
        self.check_init(self.init, "training.init")
        return self


@dataclass(frozen=True, kw_only=True, config=BLOCK)
class StudentTraining(Training):
    """Training recipe of a student."""

    freeze_idle_classifier: StrictBool = True
    """Freeze the classifier while no loss term reaches it. `false` lets weight decay shrink it, as
    in the original implementation of Early Decay Teacher."""
