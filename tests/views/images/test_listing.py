"""The index of an image folder is used only while the folder is unchanged."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from teach_once.configs.schema import ImageFolder, Normalization
from teach_once.runtime.safe.safe_read import BadFile
from teach_once.views.datasets import DatasetError, load_dataset
from teach_once.views.images import listing as listing_module
from teach_once.views.images.listing import (
    INDEX_FOLDER,
    Listing,
    forget_listings,
    listing_of,
)

GRAY = Normalization(mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for split, count in (("train", 3), ("test", 1)):
        for label, name in enumerate(("cat", "dog")):
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = np.full((4, 4, 3), 40 * index + label, dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.png")
    for folder, _, _ in os.walk(tmp_path / "data"):
        age(Path(folder))
    return tmp_path / "data"


def age(folder: Path, seconds: float = 60.0) -> None:
    """Make the folder one that has not changed lately."""
    changed = os.stat(folder).st_mtime - seconds
    os.utime(folder, (changed, changed))


def names(root: Path, kept_in: Path | None) -> list[str]:
    listing = listing_of(root / "train", None, kept_in)
    return list(listing.relative_names(np.arange(len(listing))))


def scanned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Notes each folder that is listed from now on."""
    found: list[str] = []
    scandir = os.scandir

    def noted(folder):
        found.append(str(folder))
        return scandir(folder)

    monkeypatch.setattr(listing_module.os, "scandir", noted)
    return found


def test_listings_in_a_linked_folder_are_refused_and_its_files_stay(tmp_path: Path) -> None:
    victim, caches = tmp_path / "victim", tmp_path / "caches"
    for folder in (victim, caches):
        folder.mkdir()
    (victim / "letter.txt").write_text("mine")
    (victim / "0123abcd.index").write_text("mine, too")
    (caches / INDEX_FOLDER).symlink_to(victim)
    with pytest.raises(BadFile, match=r"\.listings is a symbolic link, expected a folder"):
        forget_listings(caches)
    assert len(list(victim.iterdir())) == 2


def test_a_folder_is_listed_once_and_the_same_afterwards(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    caches = tmp_path / "caches"
    first = names(root, caches)
    asked = scanned(monkeypatch)
    assert (
        names(root, caches) == first == [f"{c}/{i}.png" for c in ("cat", "dog") for i in range(3)]
    )
    assert asked == []
    assert names(root, None) == first
    assert len(asked) == 3


def test_the_dataset_is_the_same_with_and_without_an_index(root: Path, tmp_path: Path) -> None:
    config = ImageFolder(type="imagefolder", root=str(root), normalization=GRAY)
    plain = load_dataset(config)
    for _ in range(2):
        indexed = load_dataset(config, tmp_path / "caches")
        assert (indexed.digest, indexed.tested_digest) == (plain.digest, plain.tested_digest)
        assert (indexed.train.images == plain.train.images).all()
        assert indexed.train.name_of(4) == plain.train.name_of(4) == str(root / "train/dog/1.png")
        assert list(indexed.train.paths or []) == list(plain.train.paths or [])


def test_every_change_of_the_tree_is_seen(root: Path, tmp_path: Path) -> None:
    caches = tmp_path / "caches"
    known = [names(root, caches)]
    for change in (
        lambda: (root / "train/cat/2.png").unlink(),
        lambda: (root / "train/dog/0.png").rename(root / "train/dog/9.png"),
        lambda: (root / "train/dog/0.png").symlink_to("9.png"),
        lambda: os.mkdir(root / "train/emu"),
        lambda: (root / "train/cat").rename(root / "train/ape"),
    ):
        change()
        changed = names(root, None)
        assert names(root, caches) == changed
        known.append(changed)
        for folder, _, _ in os.walk(root):
            age(Path(folder))
        assert names(root, caches) == changed  # keeps an index of this tree
    assert known[3] == known[4]  # an empty class
    assert len({*map(tuple, known)}) == len(known) - 1


def test_a_folder_that_has_just_changed_is_not_kept(root: Path, tmp_path: Path) -> None:
    os.utime(root / "train/cat")
    names(root, tmp_path / "caches")
    assert not list((tmp_path / "caches").rglob("*.index"))


def test_an_index_that_is_damaged_anywhere_is_not_used(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    caches = tmp_path / "caches"
    expected = names(root, caches)
    (index,) = (caches / INDEX_FOLDER).glob("*.index")
    whole = index.read_bytes()
    asked = scanned(monkeypatch)
    for position in range(0, len(whole), 5):
        flipped = bytearray(whole)
        flipped[position] ^= 4
        index.write_bytes(flipped)
        assert names(root, caches) == expected
    assert asked


def test_an_index_of_another_folder_is_not_used(root: Path, tmp_path: Path) -> None:
    caches = tmp_path / "caches"
    names(root, caches)
    (index,) = (caches / INDEX_FOLDER).glob("*.index")
    content = index.read_bytes()
    moved = root.rename(tmp_path / "elsewhere")
    assert names(moved, caches)
    for other in (caches / INDEX_FOLDER).glob("*.index"):
        other.write_bytes(content)
    assert listing_of(moved / "train", None, caches).path(0).is_file()


def test_listings_are_forgotten_where_asked_to(root: Path, tmp_path: Path) -> None:
    names(root, tmp_path / "caches")
    forget_listings(tmp_path / "caches")
    assert not os.listdir(tmp_path / "caches" / INDEX_FOLDER)


def test_what_is_no_image_file_is_named(root: Path) -> None:
    strange = root / "train/cat/strange.png"
    for make, what in (
        (lambda: os.mkfifo(strange), "not a regular file"),
        (lambda: strange.mkdir(), "not a regular file"),
        (lambda: strange.symlink_to("/dev/zero"), "not a regular file"),
        (lambda: strange.symlink_to("nowhere.png"), "No such file"),
        (lambda: strange.symlink_to("strange.png"), "symbolic links"),
    ):
        make()
        with pytest.raises(DatasetError, match=what) as caught:
            names(root, None)
        assert "strange.png" in str(caught.value)
        strange.rmdir() if strange.is_dir() else strange.unlink()


def test_a_link_to_a_folder_around_it_is_named(root: Path) -> None:
    (root / "train/zoo").symlink_to(root)
    with pytest.raises(DatasetError, match="zoo is a symbolic link to a parent folder"):
        names(root, None)


@pytest.mark.parametrize("name", [b"caf\xe9", b"a\x1b[31m", b"a\nb", "a\u202eb".encode()])
def test_a_class_has_a_name_that_can_be_printed_and_stored(root: Path, name: bytes) -> None:
    os.mkdir(os.fsencode(root / "train") + b"/" + name)
    with pytest.raises(DatasetError, match="must be printable UTF-8 text") as caught:
        names(root, None)
    assert str(caught.value).replace("\n", "").isprintable()


def test_a_class_folder_that_is_a_broken_link_is_not_left_out_in_silence(root: Path) -> None:
    (root / "train/emu").symlink_to(root / "train/emu")
    with pytest.raises(DatasetError, match="emu is a broken symbolic link"):
        names(root, None)
    (root / "train/emu").unlink()
    (root / "train/emu").symlink_to(root / "train/dog")
    assert len(names(root, None)) == 9


def test_file_names_of_any_bytes_are_found_again(root: Path, tmp_path: Path) -> None:
    strange = os.fsencode(root / "train/cat") + b"/\xff\n.PNG"
    os.rename(root / "train/cat/0.png", strange)
    age(root / "train/cat")
    for _ in range(2):
        listing = listing_of(root / "train", None, tmp_path / "caches")
        assert sum(os.fsencode(listing.path(i)) == strange for i in range(len(listing))) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"class_names": ("cat", "emu")},
        {"labels": np.array([0, 1, 1])},
        {"sizes": np.array([5, 6, 8])},
        {"names": b"abcdeg"},
        {"ends": np.array([1, 4, 6])},
    ],
    ids=lambda change: next(iter(change)),
)
def test_fingerprint_of_a_listing_with_another_field_differs(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    listing = Listing(
        tmp_path,
        ("cat", "dog"),
        np.array([5, 6, 7]),
        np.array([0, 0, 1]),
        b"abcdef",
        np.array([1, 3, 6]),
        (("", 1),),
        {},
    )
    ids = np.array([0, 2])
    found = listing.fingerprint(ids)
    assert dataclasses.replace(listing, folders=(("", 2),)).fingerprint(ids) == found
    assert dataclasses.replace(listing, **change).fingerprint(ids) != found
    assert listing.fingerprint(np.array([1, 2])) != found
