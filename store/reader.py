"""Opens a cache, after convincing itself that it is the right one and whole, and reads from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from store.chunks import (
    Fault,
    chunk_faults,
    damaged,
    mend_command,
    metadata_faults,
    read_chunk,
)
from store.errors import (
    CacheIncomplete,
    CacheMismatch,
    CacheMissing,
    UnknownTap,
    UnknownView,
)
from store.identity import Identity, differing_fields
from store.journal import Journal, read_journal
from store.layout import (
    CHECKSUM_BYTES,
    LABELS,
    LABELS_DTYPE,
    MANIFEST,
    ZARR_GROUP,
    Block,
    Manifest,
    TapSpec,
    cache_path,
    crc32c,
    read_manifest,
)

_UNKNOWN_WEIGHTS = "teacher.weights_sha256: expected None"


class TeacherCache:
    """A complete cache, for reading. Its arrays are (samples, ...) in the dataset's order.

    Safe to share between threads and across `fork`: it holds no open file.
    """

    def __init__(self, path: Path, manifest: Manifest, journal: Journal) -> None:
        self.path = path
        self.manifest = manifest
        self._journal = journal
        self.labels = _read_labels(path, manifest)

    @classmethod
    def open(cls, path: str | Path) -> TeacherCache:
        """Open the cache in folder `path`.

        Raises CacheMissing, CacheMismatch (written by another format version), CacheIncomplete or
        CacheDamaged. Chunks are checked for presence and size here, for every byte when read.
        """
        path = Path(path)
        manifest = read_manifest(path)
        journal = read_journal(path)
        _refuse_incomplete(path, manifest, journal)
        faults = metadata_faults(path, manifest)
        faults += chunk_faults(path, manifest, journal, manifest.taps, read=False)
        if faults:
            raise damaged(manifest, faults)
        return cls(path, manifest, journal)

    @property
    def num_samples(self) -> int:
        return self.manifest.num_samples

    @property
    def num_views(self) -> int:
        return self.manifest.num_views

    @property
    def taps(self) -> dict[str, TapSpec]:
        return dict(self.manifest.taps)

    @property
    def identity(self) -> Identity:
        return self.manifest.identity

    @property
    def measured(self) -> dict[str, Any]:
        """What the pass found out about the teacher; empty if it was stopped before its end."""
        return self.manifest.measured

    @property
    def nbytes(self) -> int:
        """Bytes of all records."""
        record = sum(spec.bytes_per_record for spec in self.manifest.taps.values())
        return record * self.num_samples * self.num_views

    def faults(self, *, read: bool = True) -> list[Fault]:
        """Chunks that are not sound: by every byte (read=True), or by presence and size."""
        return chunk_faults(self.path, self.manifest, self._journal, self.taps, read=read)

    def refuse_unless(
        self,
        identity: Identity,
        *,
        labels: NDArray[np.int64],
        canary: Mapping[str, Any],
    ) -> None:
        """Raise CacheMismatch unless this cache is of that identity, those labels and pixels.

        An expected `weights_sha256` of None (the weights are not at hand) is not compared.
        """
        differences = [
            line
            for line in differing_fields(identity, self.identity)
            if not line.startswith(_UNKNOWN_WEIGHTS)
        ]
        if not np.array_equal(labels, self.labels):
            differences.append("labels: the dataset's differ from those in the cache")
        if not differences and dict(canary) != self.manifest.canary:
            differences.append(
                "pixels: the views replayed from this dataset are not those the teacher saw "
                "(another image decoder?)"
            )
        if differences:
            raise CacheMismatch(
                "\n  ".join([f"{self.path} is the cache of something else", *differences]),
                mend=mend_command(self.manifest),
            )

    def read_view(self, view: int, taps: Sequence[str] | None = None) -> dict[str, NDArray[Any]]:
        """All records of one view: tap -> (N, *tap shape), every checksum verified.

        Raises UnknownView, UnknownTap, CacheDamaged.
        """
        self._check_view(view)
        names = self._checked_taps(taps)
        found = {}
        for tap in names:
            spec = self.manifest.taps[tap]
            slab = np.empty((self.num_samples, *spec.shape), dtype=spec.dtype)
            for index in range(self.manifest.blocks_per_view):
                block = self.manifest.block(view, index)
                out = slab[block.start : block.stop]
                read_chunk(self.path, self.manifest, self._journal, tap, block, out)
            found[tap] = slab
        return found

    def read_block(
        self, block: Block, taps: Sequence[str] | None = None
    ) -> dict[str, NDArray[Any]]:
        """The records of one block: tap -> (rows, *tap shape); raises as `read_view`."""
        self._check_view(block.view)
        found = {}
        for tap in self._checked_taps(taps):
            spec = self.manifest.taps[tap]
            found[tap] = np.empty((block.rows, *spec.shape), dtype=spec.dtype)
            read_chunk(self.path, self.manifest, self._journal, tap, block, found[tap])
        return found

    def read(
        self, sample_ids: Sequence[int] | NDArray[Any], view: int, taps: Sequence[str] | None = None
    ) -> dict[str, NDArray[Any]]:
        """Records of some samples, in the order asked for: tap -> (len(sample_ids), *tap shape).

        Reads whole blocks, so it is for looking at a few samples; to train, read views.
        Raises UnknownView (also for a sample that is not there), UnknownTap, CacheDamaged.
        """
        ids = np.asarray(sample_ids, dtype=np.int64)
        outside = ids[(ids < 0) | (ids >= self.num_samples)]
        if outside.size:
            raise UnknownView(f"no sample {outside[0]}: {self.path} holds {self.num_samples}")
        names = self._checked_taps(taps)
        found = {
            tap: np.empty((len(ids), *self.taps[tap].shape), dtype=self.taps[tap].dtype)
            for tap in names
        }
        self._check_view(view)
        owners = ids // self.manifest.block_rows
        for index in np.unique(owners):
            block = self.manifest.block(view, int(index))
            records = self.read_block(block, names)
            wanted = owners == index
            for tap in names:
                found[tap][wanted] = records[tap][ids[wanted] - block.start]
        return found

    def _check_view(self, view: int) -> None:
        if not 0 <= view < self.num_views:
            raise UnknownView(f"no view {view}: {self.path} holds views 0 to {self.num_views - 1}")

    def _checked_taps(self, taps: Sequence[str] | None) -> list[str]:
        names = list(self.manifest.taps) if taps is None else list(taps)
        for name in names:
            if name not in self.manifest.taps:
                known = ", ".join(self.manifest.taps)
                raise UnknownTap(f"no tap {name!r}: {self.path} holds {known}")
        return names


def find_cache(caches_dir: Path, teacher: str, identity: Identity) -> TeacherCache:
    """The cache of exactly this identity; CacheMissing says how the nearest one differs.

    Where the identity leaves the weights open (weights_sha256 is None), the one cache that agrees
    in everything else.
    """
    mend = f"make cache-teacher TEACHER={teacher}"
    exact = cache_path(caches_dir, teacher, identity)
    if (exact / MANIFEST).is_file():
        return TeacherCache.open(exact)
    others = [
        (path, differing_fields(identity, read_manifest(path).identity))
        for path in sorted(caches_dir.glob(f"{teacher}-*"))
        if (path / MANIFEST).is_file()
    ]
    same = [path for path, lines in others if _only_weights_unknown(lines)]
    if len(same) == 1:
        return TeacherCache.open(same[0])
    if len(same) > 1:
        names = ", ".join(path.name for path in same)
        raise CacheMismatch(
            f"caches of several weights fit: {names}; the teacher's file is missing"
        )
    if not others:
        raise CacheMissing(f"{caches_dir} holds no cache of the teacher {teacher!r}", mend=mend)
    path, lines = min(others, key=lambda item: len(item[1]))
    problem = [f"{caches_dir} holds no cache of this teacher; {path.name} differs in", *lines]
    raise CacheMismatch("\n  ".join(problem), mend=mend)


def _only_weights_unknown(differences: list[str]) -> bool:
    return all(line.startswith(_UNKNOWN_WEIGHTS) for line in differences)


def _refuse_incomplete(path: Path, manifest: Manifest, journal: Journal) -> None:
    total = manifest.num_views * manifest.blocks_per_view
    missing = [
        (tap, block)
        for tap in manifest.taps
        for block in manifest.blocks()
        if (tap, block.view, block.index) not in journal.committed
    ]
    if not missing:
        return
    if journal.damaged_lines:
        raise damaged(manifest, [Fault("journal damaged", Path(journal.damaged_lines[0]))])
    tap, block = missing[0]
    done = total - len({block for _, block in missing})
    raise CacheIncomplete(
        f"{path} is not finished: {done:,} of {total:,} blocks are there; the first that is not: "
        f"tap {tap}, view {block.view}, block {block.index}",
        mend=mend_command(manifest),
    )


def _read_labels(path: Path, manifest: Manifest) -> NDArray[np.int64]:
    file = path / ZARR_GROUP / LABELS / "c.0"
    try:
        data = np.frombuffer(file.read_bytes(), dtype=np.uint8)
    except FileNotFoundError:
        raise damaged(manifest, [Fault("labels missing", file)]) from None
    labels = data[:-CHECKSUM_BYTES]
    trailer = data[-CHECKSUM_BYTES:]
    whole = len(labels) == manifest.num_samples * np.dtype(LABELS_DTYPE).itemsize
    sums = {crc32c(labels), int(manifest.labels_crc32c, 16), int.from_bytes(trailer, "little")}
    if not whole or len(sums) != 1:
        raise damaged(manifest, [Fault("labels damaged", file)])
    return labels.view("<i8")
