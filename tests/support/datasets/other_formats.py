"""Shared parts of the tests of tar shards, Hugging Face tables and images without labels."""

from __future__ import annotations

import io
from pathlib import Path

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


def pack_again(config: Path, *options: str) -> Path:
    """Pack the dataset of the config, and return the config."""
    assert cli(["pack", str(config), *options]) == 0
    return config
