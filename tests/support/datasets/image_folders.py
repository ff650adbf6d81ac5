"""Genuine folders of small images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from teach_once.views.images.encoded import encoded_folder
from teach_once.views.packed.write import pack_encoded
from teach_once.views.splits import ImageSource


def write_image_folder(
    root: Path,
    *,
    per_class: int = 3,
    size: int | tuple[int, int] = 12,
    classes: Sequence[str] = ("cat", "dog"),
) -> Path:
    """Write small PNG files: root/train/<class>/NN.png and root/test/<class>/NN.png."""
    rng = np.random.default_rng(0)
    height, width = (size, size) if isinstance(size, int) else size
    for split in ("train", "test"):
        for name in classes:
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(per_class):
                pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number:02d}.png")
    return root


def pack_folder(source: ImageSource, file: Path) -> None:
    """Pack the original bytes of a folder's files."""
    pack_encoded(encoded_folder(source), file)
