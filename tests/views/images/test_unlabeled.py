"""Images without labels: all that are in a folder, at any depth, in the order of their paths."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from teach_once.configs.schema import Images, Normalization, Packed
from teach_once.views.command import cli
from teach_once.views.datasets import Dataset, DatasetError, load_dataset
from teach_once.views.images.listing import INDEX_FOLDER, listing_of, unlabeled_listing
from tests.support.datasets.other_formats import picture, write_config

RGB = Normalization(mean=(0.5,) * 3, std=(0.5,) * 3)


def opened(root: Path, kept_in: Path | None = None, **options: object) -> Dataset:
    config = Images(type="images", root=str(root), normalization=RGB, **options)
    return load_dataset(config, kept_in)


def write_photos(root: Path, num_images: int) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for number in range(num_images):
        (root / f"{number:03d}.png").write_bytes(picture(number))
    return root


def names_of(dataset: Dataset) -> list[str]:
    """Names of all images, relative to the root, in the order of the dataset's two splits."""
    splits = (dataset.train, dataset.test)
    return [
        path.relative_to(split.folder).as_posix()
        for split in splits
        if split.paths is not None and split.folder is not None
        for path in split.paths
    ]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Images at three depths, whose order by bytes is not the order of a walk."""
    root = tmp_path / "photos"
    for number, name in enumerate(("b/x.png", "b-1/y.png", "a.png", "b/c/z.PNG", "é.png", "b.png")):
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(picture(number))
    return root


def test_images_of_any_depth_are_in_the_order_of_the_bytes_of_their_paths(photos: Path) -> None:
    data = opened(photos)
    expected = ["a.png", "b-1/y.png", "b.png", "b/c/z.PNG", "b/x.png", "é.png"]
    assert sorted(names_of(data), key=str.encode) == expected
    train = names_of(data)[: len(data.train)]
    assert train == [name for name in expected if name in train]
    assert data.class_names is None
    assert data.train.labels is None
    assert data.num_classes == 0
    assert data.train.label_values.tolist() == [-1] * len(data.train)
    assert data.hints == []


def test_hidden_names_other_files_and_links_to_folders_are_skipped_and_counted(
    photos: Path, tmp_path: Path
) -> None:
    before = names_of(opened(photos))
    elsewhere = write_photos(tmp_path / "elsewhere", 2)
    (photos / "link").symlink_to(elsewhere)
    (photos / "b" / "loop").symlink_to(photos)
    write_photos(photos / "__MACOSX", 1)
    (photos / ".hidden.png").write_bytes(picture(9))
    (photos / "notes.txt").touch()
    data = opened(photos)
    assert names_of(data) == before
    (note,) = data.hints
    assert "2 links to folders; 2 hidden" in note
    assert "1 with non-image suffixes (1 .txt)" in note


def test_a_link_to_an_image_is_an_image(photos: Path) -> None:
    (photos / "linked.png").symlink_to(photos / "a.png")
    assert "linked.png" in names_of(opened(photos))


@pytest.mark.parametrize(("count", "told"), [(0, "no images"), (1, "only one image")])
def test_a_folder_with_fewer_than_two_images_is_refused(
    tmp_path: Path, count: int, told: str
) -> None:
    root = write_photos(tmp_path / "few", count)
    (root / "raw.nef").touch()
    with pytest.raises(DatasetError, match=told) as error:
        opened(root)
    assert "1 .nef" in error.value.problem
    with pytest.raises(DatasetError, match="not found"):
        opened(tmp_path / "gone")


@pytest.mark.parametrize(
    ("count", "fraction", "least", "most"),
    [
        (2, None, 1, 1),  # at least one
        (300, None, 15, 50),  # 10 %, as 100 images are more
        (2000, None, 65, 140),  # about 100 images
        (8000, None, 120, 200),  # 2 %, as 100 images are fewer
        (300, 0.5, 110, 190),
    ],
)
def test_a_part_is_held_out_for_evaluation(
    tmp_path: Path, count: int, fraction: float | None, least: int, most: int
) -> None:
    root = tmp_path / "many"
    root.mkdir()
    (root / "000.png").write_bytes(picture(0))
    for number in range(1, count):
        (root / f"{number:03d}.png").symlink_to("000.png")
    data = opened(root, holdout_fraction=fraction)
    assert least <= len(data.test) <= most
    assert len(data.train) + len(data.test) == count


def test_new_images_leave_held_out_ones_held_out(tmp_path: Path) -> None:
    root = write_photos(tmp_path / "photos", 100)
    before = opened(root)
    held = set(names_of(before)[len(before.train) :])
    write_photos(root / "more", 40)
    after = opened(root)
    assert held <= set(names_of(after)[len(after.train) :])
    assert after.digest != before.digest


def test_two_images_are_split_into_one_and_one_whatever_the_fraction(tmp_path: Path) -> None:
    root = write_photos(tmp_path / "photos", 2)
    for fraction in (1e-9, 0.999999):
        data = opened(root, holdout_fraction=fraction)
        assert (len(data.train), len(data.test)) == (1, 1)


def test_the_index_of_a_tree_is_used_until_a_folder_changes(photos: Path, tmp_path: Path) -> None:
    caches = tmp_path / "caches"
    for folder, _, _ in os.walk(photos):
        os.utime(folder, (1, 1))
    first = opened(photos, caches)
    assert list((caches / INDEX_FOLDER).glob("*.index"))
    again = opened(photos, caches)
    assert names_of(again) == names_of(first)
    assert again.digest == first.digest == opened(photos).digest
    assert again.train.labels is None
    (photos / "b" / "c" / "new.png").write_bytes(picture(77))
    assert "b/c/new.png" in names_of(opened(photos, caches))


def test_index_of_a_folder_with_classes_is_not_that_of_the_same_folder_without(
    tmp_path: Path,
) -> None:
    for name in ("cat", "dog"):
        write_photos(tmp_path / "photos" / name, 2)
    for folder, _, _ in os.walk(tmp_path / "photos"):
        os.utime(folder, (1, 1))
    for _ in range(2):  # the second time from both indexes
        with_classes = listing_of(tmp_path / "photos", None, tmp_path / "caches")
        without = unlabeled_listing(tmp_path / "photos", tmp_path / "caches")
        assert with_classes.labels is not None
        assert with_classes.labels.tolist() == [0, 0, 1, 1]
        assert without.labels is None
        every = np.arange(4)
        assert list(without.relative_names(every)) == list(with_classes.relative_names(every))
    assert len(list((tmp_path / "caches" / INDEX_FOLDER).glob("*.index"))) == 2


def test_max_samples_keeps_a_keyed_choice_of_training_images(tmp_path: Path) -> None:
    root = write_photos(tmp_path / "photos", 60)
    whole, some = opened(root), opened(root, max_samples=20)
    fewer = opened(root, max_samples=5)
    of_some = names_of(some)[:20]
    assert len(some.train) == 20
    assert set(names_of(fewer)[:5]) < set(of_some) < set(names_of(whole))
    assert of_some != names_of(whole)[:20]
    assert len(some.test) == len(whole.test)
    assert some.is_reduced
    with pytest.raises(DatasetError, match="no labels") as error:
        opened(root, max_per_class=3)
    assert "dataset.max_samples" in str(error.value)


def test_check_counts_exact_copies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_photos(tmp_path / "data", 8)
    config = write_config(tmp_path / "t.yaml", "images", root="data")
    config.write_text(config.read_text().replace("  packed: packed.json\n", ""))
    assert cli(["check", str(config), "--workers", "0"]) == 0
    assert "exact copies" not in capsys.readouterr().out
    (root / "deep").mkdir()
    for name in ("one.png", "two.png"):
        shutil.copy(root / "000.png", root / "deep" / name)
    assert cli(["check", str(config), "--workers", "2"]) == 0
    assert "; 2 are exact copies of other images" in capsys.readouterr().out


@pytest.mark.parametrize("options", [[], ["--encoded"], ["shards"]])
def test_packed_images_without_labels_are_the_same_dataset(
    tmp_path: Path, options: list[str]
) -> None:
    root = write_photos(tmp_path / "data", 12)
    config = write_config(tmp_path / "t.yaml", "images", root="data")
    config.write_text(config.read_text().replace("  packed: packed.json\n", ""))
    file = tmp_path / ("all.json" if options == ["shards"] else "all.h5")
    options = [option for option in options if option != "shards"]
    chosen = [] if options else ["dataset.max_samples=6"]
    assert cli(["pack", str(config), str(file), *options, *chosen]) == 0
    for limit in (None, 6):
        packed = load_dataset(
            Packed(type="packed", file=str(file), normalization=RGB, max_samples=limit)
        )
        folder = opened(root, max_samples=limit)
        assert packed.class_names is None
        assert packed.train.labels is None
        assert packed.type == "images"
        assert packed.digest == folder.digest
        assert packed.tested_digest == folder.tested_digest
        assert np.array_equal(packed.train.images, folder.train.images)
        assert len(packed.test) == len(folder.test)
