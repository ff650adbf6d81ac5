"""What can be said about a cache without the dataset, the teacher or torch."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from store.errors import CacheError
from store.faults import Fault
from store.hdf5 import is_hdf5
from store.identity import identity_sha256
from store.layout import MANIFEST, SAMPLE_CRC
from store.reader import TeacherCache
from store.source import Source, missing_blocks, open_source


@dataclass(frozen=True)
class Overview:
    """One cache of a list. problem: why it cannot be opened, if so."""

    path: Path
    source: Source | None
    problem: str = ""

    @property
    def done(self) -> float:
        """Fraction of the planned chunks that are committed."""
        if self.source is None:
            return 0.0
        manifest = self.source.manifest
        planned = manifest.num_views * manifest.blocks_per_view * len(manifest.arrays)
        return 1 - len(missing_blocks(self.source)) / planned


def overviews(folder: Path) -> Iterator[Overview]:
    """Every cache directly below `folder`, by name: folders with a manifest, exported files."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        try:
            if os.path.lexists(path / MANIFEST) or (path.is_file() and is_hdf5(path)):
                yield Overview(path, open_source(path))
        except (CacheError, OSError) as error:
            yield Overview(path, None, getattr(error, "problem", None) or str(error))


def details(path: Path) -> dict[str, Any]:
    """Everything the manifest says, and how much is complete, as plain JSON values.

    Raises CacheError.
    """
    source = open_source(path)
    m = source.manifest
    records = m.num_views * m.num_samples
    taps = {
        name: {
            "shape": list(spec.shape),
            "dtype": spec.dtype,
            "scale": spec.scale,
            "bytes_per_record": spec.bytes_per_record,
            "bytes": spec.bytes_per_record * records,
        }
        for name, spec in m.taps.items()
    }
    return {
        "path": str(path),
        "teacher": m.teacher,
        "identity": m.identity,
        "identity_sha256": identity_sha256(m.identity),
        "num_samples": m.num_samples,
        "num_views": m.num_views,
        "block_rows": m.block_rows,
        "taps": taps,
        "bytes_per_record": m.record_bytes,
        "bytes": m.record_bytes * records,
        "complete": not missing_blocks(source),
        "fraction_done": Overview(path, source).done,
        "measured": m.measured,
        "versions": m.versions,
        "classes": m.class_names,
    }


@dataclass(frozen=True)
class MissingRecords:
    """How many records lack something; how many views, and which taps, are to be added.

    new_taps: those that planned views lack; none where all taps lack the same blocks.
    """

    records: int
    new_views: int
    new_taps: tuple[str, ...]

    @property
    def growth(self) -> str:
        """The new views and taps in words; empty where only planned blocks are missing."""
        views = f"{self.new_views} view{'s' * (self.new_views != 1)}" if self.new_views else ""
        return " and ".join(filter(None, [views, ", ".join(self.new_taps)]))


def missing_records(source: Source, num_views: int, taps: Collection[str]) -> MissingRecords:
    """What a pass for the first `num_views` views of these taps would have to compute."""
    m = source.manifest
    old_views, asked = min(num_views, m.num_views), {*taps, *({SAMPLE_CRC} & set(m.stored))}
    arrays = {tap: list(m.stored[tap].arrays(tap)) if tap in m.stored else [] for tap in asked}
    lacking: set[str] = set()
    records = (num_views - old_views) * m.num_samples
    for block in m.blocks(old_views):
        absent = [
            tap
            for tap, names in arrays.items()
            if not names or not all(source.has(name, block) for name in names)
        ]
        lacking.update(absent)
        records += block.rows if absent else 0
    is_partial = not set(taps) <= lacking
    new_taps = sorted(set(taps) & lacking) if is_partial else []
    return MissingRecords(records, num_views - old_views, tuple(new_taps))


def describe_missing(source: Source) -> list[Fault]:
    """Everything that is planned and not committed."""
    return [
        Fault("not committed", source.path, array, block.view, block.index)
        for array, block in missing_blocks(source)
    ]


def committed_bytes(source: Source) -> int:
    """Bytes on disk of all chunks that are committed, sound or not."""
    manifest = source.manifest
    sizes = {name: manifest.chunk_file_bytes(spec) for name, spec in manifest.arrays.items()}
    return sum(
        size
        for block in manifest.blocks()
        for array, size in sizes.items()
        if source.has(array, block)
    )


def agreement(cache: TeacherCache, num_views: int) -> float:
    """The fraction of the first `num_views` cached views on which the teacher is right."""
    right = sum(
        int(cache.read_view(view, ["correct"])["correct"].sum()) for view in range(num_views)
    )
    return right / (num_views * cache.num_samples)
