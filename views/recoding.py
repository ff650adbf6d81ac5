"""Recodes the files of a split in worker processes, in their order."""

from __future__ import annotations

from collections.abc import Iterator

from views.encoded import EncodedSplit
from views.forked import run_forked
from views.recode import Recode, recoded

_FILES_AT_ONCE = 16


class _Work:
    """What the workers of a pool do; they are forked with it, since functions do not travel."""

    def __init__(self, split: EncodedSplit, recode: Recode, max_pixels: int) -> None:
        self.split, self.recode, self.max_pixels = split, recode, max_pixels

    def __call__(self, start: int) -> list[bytes]:
        return [self._one(i) for i in range(start, min(start + _FILES_AT_ONCE, len(self.split)))]

    def _one(self, sample: int) -> bytes:
        name = self.split.name_of(sample)
        return recoded(self.split.read(sample), name, self.recode, self.max_pixels)


def recoded_files(
    split: EncodedSplit, recode: Recode, max_pixels: int, num_workers: int
) -> Iterator[bytes]:
    """The new bytes of each file. num_workers: 0: this process. Raises DatasetError."""
    starts = range(0, len(split), _FILES_AT_ONCE)
    for files in run_forked(_Work(split, recode, max_pixels), starts, num_workers):
        yield from files
