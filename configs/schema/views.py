"""The block `views`: the augmented versions of each image in a cache."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, model_validator
from pydantic.dataclasses import dataclass

from teach_once.configs.schema.augment import AugmentConfig, EvaluationConfig
from teach_once.configs.schema.scalars import BLOCK, NumViews, Seed


def _one_way(transform: EvaluationConfig) -> EvaluationConfig:
    random = ("flip", "trivial_augment", "color_jitter", "random_erasing", "mix")
    if used := [name for name in random if getattr(transform, name)]:
        raise ValueError(f"the test transform must not be random: remove {', '.join(used)}")
    return transform


# The transform of test images, without randomness.
Evaluation = Annotated[EvaluationConfig, AfterValidator(_one_way)]


@dataclass(frozen=True, kw_only=True, config=BLOCK)
class ViewsConfig:
    """The augmented versions of each sample in the cache."""

    augment: AugmentConfig
    """Augmentation that makes a view of an image."""
    seed: Seed = 0
    """Seed of the augmentation."""
    count: NumViews | Literal["all"] = 16
    """Views per sample; `all`: every distinct view, for augmentations with a finite number."""
    evaluation: Evaluation | None = None
    """Transform of test and validation images: `center-crop`, `squash` or `border`. `null`: the
    same crop without randomness; after `random-resized-crop`, the central `size_px` of an image
    whose short side is resized to 8/7 of that."""

    @model_validator(mode="after")
    def _within_the_space(self) -> ViewsConfig:
        space = self.augment.num_distinct_views
        if space is None and self.count == "all":
            raise ValueError("count: all requires an augmentation whose views can be counted")
        if space is not None and self.count != "all" and self.count > space:
            raise ValueError(
                f"count is {self.count}, but this augmentation has only {space} distinct views; "
                f"use count: {space} or count: all"
            )
        return self

    @property
    def num_views(self) -> int:
        return (self.augment.num_distinct_views or 0) if self.count == "all" else int(self.count)

    @property
    def eval_transform(self) -> EvaluationConfig:
        return self.evaluation or self.augment.eval_transform
