"""Tar shards and tables without labels: what is held out, how they are packed, what is refused."""

from __future__ import annotations

import io
import re
import tarfile
from pathlib import Path

import datasets
import pytest

from teach_once.configs.load import load_teacher
from teach_once.views.command import cli
from teach_once.views.datasets import Dataset, DatasetError, load_dataset
from tests.support.datasets.other_formats import (
    numbers_of,
    pack_again,
    picture,
    write_config,
    write_unlabeled,
)

FORMATS = ["webdataset", "huggingface"]
REFUSED = [
    (["max_per_class=2"], r"fix: set dataset\.max_per_class=null and dataset\.max_samples="),
    (["label=cls", "holdout_fraction=0.1"], r"fix: set dataset\.holdout_fraction=null, or "),
    (["label=kind"], r"no (\.kind file|column 'kind').*\n.*set dataset\.label=.*label=null"),
]


def packed(config: Path, *overrides: str) -> Dataset:
    """Pack the dataset of a config, and open the packed form."""
    pack_again(config, *overrides)
    return load_dataset(load_teacher(config, list(overrides)).dataset)


@pytest.mark.parametrize("file", ["packed.json", "packed.h5"])
@pytest.mark.parametrize("dataset_type", FORMATS)
def test_images_are_packed_without_labels_and_some_are_held_out(
    dataset_type: str, file: str, tmp_path: Path
) -> None:
    config = write_unlabeled(tmp_path / "data", dataset_type, {"train": range(100)})
    config.write_text(config.read_text().replace("packed.json", file))
    data = packed(config)
    assert data.class_names is None
    assert data.train.labels is data.test.labels is None
    assert data.type == dataset_type
    train, test = numbers_of(data.train), numbers_of(data.test)
    assert 3 <= len(test) <= 20  # 10 %
    assert train == sorted(train)
    assert sorted(train + test) == list(range(100))
    half = packed(config, "dataset.holdout_fraction=0.5")
    assert 35 <= len(half.test) <= 65
    assert set(test) < set(numbers_of(half.test))
    assert half.digest != data.digest


@pytest.mark.parametrize("dataset_type", FORMATS)
def test_an_existing_test_split_is_used(
    dataset_type: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    splits = {"train": range(5), "test": range(5, 8)}
    config = write_unlabeled(tmp_path / "data", dataset_type, splits)
    data = packed(config)
    assert numbers_of(data.train) == [0, 1, 2, 3, 4]
    assert numbers_of(data.test) == [5, 6, 7]
    assert data.test.labels is None
    assert cli(["pack", str(config), "dataset.holdout_fraction=0.5"]) == 2
    assert "fix: set dataset.holdout_fraction=null" in capsys.readouterr().err
    assert cli(["pack", str(config), "dataset.test=other"]) == 2
    assert "fix: set dataset.test=" in capsys.readouterr().err


@pytest.mark.parametrize("dataset_type", FORMATS)
def test_inserted_and_reordered_samples_leave_held_out_ones_held_out(
    dataset_type: str, tmp_path: Path
) -> None:
    keys = ("dataset.holdout_fraction=0.3",)
    before = packed(
        write_unlabeled(tmp_path / "data", dataset_type, {"train": range(1, 80, 2)}), *keys
    )
    after = packed(
        write_unlabeled(tmp_path / "data", dataset_type, {"train": range(80, -1, -1)}), *keys
    )
    held = set(numbers_of(before.test))
    assert 4 <= len(held) <= 20
    assert held == {number for number in numbers_of(after.test) if number % 2}


@pytest.mark.parametrize("path", [None, "image.png"])
def test_rows_without_paths_of_their_own_are_held_out_by_number(
    path: str | None, tmp_path: Path
) -> None:
    config = write_config(tmp_path / "t.yaml", "huggingface", path="data", label="null")
    held = []
    for count in (40, 60):
        rows = [{"bytes": picture(number), "path": path} for number in range(count)]
        features = datasets.Features({"image": datasets.Image()})
        table = datasets.Dataset.from_dict({"image": rows}, features=features)
        table.save_to_disk(tmp_path / "data")
        held.append(set(numbers_of(packed(config, "dataset.holdout_fraction=0.3").test)))
    assert 4 <= len(held[0]) <= 20
    assert held[0] == {number for number in held[1] if number < 40}


@pytest.mark.parametrize(
    ("dataset_type", "overrides", "told"),
    [
        *((each, *refused) for each in FORMATS for refused in REFUSED),
        ("webdataset", ["class_names=a"], r"is set.*\n.*fix: set dataset\.class_names=null"),
    ],
)
def test_keys_that_contradict_the_label_are_refused_with_a_fix(
    dataset_type: str,
    overrides: list[str],
    told: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    splits = {"train": range(4), "test": range(2)}
    config = write_unlabeled(tmp_path / "data", dataset_type, splits)
    assert cli(["pack", str(config), *(f"dataset.{item}" for item in overrides)]) == 2
    error = capsys.readouterr().err
    assert re.search(told, error), error
    assert not list(tmp_path.glob("packed*"))


@pytest.mark.parametrize("dataset_type", FORMATS)
def test_selection_of_packed_images_without_labels(dataset_type: str, tmp_path: Path) -> None:
    config = write_unlabeled(tmp_path / "data", dataset_type, {"train": range(60)})
    whole = packed(config)

    def opened(*overrides: str) -> Dataset:
        return load_dataset(load_teacher(config, list(overrides)).dataset)

    some = opened("dataset.train_fraction=0.5", "dataset.validation_fraction=0.2")
    assert some.validation is not None
    assert some.validation.labels is None
    rest = len(whole.train) - len(some.validation)
    assert len(some.train) == round(0.5 * rest)
    with pytest.raises(DatasetError, match="no labels") as error:
        opened("dataset.max_per_class=2")
    assert "dataset.max_samples" in str(error.value)


@pytest.mark.parametrize("labels", [("null", "cls"), ("cls", "null")])
@pytest.mark.parametrize("dataset_type", FORMATS)
def test_a_packed_form_from_before_the_label_changed_is_refused(
    dataset_type: str, labels: tuple[str, str], tmp_path: Path
) -> None:
    splits = {"train": range(4), "test": range(2)}
    config = write_unlabeled(tmp_path / "data", dataset_type, splits, label=labels[0])
    assert (packed(config).class_names is None) == (labels[0] == "null")
    other = load_teacher(config, [f"dataset.label={labels[1]}"]).dataset
    with pytest.raises(DatasetError, match=f"but dataset.label is {labels[1]}") as error:
        load_dataset(other)
    assert "fix: pack the images again" in str(error.value)
    pack_again(config, f"dataset.label={labels[1]}")
    assert (load_dataset(other).class_names is None) == (labels[1] == "null")


@pytest.mark.parametrize(("count", "code"), [(1, 2), (2, 0)])
@pytest.mark.parametrize("dataset_type", FORMATS)
def test_at_least_two_images_are_needed(
    dataset_type: str, count: int, code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_unlabeled(tmp_path / "data", dataset_type, {"train": range(count)})
    assert cli(["pack", str(config)]) == code
    assert ("fix: add images" in capsys.readouterr().err) == (code == 2)


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("000.jpg", picture(0), "sample 000 of .* has 2 images"),
        ("", None, "is not a tar archive of regular files: it is truncated"),
        ("001.cls", b"0", "sample 001 of .* has 0 images"),
        ("001.png", b"text", r"cannot read the image 001\.png of .*: its format"),
    ],
)
def test_damaged_shards_without_labels_are_refused(
    name: str,
    content: bytes | None,
    told: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = write_unlabeled(tmp_path / "data", "webdataset", {"train": range(1)})
    shard = tmp_path / "data" / "train.tar"
    if content is None:
        shard.write_bytes(shard.read_bytes()[:700])
    else:
        with tarfile.open(shard, "a") as tar:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    assert cli(["pack", str(config)]) == 2
    error = capsys.readouterr().err
    assert re.search(told, error), error
    assert not (tmp_path / "packed.json").exists()  # complete shards may remain


@pytest.mark.parametrize("dataset_type", FORMATS)
def test_check_and_shrinking_work_without_labels(
    dataset_type: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_unlabeled(tmp_path / "data", dataset_type, {"train": range(12)})
    assert cli(["check", str(config), "--workers", "0"]) == 0
    assert "every image can be read" in capsys.readouterr().out
    assert cli(["pack", str(config), "--short-side", "10", "--workers", "0"]) == 0
    small = load_dataset(load_teacher(config).dataset)
    assert small.class_names is None
    assert small.type == "packed"
    assert small.train.first_shape == (10, 10, 3)
