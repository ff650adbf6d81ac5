"""The loading benchmark compares equal work on photographs of the stated size."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import __main__ as suite
from benchmarks.synthetic import photographs
from benchmarks.targets import loading
from teach_once.configs.schema import (
    ImageFolder,
    Normalization,
    Packed,
    RandomResizedCrop,
    ViewsConfig,
)
from teach_once.views.augment.augment import cut_views
from teach_once.views.datasets import load_dataset
from teach_once.views.images.encoded import encoded_folder
from teach_once.views.images.folders import image_folder
from teach_once.views.packed.write import pack_encoded
from teach_once.views.pixels.batches import normalize
from teach_once.views.splits import Split

NORMALIZATION = Normalization(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four photographs, one of them turned by its EXIF entry, a palette picture and a gray one."""
    for split in ("train", "val"):
        for name in "ab":
            (tmp_path / split / name).mkdir(parents=True)
        for number, content in enumerate(photographs.photographs(4, file_bytes=60_000)):
            (tmp_path / split / "ab"[number % 2] / f"{number}.jpg").write_bytes(content)
    first = Image.open(tmp_path / "train/a/0.jpg")
    turned = Image.Exif()
    turned[0x0112] = 6
    first.save(tmp_path / "train/a/4.jpg", exif=turned)
    first.quantize(32).save(tmp_path / "train/a/5.png")
    first.convert("L").save(tmp_path / "train/a/6.jpg")
    return tmp_path


def test_photographs_are_jpeg_files_of_the_requested_size_and_differ() -> None:
    files = list(photographs.photographs(2, file_bytes=120_000))
    assert files[0] != files[1]
    for content in files:
        assert len(content) == pytest.approx(120_000, rel=0.1)
        picture = Image.open(io.BytesIO(content))
        assert (picture.format, picture.size) == ("JPEG", (500, 375))


def test_views_cut_from_an_open_picture_are_those_cut_from_its_pixels(folder: Path) -> None:
    pack_encoded(encoded_folder(image_folder(folder)), folder / "packed.h5")
    views = ViewsConfig(augment=RandomResizedCrop(size_px=64), seed=0, count=3)
    configs = (
        ImageFolder(type="imagefolder", root=str(folder), normalization=NORMALIZATION),
        Packed(type="packed", file=str(folder / "packed.h5"), normalization=NORMALIZATION),
    )
    for config in configs:
        split = load_dataset(config).train.subset(np.arange(7)[::-1].copy())
        assert split.open_each is not None
        from_arrays = Split(*(getattr(split, name) for name in SPLIT_WITHOUT_PICTURES))
        cuts = [
            cut_views(each, views, [0, 2], np.array([6, 0, 2, 1]), (64, 64, 3))
            for each in (split, from_arrays)
        ]
        assert np.array_equal(cuts[0][0], cuts[1][0])
        assert np.array_equal(cuts[0][1], cuts[1][1])


SPLIT_WITHOUT_PICTURES = ("labels", "load", "read_each", "read_digests", "name_of")


def test_normalized_views_are_those_of_the_formula_to_the_last_bit() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).repeat(36).reshape(4, 24, 32, 3)
    before = pixels.clone()
    mean, std = (torch.tensor(each) for each in (NORMALIZATION.mean, NORMALIZATION.std))
    expected = ((pixels.float() / 255.0 - mean) / std).permute(0, 3, 1, 2)
    assert torch.equal(normalize(pixels, NORMALIZATION), expected)
    assert torch.equal(pixels, before)


@pytest.mark.long
def test_loading_is_compared_with_torchvision_and_workers_time_is_counted(tmp_path: Path) -> None:
    files = ["--docs", str(tmp_path / "b.md"), "--json", str(tmp_path / "b.json")]
    arguments = ["--photographs", "40", "--rounds", "1", "--workers", "1", *files]
    threads = torch.get_num_threads()
    try:
        assert suite.main(["loading", *arguments]) == 0
    finally:
        torch.set_num_threads(threads)
    found = json.loads((tmp_path / "b.json").read_text())
    assert all(row["value"] > 0 for row in found)
    assert [row["target"] for row in found] == ["≥ 1.15", "≥ 2.5", "", "", "", "≤ 0.08"]
    text = (tmp_path / "b.md").read_text()
    for row in (loading.THEIRS, loading.OURS, loading.PACKED):
        assert f"| {row} |" in text
