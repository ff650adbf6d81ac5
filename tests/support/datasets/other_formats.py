"""Shared parts of the tests of tar shards, Hugging Face tables and images without labels."""

from __future__ import annotations

import io
import shutil
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from teach_once.views.command import cli
from teach_once.views.splits import Split

LABELS = [0, 1, 1, 0, 1, 0, 0]  # of the training images
_CONFIG = """
dataset:
  type: {type}
  {keys}
  packed: packed.json
  normalization: {{mean: [0, 0, 0], std: [1, 1, 1]}}
views: {{augment: {{type: pad-crop-flip}}, count: 2}}
teacher: {{arch: resnet8, weights: w.pt}}
"""


UNLABELED = """
dataset:
  type: images
  root: photos
  normalization: {mean: [0, 0, 0], std: [1, 1, 1]}
views: {augment: {type: pad-crop-flip}, count: 2}
teacher: {arch: resnet8, weights: w.pt, num_classes: 7}
"""


def picture(number: int) -> bytes:
    """Return a PNG file of 12x12 pixels, different for each number."""
    target = io.BytesIO()
    Image.fromarray(_pixels(number)).save(target, format="PNG")
    return target.getvalue()


def _pixels(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (12, 12, 3), dtype=np.uint8)


def shows_pictures(split: Split) -> bool:
    """Return True if the images are pictures 0, 1, 2, ... in that order."""
    expected = [_pixels(number) for number in range(len(split))]
    return np.array_equal(split.images, expected)


def write_config(file: Path, dataset_type: str, **keys: str) -> Path:
    """Write a teacher's config with such a dataset."""
    lines = "\n  ".join(f"{key}: {value}" for key, value in keys.items())
    file.write_text(_CONFIG.format(type=dataset_type, keys=lines))
    return file


def write_unlabeled(
    root: Path, dataset_type: str, splits: Mapping[str, Sequence[int]], label: str = "null"
) -> Path:
    """Write pictures as tar shards or as a saved table, and return a config next to them.

    Every sample has a label, which is not read with label "null".
    """
    shutil.rmtree(root, ignore_errors=True)
    if dataset_type == "webdataset":
        root.mkdir()
        for split, numbers in splits.items():
            _write_shard(root / f"{split}.tar", numbers)
        return write_config(root.parent / "t.yaml", dataset_type, root=root.name, label=label)
    import datasets

    tables = {split: _table(numbers) for split, numbers in splits.items()}
    datasets.DatasetDict(tables).save_to_disk(root)
    return write_config(root.parent / "t.yaml", dataset_type, path=root.name, label=label)


def _write_shard(file: Path, numbers: Sequence[int]) -> None:
    with tarfile.open(file, "w") as tar:
        for number in numbers:
            for ending, content in (("png", picture(number)), ("cls", b"%d" % (number % 2))):
                member = tarfile.TarInfo(f"{number:03d}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def _table(numbers: Sequence[int]) -> Any:
    import datasets

    images = [{"bytes": picture(number), "path": f"{number:03d}.png"} for number in numbers]
    features = datasets.Features({"image": datasets.Image(), "cls": datasets.Value("int64")})
    rows = {"image": images, "cls": [number % 2 for number in numbers]}
    return datasets.Dataset.from_dict(rows, features=features)


def numbers_of(split: Split) -> list[int]:
    """Return which pictures, of the first 200, the images of a split are."""
    known = {_pixels(number).tobytes(): number for number in range(200)}
    return [known[image.tobytes()] for image in split.images]


def pack_again(config: Path, *options: str) -> Path:
    """Pack the dataset of the config, and return the config."""
    assert cli(["pack", str(config), *options]) == 0
    return config
