"""Convert a cache between its two forms: a folder of zarr chunks, and one HDF5 file."""

from __future__ import annotations

import math
import os
import re
import shlex
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
from numpy.typing import NDArray

from teach_once.runtime.formats import format_size
from teach_once.runtime.safe.confined import make_folder_inside, write_inside
from teach_once.runtime.safe.files import written_aside
from teach_once.runtime.safe.locks import Job, WriterLock, releasing
from teach_once.runtime.safe.safe_read import BadFile
from teach_once.runtime.safe.text import one_line
from teach_once.store.errors import (
    NO_PERMISSION,
    NO_ROOM,
    CacheBusy,
    CacheDamaged,
    CacheError,
    CacheFull,
    CacheMismatch,
    CacheNotWritable,
    full_disk_as_error,
    refusals_of,
    require_room,
)
from teach_once.store.format.content import metadata_checksums, remove_temporary_files
from teach_once.store.format.manifest import Manifest, manifest_text, write_manifest
from teach_once.store.format.metadata import zarr_metadata
from teach_once.store.format.spec import (
    FORMAT_NAME,
    MANIFEST,
    ZARR_GROUP,
    Block,
    cache_path,
    crc32c,
    whole_name,
    with_checksum,
)
from teach_once.store.identity import EVALUATION
from teach_once.store.place.commit_log import encode_chunks
from teach_once.store.place.folder import Folder
from teach_once.store.place.folder_log import FolderLog
from teach_once.store.place.index import write_index
from teach_once.store.read.evaluation import (
    evaluation_names,
    evaluation_path,
    open_evaluation,
)
from teach_once.store.read.hdf5 import (
    BLOCK_CRC,
    HDF5_ERRORS,
    MANIFEST_DATASET,
    first_line,
    selection,
    shape_in_file,
)
from teach_once.store.read.reader import TeacherCache

_SPARE_FILE_BYTES = 2**20  # for HDF5's own data
_MAKE_ROOM_FOR_FILE = "make room, or export to another disk"


class Content(NamedTuple):
    """The content of one cache.

    whole: the arrays that are stored in one piece. read_block: fills an array's rows of a block.
    """

    manifest: Manifest
    whole: dict[str, NDArray[Any]]
    read_block: Callable[[str, Block, NDArray[Any]], None]


def write_hdf5(
    file_path: Path, content: Content, evaluations: Mapping[str, Content] | None = None
) -> None:
    """Write the file so that it only appears under its name when it is complete.

    evaluations: the evaluation caches inside the cache, by name. Raises CacheFull,
    CacheNotWritable, or CacheError if the file cannot be written.
    """
    groups = {f"{EVALUATION}/{name}": each for name, each in (evaluations or {}).items()}
    num_bytes = sum(_most_bytes(each.manifest) for each in (content, *groups.values()))
    with _refusals(file_path), written_aside(file_path) as aside:
        _reserve(aside, num_bytes)
        with h5py.File(aside, "r+", libver="latest") as file:
            _write_content(file, content)
            for name, each in groups.items():
                _write_content(file.create_group(name), each)


def _write_content(group: h5py.Group, content: Content) -> None:
    manifest = content.manifest
    group.attrs["format"] = FORMAT_NAME
    group.create_dataset(MANIFEST_DATASET, data=np.bytes_(manifest_text(manifest)))
    for name, values in content.whole.items():
        group.create_dataset(name, data=values)
    for array in manifest.arrays:
        _write_array(group, manifest, array, content.read_block)


def _reserve(path: Path, num_bytes: int) -> None:
    """Create an empty HDF5 file with `num_bytes` reserved on the disk; closing it frees the rest.

    Raises CacheFull, OSError.
    """
    require_room(path.parent, num_bytes, where=path.parent, fix=_MAKE_ROOM_FOR_FILE)
    with h5py.File("empty", "w", driver="core", backing_store=False, libver="latest") as empty:
        empty.flush()
        image = empty.id.get_file_image()
    with path.open("wb") as file:
        file.write(image)
        file.flush()
        os.posix_fallocate(file.fileno(), 0, num_bytes)


def _most_bytes(manifest: Manifest) -> int:
    """Return an upper bound for the file's size."""
    checksums = 4 * manifest.num_views * manifest.blocks_per_view
    sizes = [manifest.whole[name] for name in manifest.whole]
    sizes += [(shape_in_file(manifest, name), a.dtype) for name, a in manifest.arrays.items()]
    values = sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in sizes)
    spare = _SPARE_FILE_BYTES + 2 * checksums * len(manifest.arrays)
    return values + len(manifest_text(manifest)) + spare


@contextmanager
def _refusals(path: Path) -> Iterator[None]:
    """Convert errors of the system and of libhdf5 to CacheErrors."""
    try:
        yield
    except (CacheError, BadFile):
        raise
    except HDF5_ERRORS as error:
        named = re.search(r"errno = (\d+)", str(error))  # libhdf5 only has it in the message
        number = getattr(error, "errno", None) or (int(named[1]) if named else None)
        if number in NO_ROOM:
            raise CacheFull(f"the disk of {path} is too full", fix=_MAKE_ROOM_FOR_FILE) from None
        if number in NO_PERMISSION:
            raise CacheNotWritable(
                f"{path} cannot be written: {first_line(error)}", fix="choose another folder"
            ) from None
        raise CacheError(f"{path} cannot be written: {first_line(error)}") from None


def _write_array(
    file: h5py.Group,
    manifest: Manifest,
    array: str,
    read_block: Callable[[str, Block, NDArray[Any]], None],
) -> None:
    spec = manifest.arrays[array]
    shape = shape_in_file(manifest, array)
    data = file.create_dataset(array, shape=shape, dtype=spec.dtype)  # contiguous by default
    checksums = np.empty((manifest.num_views, manifest.blocks_per_view), dtype="<u4")
    for block in manifest.blocks():
        rows = np.empty((manifest.rows_in(spec, block), *spec.shape), dtype=spec.dtype)
        read_block(array, block, rows)
        data.write_direct(rows, dest_sel=selection(manifest, array, block))
        checksums[block.view, block.index] = crc32c(rows)
    data.attrs[BLOCK_CRC] = checksums


_MOST_GROWTH = 4  # times the file's size; blocks are padded in a folder
_SPARE_BYTES = 256 * 2**20


def export_cache(cache: Path, file: Path) -> None:
    """Write the complete cache in folder `cache` to one HDF5 file and verify every checksum.

    Its evaluation caches are in the same file. An existing file is replaced when the new one is
    complete. Raises CacheError.
    """
    opened = TeacherCache.open(cache)
    evaluations = _evaluations(cache, opened)
    if not file.parent.is_dir():
        fix = shlex.join(["mkdir", "-p", str(file.parent)])
        raise CacheError(f"folder {file.parent} not found", fix=fix)
    write_hdf5(file, _content(opened), {name: _content(each) for name, each in evaluations.items()})


def _content(cache: TeacherCache) -> Content:
    return Content(cache.manifest, cache.whole, cache.source.read)


def _evaluations(path: Path, cache: TeacherCache) -> dict[str, TeacherCache]:
    """Open the evaluation caches inside the cache at `path`, by name. Raises CacheError."""
    names = evaluation_names(path)
    return {name: open_evaluation(path, cache.identity, name) for name in names}


def import_cache(file: Path, caches_dir: Path) -> Path:
    """Make a cache folder below `caches_dir` from an exported file and return its path.

    The folder is equal to the exported one bit for bit, except for the journal, which is new.
    Raises CacheError, also if a cache of that name exists.
    """
    if file.is_dir():
        raise CacheMismatch(f"{file} is a folder: only an exported HDF5 file can be imported")
    opened = TeacherCache.open(file)
    evaluations = _evaluations(file, opened)
    target = cache_path(caches_dir, opened.manifest.teacher, opened.manifest.identity)
    if os.path.lexists(target / MANIFEST):
        fix = f"remove it first: {shlex.join(['rm', '-r', str(target)])}"
        raise CacheError(f"{target} exists", fix=fix)
    with full_disk_as_error(target, _MAKE_ROOM), refusals_of(target):
        caches_dir.mkdir(parents=True, exist_ok=True)
        manifests = [each.manifest for each in (opened, *evaluations.values())]
        _refuse_growth(file, sum(map(folder_bytes, manifests)), caches_dir)
        make_folder_inside(caches_dir, target.name)  # refuses links
        with releasing(WriterLock(target, Job(), CacheBusy)):
            if evaluations:
                make_folder_inside(target, EVALUATION)
            for name, each in evaluations.items():
                make_folder_inside(target / EVALUATION, name)
                _write_folder(evaluation_path(target, name), each)
            _write_folder(target, opened)  # last: its manifest makes it a cache
    return target


_MAKE_ROOM = "make room, then run the same command again"


def _refuse_growth(file: Path, needed: int, caches_dir: Path) -> None:
    """Raise CacheFull, or CacheDamaged if the file is far smaller than its folder would be.

    needed: bytes of the folder.
    """
    held = file.stat().st_size
    if needed > _MOST_GROWTH * held + _SPARE_BYTES:
        raise CacheDamaged(
            f"{one_line(file)} has {format_size(held)} and would become {format_size(needed)}, "
            f"mostly padding: its blocks are far larger than its views",
            fix="ask its author for an export with smaller blocks",
        )
    require_room(caches_dir, needed, where=caches_dir, fix=_MAKE_ROOM)


def folder_bytes(manifest: Manifest) -> int:
    """Return the bytes of a complete cache's chunks."""
    m, whole = manifest, 0
    for shape, dtype in m.whole.values():
        whole += math.prod(shape) * np.dtype(dtype).itemsize
    views = {name: 1 if spec.all_views else m.num_views for name, spec in m.arrays.items()}
    chunks = (m.chunk_file_bytes(spec) * views[name] for name, spec in m.arrays.items())
    return whole + m.blocks_per_view * sum(chunks)


def _write_folder(target: Path, opened: TeacherCache) -> None:
    manifest, whole = opened.manifest, opened.whole
    remove_temporary_files(target, manifest)
    metadata = zarr_metadata(manifest)
    for name, text in metadata.items():
        write_inside(target, f"{ZARR_GROUP}/{name}", text)
    for name, values in whole.items():
        write_inside(target, whole_name(name, values.ndim), with_checksum(values))
    log = FolderLog(target, manifest)
    for block in manifest.blocks():
        log.commit(block, _chunks_of(opened, block))
    log.close()
    # The manifest is last, so that an interrupted import is never mistaken for a cache.
    manifest = metadata_checksums(manifest, metadata)
    write_manifest(target, manifest)
    write_index(Folder(target), manifest)


def _chunks_of(opened: TeacherCache, block: Block) -> Iterator[tuple[str, NDArray[np.uint8]]]:
    for array, spec in opened.manifest.arrays.items():
        rows = np.empty((opened.manifest.rows_in(spec, block), *spec.shape), dtype=spec.dtype)
        opened.source.read(array, block, rows)
        yield from encode_chunks(opened.manifest, {array: rows})
