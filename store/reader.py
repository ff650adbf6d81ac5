"""Opens a cache, after convincing itself that it is the right one and whole, and reads from it."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from store.chunks import Fault, FolderSource, damaged
from store.content import whole_differences
from store.differences import differences
from store.errors import (
    CacheAmbiguous,
    CacheError,
    CacheIncomplete,
    CacheMismatch,
    CacheMissing,
    TeacherPass,
    UnknownTap,
    UnknownView,
)
from store.hdf5 import Hdf5Source, is_hdf5
from store.identity import Identity, identity_sha256, with_weights_of
from store.journal import read_journal
from store.layout import (
    LABELS,
    LABELS_DTYPE,
    MANIFEST,
    PREVIEW,
    SAMPLE_CRC,
    Block,
    TapSpec,
    cache_path,
    is_opt_in,
    tap_of,
)
from store.manifest import Manifest, read_manifest
from store.parallel import in_threads
from store.quantise import restore_channels, restore_rows

WITHOUT_CHECKSUMS = (
    "was made without checksums of its samples: an image that has changed since may go unnoticed"
)


class Source(Protocol):
    """Where a cache's arrays are: a folder of chunks, or an HDF5 file."""

    @property
    def manifest(self) -> Manifest: ...

    def has(self, array: str, block: Block) -> bool: ...

    def read(self, array: str, block: Block, out: NDArray[Any]) -> None: ...

    def read_whole(self, name: str, shape: tuple[int, ...], dtype: str) -> NDArray[Any]: ...

    def metadata_faults(self, taps: Collection[str]) -> list[Fault]: ...

    def faults(
        self,
        *,
        read: bool,
        num_views: int | None = None,
        on_chunk: Callable[[int], None] | None = None,
    ) -> list[Fault]: ...


class TeacherCache:
    """A cache, for reading. Its arrays are (samples, ...) in the dataset's order.

    Safe to share between threads and across `fork`: it holds no open file.
    """

    def __init__(
        self, path: Path, source: Source, num_views: int, taps: Mapping[str, TapSpec]
    ) -> None:
        self.path = path
        self.source = source
        self.manifest = source.manifest
        self.num_views = num_views
        self.taps = dict(taps)
        self.labels: NDArray[np.int64] = source.read_whole(
            LABELS, (self.num_samples,), LABELS_DTYPE
        )

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        num_views: int | None = None,
        taps: Collection[str] | None = None,
    ) -> TeacherCache:
        """Open the cache in folder, or HDF5 file, `path`.

        num_views: open only the first so many views; taps: refuse only where these are not whole.
        Both are possible before all is there, or where a growth was given up; default: all. Of the
        other taps the opened cache has those that are whole.

        Raises CacheMissing, CacheMismatch (written by another format version), CacheIncomplete,
        CacheDamaged, UnknownView or UnknownTap. What is there is said by the journal; a chunk is
        looked at when it is read, then at every byte of it.
        """
        path = Path(path)
        source = open_source(path)
        manifest = source.manifest
        views = manifest.num_views if num_views is None else num_views
        if not 1 <= views <= manifest.num_views:
            raise UnknownView(
                f"num_views is {num_views}, but {path} is planned for {manifest.num_views} views",
                fix=TeacherPass(manifest.teacher, (f"views.count={num_views}",)),
            )
        needed = list(manifest.stored) if taps is None else _known(taps, manifest.taps, path)
        missing = missing_blocks(source, views)
        _refuse_incomplete(path, source, views, needed, missing)
        absent = {tap_of(array) for array, _ in missing}
        whole = {tap: spec for tap, spec in manifest.taps.items() if tap not in absent}
        faults = source.metadata_faults(whole)
        if faults:
            raise damaged(manifest, faults)
        return cls(path, source, views, whole)

    def refuse_incomplete(self, taps: Collection[str]) -> None:
        """Raise CacheIncomplete unless these taps are whole, UnknownTap if one is not planned."""
        names = _known(taps, self.manifest.taps, self.path)
        if not set(names) <= set(self.taps):
            missing = missing_blocks(self.source, self.num_views)
            _refuse_incomplete(self.path, self.source, self.num_views, names, missing)

    @property
    def num_samples(self) -> int:
        return self.manifest.num_samples

    @property
    def identity(self) -> Identity:
        return self.manifest.identity

    @property
    def measured(self) -> dict[str, Any]:
        """What the pass found out about the teacher; empty if it was stopped before its end."""
        return self.manifest.measured

    @property
    def nbytes(self) -> int:
        """Bytes of all records that can be read."""
        record_bytes = sum(spec.bytes_per_record for spec in self.taps.values())
        return record_bytes * self.num_samples * self.num_views

    @cached_property
    def sample_crc32c(self) -> NDArray[np.uint32] | None:
        """(N,) uint32: the crc32c of the bytes of each sample (its file's, or its pixels where it
        has no file) that the teacher saw; None of a cache that was made without. Raises
        CacheIncomplete, CacheDamaged.
        """
        if not self.manifest.sample_crc32c:
            return None
        missing = missing_blocks(self.source, 1)
        _refuse_incomplete(self.path, self.source, 1, [SAMPLE_CRC], missing)
        found = np.empty(self.num_samples, dtype=np.uint32)
        for index in range(self.manifest.blocks_per_view):
            block = self.manifest.block(0, index)
            self.source.read(SAMPLE_CRC, block, found[block.start : block.stop])
        return found

    @property
    def preview(self) -> NDArray[np.uint8]:
        """(n, H, W, C) uint8: the first views of sample 0."""
        return self.source.read_whole(PREVIEW, tuple(self.manifest.preview_shape), "uint8")

    def faults(self, *, on_chunk: Callable[[int], None] | None = None) -> list[Fault]:
        """Read every byte; what is not sound."""
        return self.source.faults(read=True, num_views=self.num_views, on_chunk=on_chunk)

    def refuse_unless(
        self,
        identity: Identity,
        *,
        labels: NDArray[np.int64],
        canary: Mapping[str, Any],
    ) -> None:
        """Raise CacheMismatch unless this cache is of that identity, those labels and pixels.

        Of weights that are not at hand only what is known is compared: see `with_weights_of`.
        """
        differing = differences(with_weights_of(identity, self.identity), self.identity)
        whole = {LABELS: np.ascontiguousarray(labels, dtype=LABELS_DTYPE)}
        differing += whole_differences(whole, self.manifest)
        if differing:
            raise CacheMismatch(
                f"{self.path} belongs to another configuration",
                differences=differing,
                fix=TeacherPass(self.manifest.teacher),
            )
        if dict(canary) != self.manifest.canary:
            raise self._other_pixels()

    def _other_pixels(self) -> CacheMismatch:
        """The error where the canary differs: no pass into this cache would help."""
        made, here = self.manifest.versions.get("pillow"), version("pillow")
        problem = (
            f"{self.path}: the views replayed from this dataset are not those the teacher saw: its "
            f"images have changed, or are decoded in another way; they need a cache of their own"
        )
        path = shlex.quote(str(self.path))
        before = f"mv {path} {self.path.name}.old && "
        if made != here:
            problem += f"\n  Pillow: {made or 'unknown'} when the cache was made, {here} here"
            before = f"python -m pip install pillow=={made}; or {before}" if made else before
        return CacheMismatch(problem, fix=TeacherPass(self.manifest.teacher, before=before))

    def read_view(self, view: int, taps: Sequence[str] | None = None) -> dict[str, NDArray[Any]]:
        """All records of one view: tap -> (N, *tap shape), every checksum verified.

        Raises UnknownView, UnknownTap, CacheDamaged.
        """
        self._check_view(view)
        blocks = [self.manifest.block(view, i) for i in range(self.manifest.blocks_per_view)]
        specs = {tap: self.manifest.taps[tap] for tap in self._checked_taps(taps)}
        found = {
            tap: np.empty((self.num_samples, *spec.shape), dtype=spec.read_dtype)
            for tap, spec in specs.items()
        }
        reads = [(tap, block) for tap in found for block in blocks]

        def read(which: tuple[str, Block]) -> None:
            tap, block = which
            self._read_tap(tap, block, found[tap][block.start : block.stop])

        for _ in in_threads(read, reads, sum(values.nbytes for values in found.values())):
            pass
        return found

    def read_block(
        self, block: Block, taps: Sequence[str] | None = None
    ) -> dict[str, NDArray[Any]]:
        """The records of one block: tap -> (rows, *tap shape); raises as `read_view`."""
        self._check_view(block.view)
        found = {}
        for tap in self._checked_taps(taps):
            spec = self.manifest.taps[tap]
            found[tap] = np.empty((block.rows, *spec.shape), dtype=spec.read_dtype)
            self._read_tap(tap, block, found[tap])
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
        self._check_view(view)
        names = self._checked_taps(taps)
        specs = self.manifest.taps
        found = {
            tap: np.empty((len(ids), *specs[tap].shape), dtype=specs[tap].read_dtype)
            for tap in names
        }
        owners = ids // self.manifest.block_rows
        for index in np.unique(owners):
            block = self.manifest.block(view, int(index))
            records = self.read_block(block, names)
            wanted = owners == index
            for tap in names:
                found[tap][wanted] = records[tap][ids[wanted] - block.start]
        return found

    def _read_tap(self, tap: str, block: Block, out: NDArray[Any]) -> None:
        spec = self.manifest.taps[tap]
        if spec.scale is None:
            self.source.read(tap, block, out)
            return
        arrays = {}
        for name, array in spec.arrays(tap).items():
            rows = self.manifest.rows_in(array, block)
            arrays[name] = np.empty((rows, *array.shape), dtype=array.dtype)
            self.source.read(name, block, arrays[name])
        restore = restore_rows if spec.scale == "row" else restore_channels
        out[:] = restore(arrays[tap], arrays[f"{tap}.scale"])

    def _check_view(self, view: int) -> None:
        if not 0 <= view < self.num_views:
            raise UnknownView(f"no view {view}: {self.path} holds views 0 to {self.num_views - 1}")

    def _checked_taps(self, taps: Sequence[str] | None) -> list[str]:
        if taps is None:
            return list(self.taps)
        self.refuse_incomplete(taps)
        return list(taps)


def find_cache(
    caches_dir: Path,
    teacher: str,
    identity: Identity,
    *,
    num_views: int | None = None,
    taps: Collection[str] | None = None,
) -> TeacherCache:
    """The cache of exactly this identity, under whatever name its folder has.

    Raises CacheMissing where `teacher` has none, else CacheMismatch: how the nearest one differs.

    Where the weights are not at hand, the one cache that agrees in all that is known; several raise
    CacheAmbiguous. num_views and taps as in `TeacherCache.open`.
    """
    fix = TeacherPass(teacher)
    exact = cache_folder(caches_dir, teacher, identity)
    if (exact / MANIFEST).is_file():
        return TeacherCache.open(exact, num_views=num_views, taps=taps)
    every = [
        (path, differences(with_weights_of(identity, theirs), theirs))
        for path, theirs in _identities(caches_dir)
    ]
    same = [path for path, differing in every if not differing]
    if len(same) == 1:
        return TeacherCache.open(same[0], num_views=num_views, taps=taps)
    if len(same) > 1:
        names = ", ".join(path.name for path in same)
        raise CacheAmbiguous(
            f"caches of several weights fit ({names}), and the teacher's weights file is missing",
            fix="name one with --cache PATH (make train-student CACHE=PATH)",
        )
    others = [each for each in every if each[0].name.startswith(f"{teacher}-")]
    if not others:
        raise CacheMissing(f"{caches_dir} holds no cache of the teacher {teacher!r}", fix=fix)
    path, differing = min(others, key=lambda item: len(item[1]))
    raise CacheMismatch(
        f"{caches_dir} holds no cache of this configuration; {path.name} differs in",
        differences=differing,
        fix=fix,
    )


def cache_folder(caches_dir: Path, teacher: str, identity: Identity) -> Path:
    """Where the cache of this identity is, whatever its folder is called; or is to be made.

    The usual name counts first, also where what is there has a manifest that cannot be read.
    """
    usual = cache_path(caches_dir, teacher, identity)
    of_usual = _identity_at(usual)
    if (usual / MANIFEST).exists() and (of_usual is None or _same(of_usual, identity)):
        return usual
    same = [path for path, found in _identities(caches_dir) if _same(found, identity)]
    return same[0] if same else usual


def other_dataset_state(caches_dir: Path, identity: Identity) -> TeacherCache | None:
    """A complete cache that differs from `identity` in the samples alone; the newest of several."""
    others = [
        path for path, found in _identities(caches_dir) if differs_in_samples_alone(identity, found)
    ]
    for path in sorted(others, key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            return TeacherCache.open(path)
        except CacheError:
            continue
    return None


def differs_in_samples_alone(identity: Identity, other: Identity) -> bool:
    """Whether nothing but the dataset's digest differs; weights that are away may be any."""
    differing = differences(with_weights_of(identity, other), other)
    return [each.field for each in differing] == ["dataset.digest"]


def missing_blocks(source: Source, num_views: int | None = None) -> list[tuple[str, Block]]:
    """(array, block) of everything that has not been committed."""
    manifest = source.manifest
    views = manifest.num_views if num_views is None else num_views
    arrays = list(manifest.arrays)
    return [
        (array, block)
        for block in manifest.blocks(views)
        for array in arrays
        if not source.has(array, block)
    ]


def open_source(path: Path) -> Source:
    """The arrays at `path`, complete or not. Raises CacheMissing, CacheDamaged, CacheMismatch."""
    if path.is_file() and is_hdf5(path):
        return Hdf5Source.open(path)
    manifest = read_manifest(path)
    return FolderSource(path, manifest, read_journal(path, identity_sha256(manifest.identity)))


def _identities(caches_dir: Path) -> list[tuple[Path, Identity]]:
    """Every cache folder of `caches_dir`, by name, with its identity."""
    paths = sorted(caches_dir.iterdir()) if caches_dir.is_dir() else []
    found = ((path, _identity_at(path)) for path in paths)
    return [(path, identity) for path, identity in found if identity is not None]


def _identity_at(path: Path) -> Identity | None:
    """The identity of the cache at `path`; None if there is none that can be read."""
    try:
        return read_manifest(path).identity
    except CacheError:
        return None


def _same(one: Identity, other: Identity) -> bool:
    return identity_sha256(one) == identity_sha256(other)


def _known(taps: Collection[str], planned: Collection[str], path: Path) -> list[str]:
    for name in taps:
        if name not in planned:
            raise UnknownTap(f"no tap {name!r}: {path} holds {', '.join(planned)}")
    return list(taps)


def _refuse_incomplete(
    path: Path,
    source: Source,
    num_views: int,
    taps: Collection[str],
    missing: Sequence[tuple[str, Block]],
) -> None:
    """Raise where one of `taps` is among `missing`, which is of the first `num_views` views."""
    wanted = [(array, block) for array, block in missing if tap_of(array) in taps]
    if not wanted:
        return
    manifest = source.manifest
    if isinstance(source, FolderSource) and source.journal.damaged_lines:
        where = Path(source.journal.damaged_lines[0])
        raise damaged(manifest, [Fault("journal damaged", where)])
    array, block = wanted[0]
    total = num_views * manifest.blocks_per_view
    done = total - len({(block.view, block.index) for _, block in wanted})
    finish, kept = _remedies(path, manifest, num_views, missing)
    raise CacheIncomplete(
        f"{path} is not finished: {done:,} of {total:,} blocks are there; the first that is not: "
        f"tap {array}, view {block.view}, block {block.index}{kept}",
        fix=finish,
    )


def _remedies(
    path: Path, manifest: Manifest, num_views: int, missing: Sequence[tuple[str, Block]]
) -> tuple[TeacherPass, str]:
    """The command that finishes a cache; where a growth can be taken back, how, as a line."""
    first: dict[str, int] = {}  # tap -> the first view that lacks some of it
    for array, block in missing:
        first.setdefault(tap_of(array), block.view)
    whole = min((view for tap, view in first.items() if not is_opt_in(tap)), default=num_views)
    if whole == 0:
        return TeacherPass(manifest.teacher), ""
    opt_in = {tap: manifest.taps[tap] for tap in first if is_opt_in(tap)}
    overrides = (f"views.count={num_views}", *_settings_of(opt_in))
    dropped = ",".join(tap for tap in opt_in if first[tap] < whole)
    trim = [f"python -m store trim {shlex.quote(str(path))}"]
    trim += [f"--views {whole}"] if whole < num_views else []
    trim += [f"--drop-taps {dropped}"] if dropped else []
    kept = f"\n  to keep what is whole and no more: {' '.join(trim)}"
    return TeacherPass(manifest.teacher, overrides), kept


def _settings_of(opt_in: Mapping[str, TapSpec]) -> list[str]:
    """The keys of the teacher's file that ask for these taps."""
    energy = {f"taps.energy={spec.dtype}" for tap, spec in opt_in.items() if tap != "hint"}
    hint = opt_in.get("hint")
    return [
        *energy,
        *([f"taps.hint.stage={hint.stage}", f"taps.hint.dtype={hint.dtype}"] if hint else []),
    ]
