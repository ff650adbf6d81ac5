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
    """Which schedule."""
    milestones: Annotated[tuple[PositiveInt, ...], Field(min_length=1)]
    """Epochs after which the learning rate changes."""
    gamma: PositiveFloat = 0.1
    """Factor of each change."""


@dataclass(frozen=True, kw_only=True, config=BLOCK)
class OneCycle:
    """Raise the learning rate linearly, then lower it to zero as a cosine."""

    type: Literal["onecycle"]
    """Which schedule."""
    warmup_fraction: Fraction = 0.3
    """Share of all steps in which the learning rate rises."""


@dataclass(frozen=True, kw_only=True, config=BLOCK)
class Cosine:
    """Raise the learning rate linearly over whole epochs, then lower it as a cosine."""

    type: Literal["cosine"]
    """Which schedule."""
    warmup_epochs: NaturalInt = 0
    """Epochs in which the learning rate rises."""
    final_learning_rate: NonNegativeFloat = 0.0
    """Learning rate at the end of the cosine."""


Schedule = Annotated[MultiStep | OneCycle | Cosine, Field(discriminator="type")]


@dataclass(frozen=True, kw_only=True, config=BLOCK)
class Sgd:
    """Stochastic gradient descent, with the momentum that `training.momentum` says."""

    type: Literal["sgd"]
    """Which optimizer."""


@dataclass(frozen=True, kw_only=True, config=BLOCK)
class AdamW:
    """Adam with decoupled weight decay: `weight_decay` times the learning rate is taken off."""

    type: Literal["adamw"]
    """Which optimizer."""
    betas: tuple[FractionBelowOne, FractionBelowOne] = (0.9, 0.999)
    """Share that the running means of the gradients and of their squares keep in each step."""
    eps: PositiveFloat = 1e-8
    """Added to the root of the second mean."""


Optimizer = Annotated[Sgd | AdamW, Field(discriminator="type")]
_OF_SGD = ("momentum", "nesterov")
# Keys that came after runs were first identified, see `configs.schema.scalars.as_identity`.
LATER_TRAINING_KEYS = (
    "optimizer",
    "weight_decay_norm_bias",
    "max_grad_norm",
    "gradient_accumulation",
    "ema",
    "label_smoothing",
    "init",
    "pretrained_lr_factor",
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
    """A recipe: an optimizer under one learning-rate schedule."""

    epochs: Epochs
    """Passes over the training samples, each with the next view."""
    batch_size: BatchSize
    """Samples per step, of all processes together."""
    learning_rate: PositiveFloat
    """The highest learning rate."""
    schedule: Schedule
    """How the learning rate changes."""
    optimizer: Optimizer = Sgd(type="sgd")
    """How gradients change the weights."""
    momentum: Fraction = 0.9
    """Momentum of SGD."""
    nesterov: StrictBool = False
    """Nesterov's form of momentum."""
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
    """What batch norms see where several processes train together: `sync` all of a batch, as with
    one process; `local` only the process's own slice: less to exchange, but other results."""
    ema: Ema | None = None
    """A moving average of the weights, tested and saved beside the network; `null`: none."""
    pretrained_lr_factor: PositiveFloat = 1.0
    """Multiplies the learning rate of parameters that start from the weights of `init`."""
    frozen_stages: NaturalInt = 0
    """The first so many stages, with all before them, keep the weights that `init` names, and batch
    norms there their statistics."""
    precision: Precision = "float32"
    """Arithmetic of the network; `float32` excludes TF32, `float16` scales the loss."""
    eval_every: PositiveInt = 1
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
        if self.schedule.final_learning_rate > self.learning_rate:
            raise ValueError(
                f"schedule.final_learning_rate is {self.schedule.final_learning_rate}, above the "
                f"highest, learning_rate: {self.learning_rate}"
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

    def refuse_without_init(self, init: str | None, key: str) -> None:
        """Raise ValueError where weights to start from are made use of, and there are none."""
        if init is None and (self.frozen_stages or self.pretrained_lr_factor != 1):
            name = "frozen_stages" if self.frozen_stages else "pretrained_lr_factor"
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
        name = optimizer.get("type")
        for key in _OF_SGD:
            if name == "adamw" and raw.get(key) is not None:
                raise ValueError(f"{key} is of optimizer: {{type: sgd}}; set {key}=null for {name}")
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
    max_per_class: PositiveInt | None = None
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
