"""Selections of training samples: keyed, stratified by class, and nested."""

from __future__ import annotations

import numpy as np
import pytest

from teach_once.configs.load import load_teacher
from teach_once.configs.schema import Digits, Normalization
from teach_once.views.datasets import Dataset, load_dataset
from teach_once.views.identity import views_identity

GRAY = Normalization(mean=(0.5,), std=(0.5,))


def digits(**options: object) -> Dataset:
    return load_dataset(Digits(type="digits", normalization=GRAY, **options))


def contents(data: Dataset) -> list[bytes]:
    return [image.tobytes() for image in data.train.images]


def counts(data: Dataset) -> list[int]:
    assert data.train.labels is not None
    return np.bincount(data.train.labels, minlength=10).tolist()


@pytest.mark.usefixtures("all_digits")
def test_a_fraction_keeps_that_part_of_each_class() -> None:
    whole, tenth, half = digits(), digits(train_fraction=0.1), digits(train_fraction=0.5)
    assert counts(tenth) == [round(0.1 * count) for count in counts(whole)]
    assert set(contents(tenth)) < set(contents(half)) < set(contents(whole))
    order = contents(whole)
    assert contents(tenth) == [each for each in order if each in set(contents(tenth))]
    assert contents(tenth) != order[: len(tenth.train)]
    assert len({tenth.digest, half.digest, whole.digest}) == 3


def test_the_smallest_fraction_keeps_one_sample_of_each_class() -> None:
    assert counts(digits(train_fraction=0.0001)) == [1] * 10


@pytest.mark.usefixtures("all_digits")
def test_held_out_samples_do_not_depend_on_the_fraction() -> None:
    some = digits(train_fraction=0.3, validation_fraction=0.2)
    whole = digits(validation_fraction=0.2)
    assert some.validation is not None
    assert whole.validation is not None
    assert np.array_equal(some.validation.images, whole.validation.images)


def test_max_samples_applies_after_the_limit_per_class() -> None:
    some = digits(max_per_class=4, max_samples=25)
    assert len(some.train) == 25
    assert set(contents(some)) < set(contents(digits(max_per_class=4)))


def test_only_a_selection_that_leaves_out_samples_enters_the_identity() -> None:
    def dataset_block(*overrides: str) -> dict[str, object]:
        config = load_teacher("digits-resnet20", ["dataset.max_per_class=null", *overrides])
        return dict(views_identity(config, load_dataset(config.dataset))["dataset"])

    usual = dataset_block()
    assert "train_fraction" not in usual
    assert "max_samples" not in usual
    assert dataset_block("dataset.max_samples=10000000") == usual
    some = dataset_block("dataset.train_fraction=0.5", "dataset.max_samples=20")
    assert some["train_fraction"] == 0.5
    assert some["max_samples"] == 20
    assert some["digest"] != usual["digest"]
