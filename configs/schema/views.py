"""The block `views`: which augmented versions of each image a cache holds."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, model_validator
from pydantic.dataclasses import dataclass

from configs.schema.augment import AugmentConfig, Centre
from configs.schema.scalars import BLOCK, PositiveInt, Seed


def _one_way(transform: Centre) -> Centre:
    random = ("flip", "trivial_augment", "colour_jitter", "erasing", "mix")
    if used := [name for name in random if getattr(transform, name)]:
        raise ValueError(f"a test image is always shown in the same way: remove {', '.join(used)}")
    return transform


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
        return self.evaluation or self.augment.eval_transform
