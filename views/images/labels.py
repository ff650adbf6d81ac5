"""Labels of tar shards and tables: check whole numbers or names and number the classes.

Whole numbers are numbers in any spelling (`7`, `7.0`, `007`, `-1`). A single label of the other
kind would silently renumber every class, so it is an error that names the sample.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from teach_once.configs.schema import HuggingFace, WebDataset
from teach_once.runtime.safe.safe_read import BadFile, read_bounded
from teach_once.runtime.safe.text import one_line
from teach_once.views.splits import DatasetError, Ids, check_class_name

OR_NO_LABELS = "or dataset.label=null to use the images without labels"

Label = int | str
NameOf = Callable[[str, int], str]

_MOST_CLASSES = 2**20
_MOST_NAMES_BYTES = 2**24
_WHOLE = re.compile(r"([+-]?[0-9]+)(\.0*)?")
_LONGEST_NUMBER = 30  # digits
_NO_LABEL = "leave out the samples without a label, or set dataset.test to a split that has labels"


def check_label_keys(config: WebDataset | HuggingFace) -> None:
    """Raise DatasetError if a key of the config contradicts `label`."""
    if config.label is not None:
        if config.holdout_fraction is not None:
            raise DatasetError(
                "dataset.holdout_fraction is set, but holds out images without labels only",
                fix=f"set dataset.holdout_fraction=null, {OR_NO_LABELS}",
            )
        return
    fixes = {"class_names": "", "max_per_class": " and dataset.max_samples=NUMBER"}
    for key, instead in fixes.items():
        if getattr(config, key, None) is not None:
            raise DatasetError(
                f"dataset.{key} is set, but the images have no labels: dataset.label is null",
                fix=f"set dataset.{key}=null{instead}",
            )


def check_label(value: object, name: str) -> Label:
    """Return a label from a table or a JSON file. Raises DatasetError with `name` if it is invalid.

    Decimal numbers are labels if they are whole.
    """
    if value is None:
        raise DatasetError(f"{name} has no label", fix=_NO_LABEL)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise DatasetError(
            f"{name}: the label {one_line(value)} is neither a whole number nor a name"
        )
    return value


def number_labels(
    labels: Mapping[str, Sequence[Label]], class_names: Sequence[str] | None, name_of: NameOf
) -> tuple[tuple[str, ...], dict[str, Ids]]:
    """Return the names of the classes, and each split's labels as numbers (N,) int64.

    labels: per split, numbers (also as text) or names. class_names: names in order, if known;
    otherwise numbers are used as names, and names are numbered in sorted order. name_of: returns a
    sample's name for messages from its split and number. Raises DatasetError for an invalid label.
    """
    known = None if class_names is None else set(class_names)
    are_numbers = _are_numbers(labels["train"], known)
    values: dict[str, list[Label]] = {}
    for split, some in labels.items():
        _check_kind(some, are_numbers, known, partial(name_of, split))
        values[split] = [_value(label) if are_numbers else str(label) for label in some]
    if class_names is None:
        class_names = _names_of(values["train"], are_numbers)
    for name in class_names:
        check_class_name(name, f"class {one_line(name)}")
    number_of: dict[Label, int] = {name: number for number, name in enumerate(class_names)}
    if are_numbers:
        number_of = {number: number for number in range(len(class_names))}
    found = {}
    for split, those in values.items():
        unknown = next((row for row, value in enumerate(those) if value not in number_of), None)
        if unknown is not None:
            raise DatasetError(
                f"{name_of(split, unknown)}: the label {one_line(those[unknown])} is not among the "
                f"{len(class_names):,} classes of the training images"
            )
        found[split] = np.array([number_of[value] for value in those], dtype=np.int64)
    return tuple(class_names), found


def read_class_names(file: Path) -> list[str]:
    """Return the lines of the file in `dataset.class_names`. Raises DatasetError on failure."""
    try:
        return read_bounded(file, _MOST_NAMES_BYTES, follow=True).decode("utf-8").splitlines()
    except (BadFile, OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"dataset.class_names: {one_line(error)}") from None


def _are_numbers(labels: Sequence[Label], known: set[str] | None) -> bool:
    """Return True if most labels are numbers; with equally many, the first label decides."""
    count = sum(map(_is_number, labels))
    if known is not None and count < len(labels) and known.issuperset(map(str, labels)):
        return False  # a number in the list of names is a name
    return 2 * count > len(labels) or (2 * count == len(labels) and _is_number(labels[0]))


def _check_kind(
    labels: Sequence[Label],
    are_numbers: bool,
    known: set[str] | None,
    name_of: Callable[[int], str],
) -> None:
    """Raise DatasetError for the first label that is of another kind or negative."""
    for row, label in enumerate(labels):
        if _is_number(label) != are_numbers and (are_numbers or str(label) not in (known or ())):
            kinds = ("name", "numbers") if are_numbers else ("number", "names")
            raise DatasetError(
                f"{name_of(row)}: the label {one_line(label)} is a {kinds[0]}, but most labels are "
                f"{kinds[1]}",
                fix="write all labels as whole numbers from 0, or all as names",
            )
        if are_numbers and (value := _value(label)) < 0:
            raise DatasetError(
                f"{name_of(row)}: the label {value} is negative, which usually means that the "
                f"sample has no label",
                fix=_NO_LABEL,
            )
        if are_numbers and value >= _MOST_CLASSES:
            raise DatasetError(
                f"{name_of(row)}: the label {value:,} is too large, expected less than "
                f"{_MOST_CLASSES:,}",
                fix="number the classes from 0, or use names as labels",
            )


def _names_of(values: Sequence[Label], are_numbers: bool) -> list[str]:
    if are_numbers:
        return list(map(str, range(max(map(int, values)) + 1)))
    return sorted(set(map(str, values)))


def _is_number(label: Label) -> bool:
    return isinstance(label, int) or _WHOLE.fullmatch(label) is not None


def _value(label: Label) -> int:
    if isinstance(label, int):
        return label
    match = _WHOLE.fullmatch(label)
    assert match is not None
    digits = match[1]
    return int(digits) if len(digits) <= _LONGEST_NUMBER else 10**_LONGEST_NUMBER
