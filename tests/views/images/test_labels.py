"""Labels of tar shards and tables: whole numbers stay numbers, and invalid labels are reported."""

from __future__ import annotations

import pytest

from teach_once.views.images.labels import Label, number_labels
from teach_once.views.splits import DatasetError

TWELVE = [str(number) for number in range(12)]


def number(
    train: list[Label], test: list[Label] | None = None, names: list[str] | None = None
) -> tuple[tuple[str, ...], list[int]]:
    labels = {"train": train, "test": train[:1] if test is None else test}
    class_names, found = number_labels(labels, names, lambda split, row: f"row {row} of {split}")
    return class_names, found["train"].tolist()


@pytest.mark.parametrize(
    "labels",
    [
        TWELVE,
        list(range(12)),
        [f"{label}.0" for label in TWELVE],
        [f"+{label}" for label in TWELVE],
        [f"{label:0>4}" for label in TWELVE],
        ["-0", *TWELVE[1:]],
    ],
)
def test_number_labels_whole_numbers_in_any_spelling_keep_their_values(labels: list[Label]) -> None:
    assert number(labels) == (tuple(TWELVE), list(range(12)))


@pytest.mark.parametrize("names", [None, ["ant", "bee", *TWELVE[2:]]])
@pytest.mark.parametrize("wrong", [-1, "-1", "-1.0", "-00"])
def test_number_labels_negative_label_names_its_row_and_value(
    wrong: Label, names: list[str] | None
) -> None:
    if wrong == "-00":
        assert number([*range(12), wrong], names=names)[1][-1] == 0
        return
    with pytest.raises(DatasetError, match=r"row 12 of train: the label -1 is negative"):
        number([*range(12), wrong], names=names)
    with pytest.raises(DatasetError, match=r"(?s)row 1 of test: .*fix: .*dataset\.test"):
        number(list(range(12)), [0, wrong], names)


@pytest.mark.parametrize(
    ("train", "test", "told"),
    [
        ([*TWELVE, "cat"], ["0"], "row 12 of train: the label cat is a name"),
        ([*TWELVE, "1.5"], ["0"], r"row 12 of train: the label 1\.5 is a name"),
        ([*TWELVE, ""], ["0"], "row 12 of train: the label  is a name"),
        (["cat", "dog", "7", "emu"], ["cat"], "row 2 of train: the label 7 is a number"),
        (TWELVE, ["0", "cat"], "row 1 of test: the label cat is a name"),
        (["cat", "dog"], ["dog", "1"], "row 1 of test: the label 1 is a number"),
        ([*TWELVE, str(2**64 - 1)], ["0"], "row 12 of train: the label 18,446,.* is too large"),
    ],
)
def test_number_labels_mixture_names_the_first_label_that_does_not_fit(
    train: list[Label], test: list[Label], told: str
) -> None:
    with pytest.raises(DatasetError, match=told):
        number(train, test)


def test_number_labels_beyond_the_known_classes_names_its_row() -> None:
    with pytest.raises(
        DatasetError, match="row 3 of train: the label 3 is not among the 3 classes"
    ):
        number([0, 1, 2, 3], names=["ant", "bee", "cat"])
    with pytest.raises(DatasetError, match="row 1 of test: the label 4 is not among the 3 classes"):
        number([0, 1, 2], [1, 4])


def test_number_labels_mixture_that_class_names_lists_is_names() -> None:
    assert number(["7", "cat", "7"], ["cat"], ["cat", "7"]) == (("cat", "7"), [1, 0, 1])
