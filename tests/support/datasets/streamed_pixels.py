"""Pixels that worker processes read from a folder of photographs."""

from __future__ import annotations

from pathlib import Path

from teach_once.configs.schema import ImageFolder, Normalization, RandomResizedCrop, ViewsConfig
from teach_once.views.datasets import Split, load_dataset
from teach_once.views.pixels.batches import AugmentedSplit
from teach_once.views.pixels.streaming import StreamedPixels
from tests.support.caches.teacher_cache import CPU

RGB = Normalization(mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3))
CROP = RandomResizedCrop(size_px=10)


def split_of(root: Path) -> Split:
    config = ImageFolder(type="imagefolder", root=str(root), normalization=RGB)
    return load_dataset(config).train


def streamed_pixels(split: Split, views: ViewsConfig, num_workers: int) -> StreamedPixels:
    return StreamedPixels(AugmentedSplit(split, views, RGB, CPU), num_workers)
