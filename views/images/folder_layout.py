"""Split an image folder into training and test images, and number its classes."""

from __future__ import annotations

import hashlib
import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from teach_once.runtime.command.program import interpreter
from teach_once.runtime.safe.text import one_line
from teach_once.views.images.labels import read_class_names
from teach_once.views.images.listing import (
    IMAGE_SUFFIXES,
    Listing,
    describe_left_out,
    is_hidden,
    listing_of,
    unlabeled_listing,
)
from teach_once.views.splits import DatasetError, Ids

TEST_FOLDERS = ("test", "val", "valid", "validation")
_ORDER_SHOWN = 5
_NAMED = 5


@dataclass(frozen=True)
class FolderLayout:
    """Keys of a config's `dataset` that split a folder and order its classes.

    They are the folder of test images, or the fraction and seed that choose them, and the file with
    the order of the classes.
    """

    test: str | None = None
    class_names: str | None = None
    test_fraction: float = 0.0
    test_seed: int = 0


@dataclass(frozen=True, eq=False)
class ListedSplit:
    """Some images of a listing; `ids` (N,) are ascending."""

    listing: Listing
    ids: Ids


@dataclass(frozen=True, eq=False)
class FolderSplits:
    """Both splits, hints for the user, and the hint on class order; see `ImageSource`."""

    train: ListedSplit
    test: ListedSplit
    hints: tuple[str, ...]
    order_hint: str


def find_splits(root: Path, layout: FolderLayout, kept_in: Path | None) -> FolderSplits:
    """List the folders of both splits. Raises DatasetError if there are no usable images."""
    if not root.is_dir():
        raise DatasetError(
            f"dataset.root: folder {root} not found",
            fix=f"put the images into {root}/train/CLASS and {root}/val/CLASS, or set "
            "dataset.root=FOLDER",
        )
    train_dir, test_dir = _folders_of(root, layout)
    train = listing_of(train_dir, None, kept_in)
    _require_images(train, np.arange(len(train)), "has no images")
    if layout.class_names is not None:
        names = read_class_names(root / layout.class_names)
        train = _reordered(train, names, root / layout.class_names)
    hint = "" if layout.class_names else _order_hint(train.class_names, train_dir)
    listings = [train]
    if test_dir is None:
        splits = _held_out(train, layout)
    else:
        in_text_order = tuple(sorted(train.class_names))
        test = listing_of(test_dir, in_text_order, kept_in)
        if not len(test):
            raise DatasetError(f"{test_dir} has no images", fix=_other_test(root, test_dir))
        test = _reordered(test, train.class_names, test_dir)
        listings.append(test)
        splits = _whole(train), _whole(test)
    notes = [describe_left_out(each.folder, each.left_out) for each in listings]
    return FolderSplits(*splits, tuple(filter(None, notes)), hint)


def list_labeled(train_dir: Path, test_dir: Path, kept_in: Path | None) -> FolderSplits:
    """List two folders of class folders, of which the second has no other classes.

    Raises DatasetError if one has no images, or fewer than two classes.
    """
    train = listing_of(train_dir, None, kept_in)
    _require_images(train, np.arange(len(train)), "has no images")
    test = listing_of(test_dir, train.class_names, kept_in)
    _require_images(test, np.arange(len(test)), "has no images")
    notes = [describe_left_out(each.folder, each.left_out) for each in (train, test)]
    return FolderSplits(_whole(train), _whole(test), tuple(filter(None, notes)), "")


_LEAST_HELD, _MOST_HELD, _ENOUGH_HELD = 0.02, 0.1, 100  # fractions, and a number of images


def split_unlabeled(
    root: Path, holdout_fraction: float | None, kept_in: Path | None
) -> FolderSplits:
    """List all images below `root`, and hold out a part of them, at least one, for evaluation.

    An image is held out by a hash of its path, so that new files rarely change old choices.
    holdout_fraction: None: 2 %, or as many as give 100 images, but at most 10 %. Raises
    DatasetError if there are fewer than two images.
    """
    if not root.is_dir():
        raise DatasetError(f"dataset.root: folder {root} not found")
    found = unlabeled_listing(root, kept_in)
    note = describe_left_out(root, found.left_out)
    if len(found) < 2:
        count = "only one image" if len(found) else f"no images ({', '.join(IMAGE_SUFFIXES)})"
        raise DatasetError(
            "\n  ".join(filter(None, [f"dataset.root: {root} has {count}", note])),
            fix="set dataset.root to a folder with at least two images: one is held out",
        )
    is_held = choose_held_out(_names_of(found), len(found), holdout_fraction)
    train, test = (ListedSplit(found, np.flatnonzero(some)) for some in (~is_held, is_held))
    return FolderSplits(train, test, (note,) if note else (), "")


def choose_held_out(names: Iterable[str], count: int, fraction: float | None) -> NDArray[np.bool_]:
    """Choose images by a hash of their `count` different names, at least one and not all.

    fraction: None: see `split_unlabeled`. Returns (count,) bool: True for held-out images.
    """
    if fraction is None:
        fraction = max(_LEAST_HELD, min(_ENOUGH_HELD / count, _MOST_HELD))
    keys = _name_hashes(names, 0)
    is_held = keys < np.uint64(int(fraction * 2.0**64))
    is_held[np.argmin(keys)], is_held[np.argmax(keys)] = True, False
    return is_held


def _whole(listing: Listing) -> ListedSplit:
    return ListedSplit(listing, np.arange(len(listing)))


def _folders_of(root: Path, layout: FolderLayout) -> tuple[Path, Path | None]:
    """Return the folder of training images, and the folder of test images or None."""
    train_dir = root / "train"
    wanted = TEST_FOLDERS if layout.test is None else (layout.test,)
    test_dir = next((root / name for name in wanted if (root / name).is_dir()), None)
    if not train_dir.is_dir():
        if layout.test_fraction:
            return root, None
        raise DatasetError(
            f"dataset.root: {root} has no folder train/ with one folder per class",
            fix="set dataset.test_fraction=0.2 to hold out a fifth of its images for testing"
            if len(_folders_in(root)) > 1
            else None,
        )
    if layout.test_fraction:
        if test_dir is not None:
            raise DatasetError(
                f"dataset.test_fraction chooses test images, but the folder {test_dir} exists",
                fix="set dataset.test_fraction=0",
            )
        return train_dir, None
    if test_dir is None:
        others = [name for name in _folders_in(root) if name != "train"]
        raise DatasetError(
            f"dataset.root: {root} has no folder {_alternatives(wanted)} of test images"
            + (f"; it has {one_line(', '.join(others[:_NAMED]))}" if others else ""),
            fix=f"set dataset.test={shlex.quote(others[0])}"
            if len(others) == 1
            else "set dataset.test=FOLDER, or dataset.test_fraction=0.2 to hold out a fifth",
        )
    if layout.test is None and not _folders_in(test_dir):
        other = _other_test(root, test_dir)
        raise DatasetError(f"{test_dir} has no class folders and therefore no labels", fix=other)
    return train_dir, test_dir


def _alternatives(names: Sequence[str]) -> str:
    *most, last = (f"{name}/" for name in names)
    return f"{', '.join(most)} or {last}" if most else last


def _other_test(root: Path, test_dir: Path) -> str:
    """Return the fix for test images that cannot be used."""
    others = (name for name in TEST_FOLDERS if root / name != test_dir)
    other = next((name for name in others if _folders_in(root / name)), "FOLDER")
    return f"set dataset.test={other}"


def _folders_in(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    return sorted(e.name for e in folder.iterdir() if e.is_dir() and not is_hidden(e.name))


def _require_images(listing: Listing, ids: Ids, problem: str) -> None:
    """Raise DatasetError for the first class without an image."""
    assert listing.labels is not None
    counts = np.bincount(listing.labels[ids], minlength=len(listing.class_names))
    for name in np.array(listing.class_names)[counts == 0][:1]:
        raise DatasetError(f"{listing.folder / name} {problem} ({', '.join(IMAGE_SUFFIXES)})")


def _held_out(train: Listing, layout: FolderLayout) -> tuple[ListedSplit, ListedSplit]:
    """Choose test images by a hash of each name, so that new files do not change old choices."""
    keys = _name_hashes(_names_of(train), layout.test_seed)
    is_test = keys < np.uint64(int(layout.test_fraction * 2.0**64))
    rest, held = np.flatnonzero(~is_test), np.flatnonzero(is_test)
    if not len(held):
        raise DatasetError(
            f"dataset.test_fraction {layout.test_fraction} holds out no image of {len(train):,}",
            fix="set dataset.test_fraction=0.2",
        )
    _require_images(train, rest, "has no images left to train on; lower dataset.test_fraction")
    return ListedSplit(train, rest), ListedSplit(train, held)


def _names_of(listing: Listing) -> Iterable[str]:
    return listing.relative_names(np.arange(len(listing)))


def _name_hashes(names: Iterable[str], seed: int) -> NDArray[np.uint64]:
    """Return a keyed hash of the name of each image, (N,) uint64."""
    key = seed.to_bytes(4, "little")
    words = [
        hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8, key=key).digest()
        for name in names
    ]
    return np.frombuffer(b"".join(words), dtype="<u8")


def _reordered(listing: Listing, names: Sequence[str], owner: Path) -> Listing:
    """Return the listing with classes numbered in the order of `names`; images keep their order."""
    if len(set(names)) < len(names) or set(names) != set(listing.class_names):
        missing = sorted(set(listing.class_names) - set(names))
        unknown = sorted(set(names) - set(listing.class_names))
        wrong = [
            *([f"it lacks {_some(missing)}"] if missing else []),
            *([f"folder {_some(unknown)} not found"] if unknown else []),
        ] or ["duplicate name"]
        raise DatasetError(
            f"dataset.class_names: {one_line(owner)} does not list the {len(listing.class_names)} "
            f"folders of {one_line(listing.folder)}: {'; '.join(wrong)}",
            fix="write one folder name per line",
        )
    assert listing.labels is not None
    number_of = {name: number for number, name in enumerate(names)}
    numbers = np.array([number_of[name] for name in listing.class_names], dtype=np.int64)
    return replace(listing, class_names=tuple(names), labels=numbers[listing.labels])


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return one_line(", ".join(names[:_NAMED])) + more


# `ls -v` is case-sensitive and so has another order. This key is the same as in `_natural_key`.
_LIST_IN_NATURAL_ORDER = (
    "import os, re, sys; key = lambda n: [(0, int(part), '') if part.isdigit() else (1, 0, part) "
    "for part in re.split('([0-9]+)', n.lower())]; "
    "print(*sorted(os.listdir(sys.argv[1]), key=key), sep=chr(10))"
)


def _order_hint(names: Sequence[str], folder: Path) -> str:
    natural = sorted(names, key=_natural_key)
    if natural == list(names):
        return ""
    file = shlex.quote(str(folder.parent / "classes.txt"))
    list_classes = shlex.join([interpreter(), "-c", _LIST_IN_NATURAL_ORDER, str(folder)])
    ours, theirs = (one_line(", ".join(each[:_ORDER_SHOWN])) for each in (names, natural))
    return (
        f"hint: classes are numbered in alphabetical order ({ours}, ...); timm numbers them "
        f"{theirs}, .... If timm's scripts trained the teacher, list its order: "
        f"{list_classes} > {file}, and set dataset.class_names=classes.txt"
    )


def _natural_key(name: str) -> list[tuple[int, int, str]]:
    """Return timm's sort key for class folders: digits by value, letters without case."""
    parts = re.split(r"([0-9]+)", name.lower())
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in parts]
