"""Packs a dataset into shards of about the same size, and an index of them.

A shard is whole or absent, so a pack that was stopped resumes with the first one that is missing.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console

from runtime.progress import Progress
from views.encoded import EncodedSource
from views.pack import pack_encoded
from views.packed_file import PackedFile
from views.recode import Recode, recoded
from views.seeds import choice
from views.shard_index import MOST_SHARDS, sha256_of, shard_path, write_index
from views.splits import DatasetError

_SIZED_FILES = 64  # recoded to find out how many fit into a shard


@dataclass(frozen=True)
class _Part:
    """The samples of one shard."""

    number: int
    split: str
    start: int
    stop: int


def pack_shards(
    source: EncodedSource,
    index: Path,
    recode: Recode | None,
    *,
    max_pixels: int,
    num_workers: int,
    shard_bytes: int,
    console: Console,
) -> int:
    """Pack whatever shards are missing, then write the index. Returns the bytes of all.

    Raises DatasetError.
    """
    rows = _rows_per_shard(source, recode, max_pixels, shard_bytes)
    parts, job = _parts_of(source, rows), _job_of(source, recode, rows)
    missing = [part for part in parts if not _is_packed(index, part, job)]
    if len(missing) < len(parts):
        console.print(f"{len(parts) - len(missing)} of {len(parts)} shards are packed already")
    total = sum(part.stop - part.start for part in missing)
    with Progress(total, "images", console) as progress:
        for part in missing:
            pack_encoded(
                _source_of(source, part),
                shard_path(index, part.number),
                recode,
                max_pixels=max_pixels,
                num_workers=num_workers,
                advance=progress.advance,
                job=job,
                part=part.number,
            )
    files = [(part.split, PackedFile(shard_path(index, part.number))) for part in parts]
    write_index(index, files)
    return sum(file.num_bytes for _, file in files)


def _rows_per_shard(
    source: EncodedSource, recode: Recode | None, max_pixels: int, shard_bytes: int
) -> int:
    """By the mean size of all files, or of some that are recoded to find out."""
    split = source.train
    sizes = list(split.sizes)
    if recode is not None:
        some = choice(0, len(split), min(_SIZED_FILES, len(split))).tolist()
        sizes = [len(recoded(split.read(i), split.name_of(i), recode, max_pixels)) for i in some]
    fitting = int(shard_bytes / max(float(np.mean(sizes)), 1.0))
    fewest = -(-(len(source.train) + len(source.test)) // (MOST_SHARDS - 2))
    return max(fitting, fewest, 1)


def _parts_of(source: EncodedSource, rows: int) -> list[_Part]:
    ranges = [
        (name, start, min(start + rows, len(split)))
        for name, split in source.splits.items()
        for start in range(0, len(split), rows)
    ]
    return [_Part(number, *each) for number, each in enumerate(ranges)]


def _job_of(source: EncodedSource, recode: Recode | None, rows: int) -> str:
    """sha256 of everything that decides what is in the shards."""
    plain = None if recode is None else recode.plain()
    return sha256_of([source.type, source.class_names, source.digests, plain, rows])


def _source_of(source: EncodedSource, part: _Part) -> EncodedSource:
    """The samples of one shard; its other split is empty."""
    ranges = {"train": (0, 0), "test": (0, 0), part.split: (part.start, part.stop)}
    train, test = source.train.part(*ranges["train"]), source.test.part(*ranges["test"])
    return EncodedSource(source.type, source.class_names, train, test)


def _is_packed(index: Path, part: _Part, job: str) -> bool:
    path = shard_path(index, part.number)
    try:
        header = PackedFile(path).header
    except DatasetError:  # missing, damaged, or something else: packed anew
        return False
    return (header.job, header.part) == (job, part.number)
