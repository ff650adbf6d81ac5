"""Packed images: the same dataset from one file; damage and forgery rejected."""

from __future__ import annotations

import hashlib
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image

from teach_once.configs.schema import ImageFolder, Normalization, Packed
from teach_once.views.command import cli
from teach_once.views.datasets import Dataset, DatasetError, load_dataset
from teach_once.views.images.folders import image_folder
from teach_once.views.packed import read as packed
from teach_once.views.packed import read as packed_samples
from teach_once.views.packed.write import pack_pixels
from tests.support.datasets.image_folders import pack_folder, write_image_folder

RGB = Normalization(mean=(0.5,) * 3, std=(0.5,) * 3)
CONFIG = """
dataset: {{type: imagefolder, root: {root}, normalization: {{mean: [0, 0, 0], std: [1, 1, 1]}}}}
views: {{augment: {{type: pad-crop-flip}}}}
teacher: {{arch: resnet8, weights: none.pt}}
"""


def folder_of(root: Path) -> Dataset:
    return load_dataset(ImageFolder(type="imagefolder", root=str(root), normalization=RGB))


def packed_of(file: Path, max_per_class: int | None = None) -> Dataset:
    return load_dataset(
        Packed(type="packed", file=str(file), normalization=RGB, max_per_class=max_per_class)
    )


@pytest.fixture(params=[[], ["--encoded"]], ids=["pixels", "encoded"])
def file(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.setattr(packed_samples, "RUN_SAMPLES", 4)
    write_image_folder(tmp_path / "data", per_class=5)
    config = tmp_path / "mine.yaml"
    config.write_text(CONFIG.format(root=tmp_path / "data"))
    assert cli(["pack", str(config), str(tmp_path / "data.h5"), *request.param]) == 0
    return tmp_path / "data.h5"


def test_a_packed_folder_is_the_same_dataset(file: Path) -> None:
    ours, theirs = packed_of(file), folder_of(file.parent / "data")
    assert ours.class_names == theirs.class_names
    for split in ("train", "test"):
        a, b = getattr(ours, split), getattr(theirs, split)
        assert (a.labels == b.labels).all()
        assert (a.images == b.images).all()
    ids = np.array([9, 0, 4])
    assert (ours.train.read_some(ids) == theirs.train.images[ids]).all()


@pytest.mark.parametrize("kind", [[], ["--encoded"]], ids=["pixels", "encoded"])
def test_a_packed_file_holds_the_samples_that_its_config_leaves_out(
    tmp_path: Path, kind: list[str]
) -> None:
    write_image_folder(tmp_path / "data", per_class=20)
    config, target = tmp_path / "mine.yaml", tmp_path / "data.h5"
    config.write_text(CONFIG.format(root=tmp_path / "data"))
    chosen = ["dataset.max_per_class=6", "dataset.validation_fraction=0.3"]
    assert cli(["pack", str(config), str(target), *chosen, *kind]) == 0
    whole = folder_of(tmp_path / "data")
    assert (packed_of(target).train.images == whole.train.images).all()
    options = {"normalization": RGB, "max_per_class": 6, "validation_fraction": 0.3}
    ours = load_dataset(Packed(type="packed", file=str(target), **options))
    root = str(tmp_path / "data")
    theirs = load_dataset(ImageFolder(type="imagefolder", root=root, **options))
    assert ours.validation is not None
    assert theirs.validation is not None
    assert (ours.validation.images == theirs.validation.images).all()
    assert (ours.train.images == theirs.train.images).all()
    assert ours.digest == theirs.digest


def test_a_packed_folder_has_the_folders_identity_and_digests(file: Path) -> None:
    ours, theirs = packed_of(file), folder_of(file.parent / "data")
    assert (ours.type, ours.digest) == (theirs.type, theirs.digest) == ("imagefolder", ours.digest)
    ids = np.arange(10)
    expected = [
        list(hashlib.blake2b(path.read_bytes(), digest_size=16).digest())
        for path in sorted((file.parent / "data" / "train").rglob("*.png"))
    ]
    for dataset in (ours, theirs):
        assert dataset.train.read_digests(ids).tolist() == expected
        assert dataset.train.loaded[1].tolist() == expected


def test_of_an_encoded_file_any_choice_of_samples_has_the_folders_digest(tmp_path: Path) -> None:
    source = image_folder(write_image_folder(tmp_path / "data", per_class=20))
    pack_folder(source, tmp_path / "data.h5")
    some = np.array([3, 17, 30])
    assert packed.packed(tmp_path / "data.h5").digest_of(some) == source.digest_of(some)


def test_the_digest_of_packed_files_is_kept_beside_the_caches(tmp_path: Path) -> None:
    root, file, ids = tmp_path / "data", tmp_path / "data.h5", np.arange(10)
    write_image_folder(root, per_class=5)
    pack_folder(image_folder(root), file)
    computed = packed.packed(file).digest_of(ids)
    (tmp_path / "caches").mkdir()
    for _ in range(2):
        assert packed.packed(file, kept_in=tmp_path / "caches").digest_of(ids) == computed
    (kept,) = (tmp_path / "caches").rglob("*.digest")
    kept.write_text("0" * 64)
    assert packed.packed(file, kept_in=tmp_path / "caches").digest_of(ids) == "0" * 64
    (root / "train" / "cat" / "00.png").rename(root / "train" / "cat" / "000.png")
    pack_folder(image_folder(root), file)  # the same bytes by other names
    other = packed.packed(file, kept_in=tmp_path / "caches").digest_of(ids)
    assert other not in (computed, "0" * 64)
    assert other == image_folder(root).digest_of(ids)


def test_a_limit_keeps_the_first_of_each_class(file: Path) -> None:
    few = packed_of(file, max_per_class=2)
    assert few.train.labels.tolist() == [0, 0, 1, 1]
    assert (few.train.images == folder_of(file.parent / "data").train.images[[0, 1, 5, 6]]).all()
    assert few.digest != packed_of(file).digest


def test_the_digest_follows_the_content(file: Path) -> None:
    before = packed_of(file).digest
    assert packed_of(file).digest == before
    Image.new("RGB", (12, 12)).save(file.parent / "data" / "train" / "cat" / "00.png")
    pack_pixels(image_folder(file.parent / "data"), file)
    assert packed_of(file).digest != before


def test_a_flipped_byte_of_the_images_is_found(file: Path) -> None:
    with h5py.File(file) as opened:
        group = opened["train"]
        offset = group["images" if "images" in group else "bytes"].id.get_offset()
    content = bytearray(file.read_bytes())
    content[offset + 20] ^= 1
    file.write_bytes(content)
    with pytest.raises(DatasetError, match=r"train sample 0 does not match its checksum"):
        _ = packed_of(file).train.images


def test_other_files_are_refused_by_name(tmp_path: Path, file: Path) -> None:
    with pytest.raises(DatasetError, match=r"file .*gone\.h5 not found"):
        packed_of(tmp_path / "gone.h5")
    (tmp_path / "text.h5").write_text("not HDF5")
    with pytest.raises(DatasetError, match=r"text\.h5 does not contain packed images"):
        packed_of(tmp_path / "text.h5")
    with h5py.File(tmp_path / "other.h5", "w") as other:
        other["x"] = 1
    with pytest.raises(DatasetError, match="does not contain packed images"):
        packed_of(tmp_path / "other.h5")
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(DatasetError):
        _ = packed_of(file).train.images


def test_bad_commands_say_how_it_is_used(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli(["pack"]) == 2
    assert "missing argument 'NAME|PATH'" in capsys.readouterr().err
    assert cli(["pack", "digits-resnet20", "/nowhere/x.h5"]) == 2
    assert "folder /nowhere not found" in capsys.readouterr().err
    assert cli(["pack", "digits-resnet20", "x.h5", "--encoded"]) == 2
    assert "only an image folder" in capsys.readouterr().err
