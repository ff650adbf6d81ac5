"""The block `methods`: the loss terms of each training method."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    Field,
    SerializerFunctionWrapHandler,
    StrictBool,
    StrictStr,
    create_model,
    model_serializer,
    model_validator,
)
from pydantic.dataclasses import dataclass

from teach_once.configs.schema.losses import BUILT_IN_LOSSES, option_types
from teach_once.configs.schema.scalars import (
    BLOCK,
    Float,
    NaturalInt,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
)
from teach_once.runtime.command.program import program_text
from teach_once.runtime.errors import did_you_mean


def _known_loss(name: str) -> str:
    if name in BUILT_IN_LOSSES or re.fullmatch(r"[\w.]+:\w+", name):
        return name
    near = did_you_mean(name, BUILT_IN_LOSSES, most=3)
    raise ValueError(
        f"unknown loss{near or ': neither package.module:name nor a built-in loss;'} "
        f"{program_text('configs')} reference lists all"
    )


# A built-in loss, or a user's loss as package.module:name.
LossName = Annotated[StrictStr, AfterValidator(_known_loss)]


@dataclass(frozen=True, kw_only=True, config=BLOCK)
class LossTerm:
    """One weighted term of a method; `train.schedule.weight_at` defines its weight over time."""

    loss: LossName
    """A built-in loss, or your own as `package.module:name`."""
    weight: NonNegativeFloat = 1.0
    """Weight of the loss in the sum of all terms."""
    decay: PositiveFloat = 1.0
    """Factor of each change of the weight."""
    decay_epochs: tuple[PositiveInt, ...] = ()
    """Epochs at which the weight is multiplied by `decay`."""
    start_epoch: PositiveInt = 1
    """First epoch of the term; the weight is 0 before it."""
    warmup_epochs: NaturalInt = 0
    """Epochs from `start_epoch` over which the weight rises linearly."""
    options: dict[StrictStr, StrictBool | Float] = Field(default_factory=dict)
    """Options of your own loss by name; options of a built-in loss are keys of the term."""

    @model_validator(mode="before")
    @classmethod
    def _gather_options(cls, raw: Any) -> Any:
        """Move the options of a built-in loss from the term's keys to `options`, and check them."""
        if not isinstance(raw, dict):
            return raw
        keys = _keys()
        own = {key: value for key, value in raw.items() if key in keys}
        beside = {key: value for key, value in raw.items() if key not in keys}
        loss = raw.get("loss")
        if isinstance(loss, str) and loss in BUILT_IN_LOSSES:
            if raw.get("options"):
                raise ValueError(
                    "options is for your own losses; a built-in loss takes them as keys of the term"
                )
            return {**own, "options": _options_of(loss, beside)}
        misplaced = [key for key in beside if _is_an_option(key)]
        for key in misplaced:
            if beside[key] is not None and ":" in str(loss):
                raise ValueError(f"put {key} of your own loss under options")
        # For a missing or unknown loss, only that error is reported.
        return {key: value for key, value in raw.items() if key not in misplaced}

    @model_serializer(mode="wrap")
    def _spread_options(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Return the term in the form of the YAML file."""
        plain: dict[str, Any] = handler(self)
        if self.loss not in BUILT_IN_LOSSES:
            return plain
        options: dict[str, float] = plain.pop("options")
        return plain | options


Method = Annotated[tuple[LossTerm, ...], Field(min_length=1)]


def _keys() -> list[str]:
    return [each.name for each in dataclasses.fields(LossTerm)]


def _options_of(loss: str, given: Mapping[str, Any]) -> dict[str, float]:
    """Check the options of a built-in loss and return those that are set; `null` means the default.

    Raises ValueError for an unknown option, ValidationError for a value of another type or range.
    """
    known = option_types(loss)
    for name, value in given.items():
        if name not in known and (value is not None or not _is_an_option(name)):
            near = did_you_mean(name, [*known, *_keys()])
            raise ValueError(f"the loss {loss!r} has no option {name!r}{near}")
    values = {name: value for name, value in given.items() if value is not None}
    return dict(_options_model(loss, tuple(values)).model_validate(values))


@functools.cache
def _options_model(loss: str, names: tuple[str, ...]) -> type[BaseModel]:
    """Return the model that checks these options; building it takes most of the time of a load."""
    types: dict[str, Any] = {name: (option_types(loss)[name], ...) for name in names}
    return create_model(loss, **types)


def _is_an_option(name: str) -> bool:
    """Return True if any built-in loss has an option called `name`."""
    return any(name in option_types(loss) for loss in BUILT_IN_LOSSES)
