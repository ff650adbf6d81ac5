"""Open a complete cache that belongs to the requested configuration, and read from it."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property, wraps
from importlib.metadata import version
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np
from numpy.typing import NDArray

from teach_once.runtime.command.program import pip_install, program_text
from teach_once.runtime.formats import counted
from teach_once.runtime.machine.urls import path_or_url
from teach_once.store.errors import (
    CacheIncomplete,
    CacheMismatch,
    Fault,
    PassCommand,
    RemoteFix,
    Spell,
    UnknownTap,
    UnknownView,
    damage_error,
    fixes_spelled_by,
)
from teach_once.store.format.coding import restored
from teach_once.store.format.content import whole_differences
from teach_once.store.format.spec import (
    DIGEST_BYTES,
    LABELS,
    LABELS_DTYPE,
    PREVIEW,
    SAMPLE_DIGEST,
    Block,
    TapSpec,
    expanded,
    kind_of,
    optional_taps,
    tap_of,
)
from teach_once.store.identity import Identity, differences, with_weights_of
from teach_once.store.place.parallel import in_threads
from teach_once.store.read.source import Source, changed_place, open_source
from teach_once.store.read.steady import open_steadily


def planned_taps(taps: Collection[str], source: Source) -> list[str]:
    """Return these taps, in order. Raises UnknownTap if the cache does not plan one of them."""
    for name in taps:
        if name not in source.manifest.taps:
            known = ", ".join(source.manifest.taps)
            raise UnknownTap(f"no tap {name!r}: {source.path} contains {known}")
    return list(taps)


def refuse_incomplete(source: Source, num_views: int, taps: Collection[str]) -> None:
    """Raise CacheIncomplete if the first `num_views` views lack some of `taps`.

    Raises CacheDamaged if the journal has an unreadable line, because that may be the reason.
    """
    lacks = source.coverage.lacking_any(taps, num_views)
    if not lacks.any():
        return
    manifest = source.manifest
    if source.unreadable_lines:
        line = source.unreadable_lines[0]
        raise damage_error(source.fix, [Fault(f"journal damaged, {line}", source.path)])
    done = lacks.size - int(lacks.sum())
    view, index = divmod(int(lacks.argmax()), lacks.shape[1])
    array = next(
        array
        for array, there in source.coverage.there.items()
        if tap_of(array) in taps and not there[view, index]
    )
    lacking, optional = _first_views(source, num_views), optional_taps(manifest.taps)
    whole_views = _whole_views(lacking, optional, num_views)
    problem = (
        f"{source.path} is not finished: {done:,} of {lacks.size:,} blocks are committed; the "
        f"first missing block is tap {array}, view {view}, block {index}"
    )
    is_folder = isinstance(source.fix, PassCommand) and not isinstance(source.fix, RemoteFix)
    if whole_views and is_folder:
        command = _trim_command(source, num_views, lacking, optional)
        problem += f"\n  to keep only the complete part: {command}"
    opt_in = {tap: manifest.taps[tap] for tap in lacking if tap in optional}
    asked = (f"views.count={num_views}", *_settings_of(opt_in)) if whole_views else ()
    caches = source.fix.caches if isinstance(source.fix, PassCommand) else Path("caches")
    raise CacheIncomplete(problem, fix=PassCommand(manifest.teacher, asked, caches=caches))


def _first_views(source: Source, num_views: int) -> dict[str, int]:
    """Return {tap: the first of `num_views` views that lacks a block of it}."""
    taps = source.coverage.incomplete_taps(num_views)
    found = ((tap, source.coverage.first_lacking_view(tap, num_views)) for tap in taps)
    ordered = {tap: view for tap, view in found if view is not None}
    return {tap: ordered[tap] for tap in source.manifest.stored if tap in ordered}


def _whole_views(lacking: Mapping[str, int], optional: Collection[str], num_views: int) -> int:
    """Return the number of leading views that have all required taps."""
    return min((view for tap, view in lacking.items() if tap not in optional), default=num_views)


def _trim_command(
    source: Source, num_views: int, lacking: Mapping[str, int], optional: Collection[str]
) -> str:
    """Return the command that drops the views and taps of an unfinished growth."""
    whole_views = _whole_views(lacking, optional, num_views)
    dropped = ",".join(
        tap for tap, view in lacking.items() if tap in optional and view < whole_views
    )
    words = [program_text("store"), "trim", shlex.quote(str(source.path))]
    words += [f"--views {whole_views}"] if whole_views < num_views else []
    words += [f"--drop-taps {dropped}"] if dropped else []
    return " ".join(words)


def _settings_of(opt_in: Mapping[str, TapSpec]) -> list[str]:
    """Return the settings of the teacher's file that request these taps."""
    others = {f"taps.{kind_of(tap)}={spec.dtype}" for tap, spec in opt_in.items() if tap != "hint"}
    hint = opt_in.get("hint")
    return [
        *sorted(others),
        *([f"taps.hint.stage={hint.stage}", f"taps.hint.dtype={hint.dtype}"] if hint else []),
    ]


P = ParamSpec("P")
Result = TypeVar("Result")


def _in_the_users_words(
    method: Callable[Concatenate[TeacherCache, P], Result],
) -> Callable[Concatenate[TeacherCache, P], Result]:
    """Print the user's own command in a method's errors, if the cache has it."""

    @wraps(method)
    def spelled(cache: TeacherCache, /, *args: P.args, **options: P.kwargs) -> Result:
        if cache.spell is None:
            return method(cache, *args, **options)
        with fixes_spelled_by(cache.spell):
            return method(cache, *args, **options)

    return spelled


class TeacherCache:
    """A cache for reading. Its arrays are (samples, ...) in the dataset's order.

    Safe to share between threads and across `fork`, because no file stays open.
    """

    def __init__(self, source: Source, num_views: int, taps: Mapping[str, TapSpec]) -> None:
        self.path = source.path
        self.source = source
        self.manifest = source.manifest
        self.num_views = num_views
        self.taps = dict(taps)
        self.spell: Spell | None = None  # prints the user's own command as an error's fix
        self._labels: NDArray[np.int64] | None = None
        if LABELS in self.manifest.whole:
            self._labels = source.read_whole(LABELS, (self.num_samples,), LABELS_DTYPE)

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        num_views: int | None = None,
        taps: Collection[str] | None = None,
    ) -> TeacherCache:
        """Open the cache in folder, HDF5 file, or at the URL `path`.

        num_views: open only the first views; taps: require only these to be complete. Both work on
        a cache that is still growing, or whose growth was abandoned. Default: all. The opened cache
        also has every other complete tap. Every byte of a chunk is checked when it is read.

        Raises CacheMissing, CacheMismatch (another format version), CacheIncomplete, CacheDamaged,
        UnknownView or UnknownTap.
        """
        where = path_or_url(path)
        return open_steadily(changed_place(where), lambda: cls._opened(where, num_views, taps))

    @classmethod
    def _opened(
        cls, path: Path, num_views: int | None, taps: Collection[str] | None
    ) -> TeacherCache:
        source = open_source(path)
        manifest = source.manifest
        views = manifest.num_views if num_views is None else num_views
        if not 1 <= views <= manifest.num_views:
            raise UnknownView(
                f"num_views is {num_views}, but {path} is planned for "
                f"{counted(manifest.num_views, 'view')}",
                fix=PassCommand(manifest.teacher, (f"views.count={num_views}",)),
            )
        required = list(manifest.stored) if taps is None else planned_taps(taps, source)
        refuse_incomplete(source, views, required)
        absent = source.coverage.incomplete_taps(views)
        complete = {tap: spec for tap, spec in manifest.taps.items() if tap not in absent}
        faults = source.metadata_faults(complete)
        if faults:
            raise damage_error(source.fix, faults)
        return cls(source, views, complete)

    @_in_the_users_words
    def refuse_incomplete(self, taps: Collection[str]) -> None:
        """Raise CacheIncomplete unless these taps are complete, UnknownTap if one is unplanned."""
        names = planned_taps(taps, self.source)
        if not set(names) <= set(self.taps):
            refuse_incomplete(self.source, self.num_views, names)

    @property
    def labels(self) -> NDArray[np.int64] | None:
        """(N,) int64; None if the samples have no classes."""
        return self._labels

    @property
    def class_names(self) -> list[str] | None:
        """The names in the order of the labels; None if the samples have no classes."""
        return self.manifest.class_names

    @property
    def whole(self) -> dict[str, NDArray[Any]]:
        """The arrays that are stored in one piece: the preview and, with classes, the labels."""
        labels = {} if self._labels is None else {LABELS: self._labels}
        return {**labels, PREVIEW: self.preview}

    @property
    def num_samples(self) -> int:
        return self.manifest.num_samples

    @property
    def identity(self) -> Identity:
        return self.manifest.identity

    @property
    def measured(self) -> dict[str, Any]:
        """Metrics of the teacher from the pass; empty until the first pass has ended."""
        return self.manifest.measured

    @property
    def nbytes(self) -> int:
        """Bytes of all readable records."""
        record_bytes = sum(spec.bytes_per_record for spec in self.taps.values())
        return record_bytes * self.num_samples * self.num_views

    @cached_property
    @_in_the_users_words
    def sample_digest(self) -> NDArray[np.uint8]:
        """(N, 16) uint8: the BLAKE2b-128 of each sample's bytes as the teacher saw them.

        The bytes are its file's, or its pixels if it has no file. Raises CacheIncomplete,
        CacheDamaged.
        """
        digests = np.empty((self.num_samples, DIGEST_BYTES), dtype=np.uint8)
        refuse_incomplete(self.source, 1, [SAMPLE_DIGEST])
        blocks = list(self.manifest.blocks(1))
        self.source.fetch([(SAMPLE_DIGEST, block) for block in blocks])
        for block in blocks:
            self.source.read(SAMPLE_DIGEST, block, digests[block.start : block.stop])
        return digests

    @property
    @_in_the_users_words
    def preview(self) -> NDArray[np.uint8]:
        """(n, H, W, C) uint8: the first views of sample 0."""
        return self.source.read_whole(PREVIEW, tuple(self.manifest.preview_shape), "uint8")

    def faults(self, *, on_chunk: Callable[[int], None] | None = None) -> list[Fault]:
        """Read every byte and return all faults. on_chunk: see `Source.faults`."""
        return self.source.faults(every_byte=True, num_views=self.num_views, on_chunk=on_chunk)

    def refuse_unless(
        self,
        identity: Identity,
        *,
        labels: NDArray[np.int64] | None,
        canary: Mapping[str, Any],
    ) -> None:
        """Raise CacheMismatch unless the cache has this identity, these labels and pixels.

        labels: (N,) int64; None if the samples have no classes. If the weights file is missing,
        only the known part of its digest is compared (see `with_weights_of`).
        """
        differing = differences(with_weights_of(identity, self.identity), self.identity)
        whole: dict[str, NDArray[Any]] = {}
        if labels is not None:
            whole[LABELS] = np.ascontiguousarray(labels, dtype=LABELS_DTYPE)
        differing += whole_differences(whole, self.manifest)
        if differing:
            raise CacheMismatch(
                f"{self.path} belongs to another configuration",
                differences=differing,
                fix=PassCommand(self.manifest.teacher),
            )
        if dict(canary) != self.manifest.canary:
            raise self._other_pixels()

    def _other_pixels(self) -> CacheMismatch:
        """Return the error for another canary, which another pass into this cache cannot fix."""
        then, now = self.manifest.versions.get("pillow"), version("pillow")
        problem = (
            f"{self.path}: the views replayed from this dataset differ from the teacher's views, "
            f"because its images have changed or are decoded differently; they need a new cache"
        )
        before = f"mv {shlex.quote(str(self.path))} {shlex.quote(f'{self.path.name}.old')} && "
        if then != now:
            problem += f"\n  Pillow: {then or 'unknown'} when the cache was made, {now} now"
            before = f"{pip_install(f'pillow=={then}')}; or {before}" if then else before
        return CacheMismatch(problem, fix=PassCommand(self.manifest.teacher, before=before))

    @_in_the_users_words
    def read_view(
        self, view: int, taps: Sequence[str] | None = None, *, compact: bool = False
    ) -> dict[str, NDArray[Any]]:
        """Read all records of one view: tap -> (N, *tap shape), with every checksum verified.

        compact: leave truncated logits in their three stored arrays, see `store.format.spec`.
        Raises UnknownView, UnknownTap, CacheDamaged.
        """
        self._check_view(view)
        blocks = [self.manifest.block(view, i) for i in range(self.manifest.blocks_per_view)]
        names = self._checked_taps(taps)
        self._fetch(blocks, names)
        self._refuse_missing_bytes(names, blocks)
        records = self._empty(names, self.num_samples, compact)
        reads = [(name, block) for name in records for block in blocks]

        def read(which: tuple[str, Block]) -> None:
            name, block = which
            self._read_into(records[name][block.start : block.stop], name, block, compact)

        for _ in in_threads(read, reads, sum(values.nbytes for values in records.values())):
            pass
        return records

    @_in_the_users_words
    def fetch_blocks(self, blocks: Sequence[Block], taps: Sequence[str]) -> None:
        """Fetch blocks that will be read, if the cache is remote."""
        self._fetch(blocks, self._checked_taps(taps))

    def _fetch(self, blocks: Sequence[Block], taps: Sequence[str]) -> None:
        """Fetch many blocks at a time, if the cache is remote."""
        arrays = [array for tap in taps for array in self.manifest.taps[tap].arrays(tap)]
        self.source.fetch([(array, block) for block in blocks for array in arrays])

    def _refuse_missing_bytes(self, taps: Sequence[str], blocks: Sequence[Block]) -> None:
        """Raise CacheDamaged before memory is allocated for missing bytes."""
        for tap in taps:
            for array in self.manifest.taps[tap].arrays(tap):
                for block in blocks:
                    if (fault := self.source.size_fault(array, block)) is not None:
                        raise damage_error(self.source.fix, [fault])

    @_in_the_users_words
    def read_block(
        self, block: Block, taps: Sequence[str] | None = None, *, compact: bool = False
    ) -> dict[str, NDArray[Any]]:
        """Read the records of one block: tap -> (rows, *tap shape); raises as `read_view`."""
        self._check_view(block.view)
        names = self._checked_taps(taps)
        self._fetch([block], names)
        records = self._empty(names, block.rows, compact)
        for name, values in records.items():
            self._read_into(values, name, block, compact)
        return records

    @_in_the_users_words
    def read_first_block(self, taps: Sequence[str]) -> dict[str, NDArray[Any]]:
        """Read the first block of view 0 that has all these taps: tap -> (rows, ...).

        Empty if no such block is committed. The taps need not be complete. Raises CacheDamaged.
        """
        lacks = self.source.coverage.lacking_any(taps, 1)[0]
        if lacks.all():
            return {}
        block = self.manifest.block(0, int(lacks.argmin()))
        self._fetch([block], taps)
        records = self._empty(taps, block.rows)
        for name, values in records.items():
            self._read_into(values, name, block, compact=False)
        return records

    @_in_the_users_words
    def read(
        self, sample_ids: Sequence[int] | NDArray[Any], view: int, taps: Sequence[str] | None = None
    ) -> dict[str, NDArray[Any]]:
        """Read records of some samples in the requested order: tap -> (len(sample_ids), *tap
        shape).

        Reads whole blocks, so it is meant for a few samples; training reads views. Raises
        UnknownView (also for an unknown sample), UnknownTap, CacheDamaged.
        """
        ids = np.asarray(sample_ids, dtype=np.int64)
        outside = ids[(ids < 0) | (ids >= self.num_samples)]
        if outside.size:
            raise UnknownView(f"no sample {outside[0]}: {self.path} contains {self.num_samples}")
        self._check_view(view)
        names = self._checked_taps(taps)
        records = self._empty(names, len(ids))
        owners = ids // self.manifest.block_rows
        for index in np.unique(owners):
            block = self.manifest.block(view, int(index))
            of_block = self.read_block(block, names)
            wanted = owners == index
            for tap in names:
                records[tap][wanted] = of_block[tap][ids[wanted] - block.start]
        return records

    def _empty(
        self, taps: Sequence[str], rows: int, compact: bool = False
    ) -> dict[str, NDArray[Any]]:
        found = {}
        for tap in taps:
            spec = self.manifest.taps[tap]
            if compact and spec.top:
                for name, array in spec.arrays(tap).items():
                    found[name] = np.empty((rows, *array.shape), array.dtype)
            else:
                found[tap] = np.empty((rows, *spec.shape), spec.read_dtype)
        return found

    def _read_into(self, out: NDArray[Any], name: str, block: Block, compact: bool) -> None:
        """Read a block of a tap into `out`. name: the tap, or an array of a compact one."""
        spec = self.manifest.taps[tap_of(name)]
        if spec.scale is None and (compact or not spec.top):
            self.source.read(name, block, out)
            return
        self._restore_into(out, name, spec, block)

    def _restore_into(self, out: NDArray[Any], tap: str, spec: TapSpec, block: Block) -> None:
        arrays = {}
        for name, array in spec.arrays(tap).items():
            rows = self.manifest.rows_in(array, block)
            arrays[name] = np.empty((rows, *array.shape), dtype=array.dtype)
            self.source.read(name, block, arrays[name])
        if spec.scale is None:
            out[:] = expanded(arrays, tap, spec.shape[0])
        else:
            out[:] = restored(arrays[tap], arrays[f"{tap}.scale"], spec.scale)

    def _check_view(self, view: int) -> None:
        if not 0 <= view < self.num_views:
            raise UnknownView(
                f"no view {view}: {self.path} contains views 0 to {self.num_views - 1}"
            )

    def _checked_taps(self, taps: Sequence[str] | None) -> list[str]:
        if taps is None:
            return list(self.taps)
        self.refuse_incomplete(taps)
        return list(taps)
