"""The samples of one split of one packed file, each compared with its checksum when it is read."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from views.packed_file import ARRAYS, CHECKED_BY_SAMPLE, SPLITS, PackedFile
from views.splits import Checksums, Ids, crc32c

RUN_SAMPLES = 1024  # neighbours are read together, at most so many
RUN_BYTES = 2**26  # and at most about so many bytes


def verify_packed(file: PackedFile) -> None:
    """Compare every byte that the header knows with its checksum. Raises DatasetError."""
    for split in SPLITS:
        for name in ARRAYS[file.header.kind]:
            if name not in CHECKED_BY_SAMPLE:
                file.array(split, name)
        images = FileImages(file, split)
        if len(images.labels):
            for _ in images.read(np.arange(len(images.labels))):
                pass


class FileImages:
    """Images of one split of one file."""

    def __init__(self, file: PackedFile, name: str) -> None:
        self.file, self.name = file, name
        self.stored = "bytes" if file.header.kind == "encoded" else "images"
        self.labels = file.labels(name)

    @cached_property
    def checksums(self) -> Checksums:
        return self.file.checksums(self.name)

    @cached_property
    def offsets(self) -> Ids:
        """(N + 1,): where each sample begins."""
        if self.stored == "bytes":
            return self.file.offsets(self.name)
        bytes_each = math.prod(self.file.image_shape(self.name))
        return np.arange(len(self.labels) + 1, dtype=np.int64) * bytes_each

    def read(self, ids: Ids) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        """Neighbours, read together where they are not too large, compared with their checksums."""
        size = max(int(self.offsets[ids[-1] + 1] - self.offsets[ids[0]]), 1)
        rows = max(1, min(RUN_SAMPLES, len(ids) * RUN_BYTES // size))
        for run in np.split(ids, range(rows, len(ids), rows)):
            offsets = self.offsets[run[0] : run[-1] + 2].tolist()
            content = self.file.part(self.name, self.stored, offsets[0], offsets[-1])
            for sample, start, stop in zip(run.tolist(), offsets, offsets[1:], strict=False):
                own = content[start - offsets[0] : stop - offsets[0]]
                if int(self.checksums[sample]) != crc32c(own):
                    raise self.file.damaged(
                        f"{self.name} sample {sample} does not match its checksum"
                    )
                yield sample, own
