"""An image folder of ImageNet's size without its bytes: hard links to a few hundred photographs.

A link takes a name and no inode; only the classes' folders and the photographs take inodes. File
systems allow about 65,000 links to one file (ext4), so the photographs are copied as often as that
demands.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.synthetic.photographs import FILE_BYTES, photographs
from teach_once.views.splits import crc32c

CLASSES = 1000
PHOTOGRAPHS = 256
_MOST_LINKS = 60_000
_BYTES_PER_NAME = 100  # of a folder's entry, generously


def refuse_small_disk(folder: Path, num_samples: int, more_bytes: int = 0) -> None:
    """Raise SystemExit unless the disk of `folder` has room for the tree and `more_bytes`."""
    disk = os.statvfs(folder)
    inodes = 2 * CLASSES + num_samples // _MOST_LINKS + 2 * PHOTOGRAPHS
    num_bytes = more_bytes + _BYTES_PER_NAME * num_samples + 2 * PHOTOGRAPHS * FILE_BYTES
    if disk.f_files > 0 and disk.f_favail < inodes:
        raise SystemExit(f"{folder}: {inodes:,} inodes are needed, {disk.f_favail:,} are free")
    if (free := disk.f_bavail * disk.f_frsize) < num_bytes:
        raise SystemExit(
            f"{folder}: {num_bytes / 1e9:.1f} GB are needed, {free / 1e9:.1f} are free\n"
            f"  fix: set TMPDIR to a folder on a larger disk, or give fewer --samples"
        )


def linked_tree(root: Path, num_samples: int, contents: list[bytes]) -> NDArray[np.uint32]:
    """`root/train/<class>/<n>.JPEG`, and one image a class in `root/val`.

    Returns the checksums of all training samples, (num_samples,), in their order.
    """
    originals = root / "originals"
    originals.mkdir(parents=True)
    sums = np.array([crc32c(content) for content in contents], dtype=np.uint32)
    chosen = np.empty(num_samples, dtype=np.int64)
    first = 0
    for number in range(CLASSES):
        count = num_samples // CLASSES + (number < num_samples % CLASSES)
        folders = [root / split / f"n{number:08d}" for split in ("train", "val")]
        for folder in folders:
            folder.mkdir(parents=True)
        for sample in range(first, first + count):
            chosen[sample] = sample % len(contents)
            name = f"n{number:08d}_{sample - first:06d}.JPEG"
            _link(originals, sample, contents, folders[0] / name)
        _link(originals, number, contents, folders[1] / f"val_{number:06d}.JPEG")
        first += count
    return np.asarray(sums[chosen])


def _link(originals: Path, sample: int, contents: list[bytes], name: Path) -> None:
    which, copy = sample % len(contents), sample // len(contents) // _MOST_LINKS
    original = originals / f"{which}-{copy}.JPEG"
    if not original.exists():
        original.write_bytes(contents[which])
    os.link(original, name)


def some_photographs(num_samples: int) -> list[bytes]:
    """As many different ones as there are samples, at most 256."""
    return list(photographs(min(PHOTOGRAPHS, num_samples)))


def remove_tree(root: Path) -> None:
    """Remove it, whatever part of it was made."""
    shutil.rmtree(root, ignore_errors=True)
