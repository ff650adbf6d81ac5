"""Tables of the Hugging Face `datasets` package, with a column of images; see `views.packed.write`.

The package is needed for packing only. Columns must contain the images' bytes; tables that name
files elsewhere are rejected. Without labels and a test split, rows are held out by a hash of their
image's path, or of their number if the table has no paths. Paths keep the choice when rows are
reordered or inserted; numbers keep it only when rows are appended.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from teach_once.configs.schema import HuggingFace
from teach_once.runtime.command.program import pip_install
from teach_once.runtime.formats import format_size
from teach_once.runtime.safe.safe_read import BadFile, parse_json, read_bounded
from teach_once.runtime.safe.text import one_line
from teach_once.views.images.encoded import EncodedSource, EncodedSplit, unlabeled_source
from teach_once.views.images.labels import (
    OR_NO_LABELS,
    Label,
    check_label,
    check_label_keys,
    number_labels,
)
from teach_once.views.splits import DatasetError, Ids

MOST_EXPANSION = 16  # bytes that may be written per byte of the table's files
FREE_BYTES = 2**30  # bytes that any table may write
_BATCH_ROWS = 128  # rows of a parquet file in memory
_MOST_JSON_BYTES = 2**26
_HUB = "hf://datasets/"
_DICT, _STATE = "dataset_dict.json", "state.json"  # written by `save_to_disk`


def open_tables(path: str, subset: str | None) -> Any:
    """Return {split: table} of a folder or of a name on the hub.

    Raises DatasetError if it cannot be loaded.
    """
    try:
        import datasets
    except ImportError:
        raise DatasetError(
            "packing a huggingface dataset needs the package datasets",
            fix=pip_install("datasets"),
        ) from None
    try:
        if any((Path(path) / name).is_file() for name in (_DICT, _STATE)):
            _check_saved(Path(path))
            found = datasets.load_from_disk(path)
            return found if isinstance(found, datasets.DatasetDict) else {"train": found}
        return _converted(path, subset)
    except DatasetError:
        raise
    except Exception as error:  # various: no network, unknown name, damaged files
        cause = error.__cause__ or error.__context__
        if isinstance(cause, DatasetError):  # wrapped by the package
            raise cause from None
        raise DatasetError(f"dataset.path: {path} cannot be loaded: {one_line(error)}") from None


def _converted(path: str, subset: str | None) -> Any:
    import datasets

    builder = datasets.load_dataset_builder(path, subset)
    source_bytes = _check_files(path, builder.config.data_files or {})
    if hasattr(builder.config, "batch_size"):
        builder.config.batch_size = _BATCH_ROWS
    with _limited_writing(path, builder, source_bytes):
        builder.download_and_prepare()
    return builder.as_dataset()


def _check_files(path: str, data_files: Any) -> int:
    """Return the size of local files in bytes. Raises DatasetError for a file outside the table."""
    is_local, total = Path(path).is_dir(), 0
    folders = (Path(os.path.abspath(path)), Path(path).resolve())
    for name in (str(name) for names in data_files.values() for name in names):
        if is_local and "://" not in name:
            file = Path(os.path.abspath(name))
            if any(file.is_relative_to(folder) for folder in folders) and file.is_file():
                total += file.stat().st_size
                continue
        elif not is_local and name.startswith(_HUB):
            continue
        raise DatasetError(
            f"dataset.path: {one_line(path)} names a file outside of itself: {one_line(name)}",
            fix=f"remove it from data_files in {one_line(path)}'s README.md",
        )
    return total


@contextmanager
def _limited_writing(path: str, builder: Any, source_bytes: int) -> Iterator[None]:
    """Raise DatasetError if the package writes too much for the size of the table's files."""
    from datasets.arrow_writer import ArrowWriter

    written, plain = 0, ArrowWriter._write_table

    def counted(self: Any, table: Any, *args: Any, **options: Any) -> None:
        nonlocal written
        written += table.nbytes
        downloaded = getattr(getattr(builder, "dl_manager", None), "downloaded_size", 0)
        source = max(source_bytes, downloaded)
        if written > FREE_BYTES + MOST_EXPANSION * source:
            raise DatasetError(
                f"dataset.path: {one_line(path)} has {format_size(source)} of files, but more than "
                f"{format_size(FREE_BYTES + MOST_EXPANSION * source)} of decompressed rows",
                fix="save the table with save_to_disk where it was made, and use that folder",
            )
        plain(self, table, *args, **options)

    ArrowWriter._write_table = counted
    try:
        yield
    finally:
        ArrowWriter._write_table = plain


def _check_saved(folder: Path) -> None:
    """Raise DatasetError if a saved table refers to a file or folder outside its own folder."""
    splits = [""]
    if (folder / _DICT).is_file():
        splits = _plain_names(folder / _DICT, _read(folder / _DICT)["splits"])
    for split in splits:
        file = folder / split / _STATE
        _plain_names(file, [each["filename"] for each in _read(file)["_data_files"]])


def _read(file: Path) -> Any:
    try:
        return parse_json(read_bounded(file, _MOST_JSON_BYTES, follow=True), file)
    except BadFile as error:
        raise DatasetError(f"dataset.path: {error}") from None


def _plain_names(file: Path, names: Any) -> list[str]:
    found = []
    for name in names:
        if not isinstance(name, str) or name in ("", ".", "..") or "/" in name or "\\" in name:
            raise DatasetError(f"{one_line(file)} names a file outside of its folder: {name!r}")
        found.append(name)
    return found


_ROWS_AT_ONCE = 1000
_TEST_SPLITS = ("test", "validation")


def hugging_face(config: HuggingFace) -> EncodedSource:
    """Open the image files in a table. Raises DatasetError if the table cannot be used."""
    check_label_keys(config)
    tables = _tables_of(config)
    if config.label is None:
        splits = {split: _encoded(table, config, split, None) for split, table in tables.items()}
        return unlabeled_source(config, splits["train"], splits.get("test"))
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


def _encoded(table: Any, config: HuggingFace, split: str, labels: Ids | None) -> EncodedSplit:
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
                f"{name_of(row)} contains a path instead of an image",
                fix="write the table with save_to_disk, which includes the images",
            )
        return bytes(content)

    sizes, keys = list[int](), list[str]()
    for batch in images.iter(_ROWS_AT_ONCE):
        for image in batch[config.image]:
            keys.append((image or {}).get("path") or f"{len(keys)}")
            sizes.append(len((image or {}).get("bytes") or b""))
    names = [f"{row}" for row in range(len(sizes))]
    return EncodedSplit(labels, names, sizes, read, name_of, keys)


def _labels_of(table: Any, column: str, name_of: Callable[[int], str]) -> list[Label]:
    found = table.with_format(None)[column][:]
    return [check_label(label, name_of(row)) for row, label in enumerate(found)]


def _tables_of(config: HuggingFace) -> dict[str, Any]:
    """Return the training and test tables, checked to have both columns.

    Images without labels need no test table.
    """
    every = open_tables(config.path, config.subset)
    wanted = {"train": [config.train], "test": [config.test] if config.test else [*_TEST_SPLITS]}
    tables = {}
    for split, names in wanted.items():
        name = next((name for name in names if name in every), None)
        if name is None:
            if split == "test" and config.label is None and not config.test:
                continue
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

    fixes = {
        "image": "set dataset.image=COLUMN",
        "label": f"set dataset.label=COLUMN, {OR_NO_LABELS}",
    }
    for key, fix in fixes.items():
        column = getattr(config, key)
        if column is not None and column not in table.features:
            raise DatasetError(
                f"{config.path} has no column {column!r}; it has "
                f"{one_line(', '.join(table.features))}",
                fix=fix,
            )
    if not isinstance(table.features[config.image], Image):
        raise DatasetError(f"{config.path}: the column {config.image!r} has no images")
