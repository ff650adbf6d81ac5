"""The block `views`: which augmented versions of each image a cache holds."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, model_validator
from pydantic.dataclasses import dataclass

from configs.schema.augment import AugmentConfig, Centre, RandomResizedCrop
from configs.schema.scalars import BLOCK, PositiveInt, Seed


def _one_way(shown: Centre) -> Centre:
    random = ("flip", "trivial_augment", "colour_jitter", "erasing", "mix")
    if used := [name for name in random if getattr(shown, name)]:
        raise ValueError(f"a test image is always shown in the same way: remove {', '.join(used)}")
    return shown


# How test images are shown: nothing about it is drawn.
Evaluation = Annotated[Centre, AfterValidator(_one_way)]


@dataclass(frozen=True, kw_only=True, config=BLOCK)
class ViewsConfig:
    """Which augmented versions of each sample the cache holds."""

    augment: AugmentConfig
    seed: Seed = 0
    count: PositiveInt | Literal["all"] = 16
    # How test and validation images are shown. Default: as they are; after random-resized-crop the
    # middle `size_px` of an image whose short side was made 8/7 of that.
    evaluation: Evaluation | None = None

    @model_validator(mode="after")
    def _within_the_space(self) -> ViewsConfig:
        space = self.augment.num_distinct_views
        if space is None and self.count == "all":
            raise ValueError("count: all needs an augmentation whose views can be counted")
        if space is not None and self.count != "all" and self.count > space:
            raise ValueError(
                f"count is {self.count}, but this augmentation has only {space} different views; "
                f"use count: {space} or count: all"
            )
        return self

    @property
    def num_views(self) -> int:
        return (self.augment.num_distinct_views or 0) if self.count == "all" else int(self.count)

    @property
    def eval_transform(self) -> Centre:
        augment = self.augment
        if self.evaluation is not None:
            return self.evaluation
        if isinstance(augment, RandomResizedCrop):
            return Centre(
                resize_px=round(augment.size_px * 8 / 7),
                crop_px=augment.size_px,
                interpolation=augment.interpolation,
            )
        if isinstance(augment, Centre):
            return Centre(
                resize_px=augment.resize_px,
                crop_px=augment.crop_px,
                interpolation=augment.interpolation,
            )
        return Centre()
