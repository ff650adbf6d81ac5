"""Datasets: digits equal scikit-learn's; folders are read in one fixed order or refused by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from configs.schema import Digits, ImageFolder, Normalisation
from tests.conftest import write_image_folder
from views.datasets import DatasetError, load_dataset

GREY = Normalisation(mean=(0.5,), std=(0.5,))
RGB = Normalisation(mean=(0.5,) * 3, std=(0.5,) * 3)


def folder(root: Path, limit: int | None = None) -> ImageFolder:
    return ImageFolder(type="imagefolder", root=str(root), normalisation=RGB, limit=limit)


def test_digits_are_scikit_learns_own() -> None:
    ours = load_dataset(Digits(type="digits", normalisation=GREY))
    theirs = load_digits()
    images = np.concatenate([ours.train.images, ours.test.images])[..., 0]
    assert (images == theirs.images * 15).all()
    assert (np.concatenate([ours.train.labels, ours.test.labels]) == theirs.target).all()
    assert (len(ours.train), len(ours.test), ours.num_classes) == (1000, 797, 10)


def test_a_limit_keeps_the_first_of_each_class_and_changes_the_digest() -> None:
    whole = load_dataset(Digits(type="digits", normalisation=GREY))
    few = load_dataset(Digits(type="digits", normalisation=GREY, limit=3))
    assert np.bincount(few.train.labels).tolist() == [3] * 10
    assert (few.train.images[0] == whole.train.images[0]).all()
    assert few.digest != whole.digest
    assert len(few.test) == len(whole.test)


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path: Path) -> None:
    write_image_folder(tmp_path)
    data = load_dataset(folder(tmp_path))
    assert data.class_names == ("cat", "dog")
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    expected = np.asarray(Image.open(tmp_path / "train" / "dog" / "01.png"))
    assert (data.train.images[4] == expected).all()
    assert (data.train.read_some(np.array([4]))[0] == expected).all()


def test_val_may_stand_for_test(tmp_path: Path) -> None:
    write_image_folder(tmp_path)
    (tmp_path / "test").rename(tmp_path / "val")
    assert len(load_dataset(folder(tmp_path)).test) == 6


def test_the_digest_notices_a_renamed_a_moved_and_a_changed_file(tmp_path: Path) -> None:
    write_image_folder(tmp_path)
    digests = [load_dataset(folder(tmp_path)).digest]
    file = tmp_path / "train" / "cat" / "00.png"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    digests.append(load_dataset(folder(tmp_path)).digest)
    file.rename(file.with_name("03.png"))
    digests.append(load_dataset(folder(tmp_path)).digest)
    file.with_name("03.png").rename(tmp_path / "train" / "dog" / "03.png")
    digests.append(load_dataset(folder(tmp_path)).digest)
    assert len(set(digests)) == 4


def test_grey_and_palette_images_become_rgb_and_exif_orientation_is_obeyed(tmp_path: Path) -> None:
    write_image_folder(tmp_path)
    grey = Image.fromarray(np.arange(144, dtype=np.uint8).reshape(12, 12))
    grey.save(tmp_path / "train" / "cat" / "00.png")
    turned = Image.Exif()
    turned[0x0112] = 3  # upside down
    grey.save(tmp_path / "train" / "cat" / "01.png", exif=turned)
    images = load_dataset(folder(tmp_path)).train.images
    assert images.shape == (6, 12, 12, 3)
    assert (images[0, ..., 0] == images[0, ..., 2]).all()
    assert (images[1] == images[0, ::-1, ::-1]).all()


def broken(root: Path, mistake: str) -> None:
    write_image_folder(root)
    train = root / "train"
    if mistake == "no root":
        root.rename(root.with_name("elsewhere"))
    elif mistake == "no train":
        train.rename(root / "training")
    elif mistake == "no test":
        (root / "test").rename(root / "testing")
    elif mistake == "one class":
        for file in (train / "dog").iterdir():
            file.unlink()
        (train / "dog").rmdir()
    elif mistake == "empty class":
        for file in (train / "dog").iterdir():
            file.unlink()
    elif mistake == "unknown test class":
        (root / "test" / "dog").rename(root / "test" / "bird")
    elif mistake == "sizes":
        Image.new("RGB", (9, 12)).save(train / "dog" / "01.png")
    elif mistake == "unreadable":
        (train / "dog" / "01.png").write_bytes(b"\x89PNG but no more")


@pytest.mark.parametrize(
    ("mistake", "told"),
    [
        ("no root", "there is no folder"),
        ("no train", "has no folder train/"),
        ("no test", "neither a folder test/ nor a folder val/"),
        ("one class", "at least two classes; found only 'cat'"),
        ("empty class", "dog holds no image"),
        ("unknown test class", "classes that train/ does not: bird"),
        ("sizes", r"is 12x12, .*01\.png is 9x12"),
        ("unreadable", r"cannot read the image .*dog/01\.png"),
    ],
)
def test_a_folder_that_cannot_be_used_is_refused_by_name(
    tmp_path: Path, mistake: str, told: str
) -> None:
    root = tmp_path / "data"
    broken(root, mistake)
    with pytest.raises(DatasetError, match=told):
        _ = load_dataset(folder(root)).train.images
