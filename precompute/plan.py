"""Plan a pass: records, bytes, files, free disk, memory, and time at a measured rate."""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from teach_once.precompute.compute.blocks import QUEUED_BLOCKS
from teach_once.precompute.compute.setup import (
    Setup,
    evaluated_images,
    evaluation_setup,
    open_evaluated,
)
from teach_once.precompute.compute.teacher_pass import TeacherPass
from teach_once.precompute.compute.trial import pass_rate
from teach_once.runtime.command.cost import Memory, memory_with
from teach_once.runtime.formats import (
    counted,
    format_duration,
    format_rate,
    format_rows,
    format_size,
    format_table,
)
from teach_once.store import CacheContent
from teach_once.store.errors import CacheError, CacheNotWritable
from teach_once.store.format.content import draft_manifest
from teach_once.store.format.journal import Coverage
from teach_once.store.format.manifest import Manifest
from teach_once.store.format.spec import tap_of
from teach_once.store.place.bucket import NoBucket, ObjectsUnreachable
from teach_once.store.place.open import place_at
from teach_once.store.read.evaluation import TEST
from teach_once.store.read.source import open_source
from teach_once.store.read.zarr_source import ZarrSource
from teach_once.store.write.pending_blocks import Work, bytes_of, pending_work, unfinished

_WIDEST = 4  # bytes of a float32 value, in which evaluation caches are stored


@dataclass(frozen=True)
class Plan:
    """The size of a cache and the remaining work.

    pending_records: to be computed. carried_records: to be copied from the cache carried_from.
    bytes_to_write: of the chunk files of both. spool_bytes: most bytes on disk for records of
    unfinished blocks during the pass. free_bytes: free on the disk of the spool and, unless
    is_remote, of the chunk files. evaluated: images by kind whose outputs are stored once, after
    the records; evaluated_bytes: of these outputs.
    trial_hours: time to find the fastest batch size, if necessary.
    """

    manifest: Manifest
    device: str
    pending_records: int
    carried_records: int
    carried_from: Path | None
    bytes_to_write: int
    spool_bytes: int
    free_bytes: int
    images_per_second: float
    memory: Memory
    is_remote: bool = False
    evaluated: Mapping[str, int] = field(default_factory=dict)
    evaluated_bytes: int = 0
    trial_hours: float = 0.0

    @property
    def num_records(self) -> int:
        return self.manifest.num_views * self.manifest.num_samples

    @property
    def num_files(self) -> int:
        m = self.manifest
        views = (1 if spec.all_views else m.num_views for spec in m.arrays.values())
        return m.blocks_per_view * sum(views)

    @property
    def hours(self) -> float:
        images = self.pending_records + sum(self.evaluated.values())
        return images / max(self.images_per_second, 1e-9) / 3600 + self.trial_hours

    def table(self, path: Path, images: str = "") -> str:
        """Return the plan of the cache at `path` as rows of a label and a value.

        images: where the images are during the pass.
        """
        m = self.manifest
        rows = [
            ("cache", str(path)),
            (
                "size",
                f"{format_size(self.num_records * m.record_bytes)} in {self.num_files:,} files: "
                f"{counted(m.num_views, 'view')} x {m.num_samples:,} samples, "
                f"{m.record_bytes:,} bytes each",
            ),
        ]
        if self.carried_from is not None:
            rows.append(("to copy", f"{self.carried_records:,} records from {self.carried_from}"))
        rows.append(
            ("to do", f"{self.pending_records:,} of {self.num_records:,} records, {self._disk()}")
        )
        if self.evaluated:
            rows.append(("then", f"{self._evaluated()}, {format_size(self.evaluated_bytes)}"))
        if self.pending_records:
            rows.append(("time", self._time()))
        rows.append(("memory", self.memory.with_free()))
        if images:
            rows.append(("images", images))
        return format_rows(rows)

    def _disk(self) -> str:
        spool = f", spool {format_size(self.spool_bytes)}" if self.spool_bytes else ""
        is_local = bool(spool) or not self.is_remote
        free = f" ({format_size(self.free_bytes)} free)" if is_local else ""
        return f"{format_size(self.bytes_to_write)}{spool}{free}"

    @property
    def disk_bytes(self) -> int:
        """Largest number of bytes written to a local disk."""
        written = self.bytes_to_write + self.evaluated_bytes
        return self.spool_bytes + (0 if self.is_remote else written)

    def _evaluated(self) -> str:
        return " and ".join(counted(count, kind) for kind, count in self.evaluated.items())

    def _time(self) -> str:
        rate = f"{format_rate(self.images_per_second)} images/s on {self.device}"
        trial = " and a batch size trial" if self.trial_hours else ""
        return f"about {format_duration(self.hours)} at {rate}{trial}"

    def tap_table(self) -> str:
        """Return a table of the bytes per tap."""
        rows = [("tap", "shape", "stored as", "bytes", "total")]
        for name, spec in self.manifest.taps.items():
            stored = spec.dtype + (f", scale per {spec.scale}" if spec.scale else "")
            stored += f", largest {spec.top}" if spec.top else ""
            shape = "x".join(map(str, spec.shape)) or "1"
            size = spec.bytes_per_record
            rows.append((name, shape, stored, f"{size:,}", format_size(size * self.num_records)))
        return format_table(rows)


def planned(
    teacher_pass: TeacherPass,
    content: CacheContent,
    rate: Callable[[int], float] | None = None,
    device: str = "",
) -> Plan:
    """Plan the pass. Runs a few batches if there is work, and writes nothing.

    rate: number of pending records -> images per second; default: measured here. device: device of
    the workers, if it is not this process's.
    """
    path = teacher_pass.setup.path
    draft = draft_manifest(content, teacher_pass.options.block_rows)
    manifest, work, num_bytes = pending_of(path, draft, teacher_pass.options.check_every_byte)
    carrier, carried = teacher_pass.carrier, 0
    if carrier is not None:
        carrier.check_same_blocks(manifest)
        carried = sum(item.block.rows for item in work if carrier.holds(item, manifest))
    records = sum(item.block.rows for item in work) - carried
    evaluated, evaluated_bytes = _evaluation(teacher_pass.setup, manifest)
    return Plan(
        manifest=manifest,
        device=device or str(teacher_pass.options.device),
        pending_records=records,
        carried_records=carried,
        carried_from=None if carrier is None else carrier.old.path,
        bytes_to_write=num_bytes,
        spool_bytes=_spool_bytes(teacher_pass, manifest) if records else 0,
        free_bytes=free_bytes(teacher_pass.folder),
        images_per_second=(rate or (lambda _: pass_rate(teacher_pass)))(records)
        if records
        else 0.0,
        memory=memory_of(teacher_pass, manifest),
        is_remote=not place_at(path).is_local,
        evaluated=evaluated,
        evaluated_bytes=evaluated_bytes,
    )


def _evaluation(setup: Setup, manifest: Manifest) -> tuple[dict[str, int], int]:
    """Return the images by kind whose outputs are stored once and are missing, and their bytes."""
    found: dict[str, int] = {}
    num_bytes = 0
    for images in evaluated_images(setup):
        if open_evaluated(setup, images, every_byte=False) is None:
            kind = "test image" if images.prefix == TEST else "probe image"
            count, taps = len(images.dataset.train), evaluation_setup(setup, images).tap_names
            found[kind] = found.get(kind, 0) + count
            specs = (manifest.taps[tap] for tap in taps if tap in manifest.taps)
            num_bytes += count * sum(_WIDEST * math.prod(spec.shape) for spec in specs)
    return found, num_bytes


def memory_of(teacher_pass: TeacherPass, manifest: Manifest) -> Memory:
    """Return the memory used so far, including the trial's batches, plus the memory still needed.

    Still needed are the blocks being computed, queued or written, as float32 and as stored; several
    views of a batch of images; and the test images.
    """
    pixels = teacher_pass.pixels
    of_blocks = (QUEUED_BLOCKS + 2) * manifest.block_rows * manifest.record_bytes * 4
    of_reading = teacher_pass.images_per_reading * math.prod(pixels.shape)
    of_tests = len(teacher_pass.setup.dataset.test) * math.prod(pixels.shape)
    return memory_with(of_blocks + of_reading + of_tests, teacher_pass.options.device)


def _spool_bytes(teacher_pass: TeacherPass, manifest: Manifest) -> int:
    """Return the bytes of a block's samples in all views if images must be decoded, otherwise 0."""
    if not teacher_pass.pixels.is_streamed:
        return 0
    views = min(manifest.num_views, teacher_pass.views_per_reading)
    of_record = sum(
        math.prod(spec.shape) * np.dtype(spec.read_dtype).itemsize
        for spec in manifest.stored.values()
    )
    return min(manifest.block_rows, manifest.num_samples) * views * of_record


def pending_of(path: Path, asked: Manifest, every_byte: bool) -> tuple[Manifest, list[Work], int]:
    """Return the manifest of the complete cache, the remaining work, and its size in bytes.

    asked: manifest of a new cache; an existing cache keeps its block size, views and taps.
    every_byte: search a seemingly complete cache thoroughly for damaged blocks. In an incomplete
    cache, the pass finds damaged blocks itself.
    """
    manifest = asked
    try:
        there = open_source(path)
    except (ObjectsUnreachable, NoBucket, CacheNotWritable):
        raise
    except CacheError:
        there = None
    if there is not None:
        manifest = dataclasses.replace(
            asked,
            block_rows=there.manifest.block_rows,
            num_views=max(asked.num_views, there.manifest.num_views),
            taps={**there.manifest.taps, **asked.taps},
        )

    coverage = there.coverage.within(manifest) if there else Coverage.nothing(manifest)
    arrays, work, num_bytes = manifest.arrays, list[Work](), 0
    for block, missing in unfinished(manifest, coverage, asked.num_views, asked.taps):
        work.append(Work(block, tuple(sorted(missing))))
        num_bytes += sum(
            manifest.chunk_file_bytes(spec)
            for array, spec in arrays.items()
            if tap_of(array) in missing and not coverage.there[array][block.view, block.index]
        )
    if isinstance(there, ZarrSource) and not work:
        views, taps = asked.num_views, asked.taps
        work = pending_work(there, views, taps, check_every_byte=every_byte)
        num_bytes = bytes_of(work, manifest)
    return manifest, work, num_bytes


def free_bytes(path: Path) -> int:
    """Return the free bytes of the disk of `path`, or of its nearest existing parent.

    Raises CacheNotWritable if that is not a folder.
    """
    while not path.exists():
        path = path.absolute().parent
    if not path.is_dir():
        raise CacheNotWritable(
            f"{path} is a file, expected a folder", fix="choose another folder with --caches DIR"
        )
    return shutil.disk_usage(path).free
