"""The block `methods`: the losses that a student is trained with."""

from __future__ import annotations

import difflib
import re
from typing import Annotated

from pydantic import AfterValidator, Field, StrictStr, model_validator
from pydantic.dataclasses import dataclass

from configs.schema.scalars import (
    BLOCK,
    Float,
    NaturalInt,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
)

# The losses of train/losses.py, and the options that each takes.
LOSS_OPTIONS: dict[str, frozenset[str]] = {
    "ce": frozenset(),
    "kd": frozenset({"temperature"}),
    "gkd": frozenset({"temperature"}),
    "cd": frozenset(),
    "at": frozenset(),
    "rkd": frozenset({"distance_weight", "angle_weight"}),
    "fitnets": frozenset(),
    "dkd": frozenset({"temperature", "alpha", "beta"}),
    "dist": frozenset({"temperature"}),
    "lskd": frozenset({"temperature"}),
}


def _known_loss(name: str) -> str:
    if name in LOSS_OPTIONS or re.fullmatch(r"[\w.]+:\w+", name):
        return name
    close = difflib.get_close_matches(name, LOSS_OPTIONS, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise ValueError(
        f"unknown loss{hint or '.'} Known: {', '.join(LOSS_OPTIONS)}, and package.module:name"
    )


# A key of LOSS_OPTIONS, or the user's own as package.module:name.
LossName = Annotated[StrictStr, AfterValidator(_known_loss)]


@dataclass(frozen=True, kw_only=True, config=BLOCK)
class LossTerm:
    """One weighted term of a method; see `train.schedule.weight_at` for how the weight moves."""

    loss: LossName
    weight: NonNegativeFloat = 1.0
    decay: PositiveFloat = 1.0
    decay_epochs: tuple[PositiveInt, ...] = ()
    start_epoch: PositiveInt = 1
    warmup_epochs: NaturalInt = 0  # the weight rises linearly over so many, from start_epoch on
    temperature: PositiveFloat | None = None  # default: the loss's own, as for what follows
    alpha: NonNegativeFloat | None = None
    beta: NonNegativeFloat | None = None
    distance_weight: NonNegativeFloat | None = None
    angle_weight: NonNegativeFloat | None = None
    options: dict[StrictStr, Float] = Field(default_factory=dict)  # of a loss of the user's own

    @model_validator(mode="after")
    def _options_have_a_use(self) -> LossTerm:
        known = LOSS_OPTIONS.get(self.loss, frozenset())
        for name in ("temperature", "alpha", "beta", "distance_weight", "angle_weight"):
            if getattr(self, name) is not None and name not in known:
                raise ValueError(f"the loss {self.loss!r} has no {name}")
        if self.options and self.loss in LOSS_OPTIONS:
            raise ValueError("options are for a loss of your own; name this one's by themselves")
        return self


Method = Annotated[tuple[LossTerm, ...], Field(min_length=1)]
