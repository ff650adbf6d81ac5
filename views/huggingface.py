"""Tables of the Hugging Face `datasets` package, with a column of images; see `views.pack`.

The package is needed for packing alone. Its columns hold the images' own bytes; tables that name
files somewhere else are refused.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from configs.schema import HuggingFace
from runtime.text import one_line
from views.encoded import EncodedSource, EncodedSplit
from views.labels import Label, check_label, number_labels
from views.splits import DatasetError, Ids
from views.tables import open_tables

_ROWS_AT_ONCE = 1000
_TEST_SPLITS = ("test", "validation")


def hugging_face(config: HuggingFace) -> EncodedSource:
    """The image files in a table. Raises DatasetError."""
    tables = _tables_of(config)
    class_names = getattr(tables["train"].features[config.label], "names", None)

    def name_of(split: str, row: int) -> str:
        return f"row {row} of {split} of {one_line(config.path)}"

    labels = {
        split: _labels_of(table, config.label, functools.partial(name_of, split))
        for split, table in tables.items()
    }
    names, numbers = number_labels(labels, class_names, name_of)
    return EncodedSource(
        config.type,
        names,
        _encoded(tables["train"], config, "train", numbers["train"]),
        _encoded(tables["test"], config, "test", numbers["test"]),
    )


def _encoded(table: Any, config: HuggingFace, split: str, labels: Ids) -> EncodedSplit:
    from datasets import Image

    images = table.select_columns([config.image]).cast_column(config.image, Image(decode=False))

    def name_of(row: int) -> str:
        return f"row {row} of {split} of {one_line(config.path)}"

    def read(row: int) -> bytes:
        image = images[row][config.image]
        if image is None:
            raise DatasetError(f"{name_of(row)} has no image", fix="remove the row from the table")
        content = image["bytes"]
        if content is None:
            raise DatasetError(
                f"{name_of(row)} names a file instead of holding the image",
                fix="write the table with save_to_disk, which takes the images into it",
            )
        return bytes(content)

    sizes = [
        len((image or {}).get("bytes") or b"")
        for batch in images.iter(_ROWS_AT_ONCE)
        for image in batch[config.image]
    ]
    return EncodedSplit(labels, [f"{row}" for row in range(len(labels))], sizes, read, name_of)


def _labels_of(table: Any, column: str, name_of: Callable[[int], str]) -> list[Label]:
    found = table.with_format(None)[column][:]
    return [check_label(label, name_of(row)) for row, label in enumerate(found)]


def _tables_of(config: HuggingFace) -> dict[str, Any]:
    """The training and the test table, which have both columns."""
    every = open_tables(config.path, config.subset)
    wanted = {"train": [config.train], "test": [config.test] if config.test else [*_TEST_SPLITS]}
    tables = {}
    for split, names in wanted.items():
        name = next((name for name in names if name in every), None)
        if name is None:
            raise DatasetError(
                f"{config.path} has no split {' or '.join(names)}; it has "
                f"{one_line(', '.join(map(str, every)))}",
                fix=f"set dataset.{split}=NAME",
            )
        tables[split] = every[name]
        _check_columns(every[name], config)
    return tables


def _check_columns(table: Any, config: HuggingFace) -> None:
    from datasets import Image

    for key in ("image", "label"):
        column = getattr(config, key)
        if column not in table.features:
            raise DatasetError(
                f"{config.path} has no column {column!r}; it has "
                f"{one_line(', '.join(table.features))}",
                fix=f"set dataset.{key}=COLUMN",
            )
    if not isinstance(table.features[config.image], Image):
        raise DatasetError(f"{config.path}: the column {config.image!r} does not hold images")
