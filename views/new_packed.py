"""A new file of packed images: laid out by HDF5, then written in place; see `views.packed_file`.

The file gets its name only when it is whole; what a killed pack left is removed by the next one.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import math
import os
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import h5py
import numpy as np
from numpy.typing import NDArray

from runtime.files import written_aside
from views.packed_file import ARRAYS, HEAD_BYTES
from views.packed_header import ArrayPlace, Header
from views.pictures import shown_path
from views.splits import DatasetError, crc32c

_STRUCTURE_BYTES = 2**16  # of HDF5 around the arrays: more than enough
Shapes = Mapping[str, Mapping[str, tuple[int, ...]]]  # {split: {array: shape}}


@dataclass
class NewPackedFile:
    """A file that has been laid out: where each array lies, and how it is written."""

    path: Path
    handle: int
    places: dict[str, dict[str, ArrayPlace]] = field(default_factory=dict)

    def write(self, split: str, name: str, position: int, data: NDArray[np.uint8]) -> None:
        """Write bytes at a position, in bytes, of an array."""
        content = np.ascontiguousarray(data).reshape(-1).data
        self._write_at(self.places[split][name].offset + position, content)

    def put(self, split: str, name: str, array: NDArray[np.generic]) -> None:
        """Write a whole array, and keep its checksum."""
        place = self.places[split][name]
        content = array.astype(place.dtype, casting="equiv", copy=False).tobytes()
        assert len(content) == place.num_bytes
        self._write_at(place.offset, memoryview(content))
        self.places[split][name] = place.model_copy(update={"crc32c": crc32c(content)})

    def put_header(self, header: Header, room: int) -> None:
        content = header.model_copy(update={"splits": self.places}).to_bytes()
        assert len(content) <= room
        self._write_at(0, memoryview(content))

    def _write_at(self, offset: int, content: memoryview) -> None:
        try:
            while content:
                written = os.pwrite(self.handle, content, offset)
                content, offset = content[written:], offset + written
        except OSError as error:  # it does not know the file's name
            raise OSError(error.errno, error.strerror, str(self.path)) from None


@contextmanager
def new_packed_file(path: Path, header: Header, shapes: Shapes) -> Iterator[NewPackedFile]:
    """A file with room for arrays, which gets its name only when it is whole. Raises DatasetError.

    header: with places that take at least as many digits as the real ones.
    """
    refuse_missing_folder(path)
    _remove_leftovers(path)
    room = 1 << max(9, (len(header.to_bytes()) - 1).bit_length())
    with written_aside(path) as aside:
        _refuse_without_room(aside, path, room + _size_of(header, shapes))
        places = _laid_out(aside, header, shapes, room)
        handle = os.open(aside, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            out = NewPackedFile(path, handle, places)
            yield out
            out.put_header(header, room)
        finally:
            os.close(handle)


def refuse_missing_folder(path: Path) -> None:
    """Raise DatasetError where there is no folder to write a file to."""
    if not path.parent.is_dir():
        fix = f"mkdir -p {shlex.quote(str(path.parent))}"
        raise DatasetError(f"there is no folder {shown_path(path.parent)}", fix=fix)


def _size_of(header: Header, shapes: Shapes) -> int:
    """Bytes of all arrays."""
    return sum(
        math.prod(shape) * np.dtype(ARRAYS[header.kind][name][0]).itemsize
        for arrays in shapes.values()
        for name, shape in arrays.items()
    )


def _refuse_without_room(file: Path, path: Path, num_bytes: int) -> None:
    """Raise OSError, with the name `path`, where the disk has no room for so many bytes.

    The HDF5 library would print what it cannot write, and go on.
    """
    try:
        disk = os.statvfs(file.parent)
        if num_bytes + _STRUCTURE_BYTES > disk.f_bavail * disk.f_frsize:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        file.write_bytes(bytes(_STRUCTURE_BYTES))
        os.truncate(file, num_bytes + _STRUCTURE_BYTES)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def _laid_out(
    file: Path, header: Header, shapes: Shapes, room: int
) -> dict[str, dict[str, ArrayPlace]]:
    """Have HDF5 give each array its place, behind a user block of `room` bytes."""
    assert room >= HEAD_BYTES
    longest = max(len(name.encode()) for name in header.class_names)
    places: dict[str, dict[str, ArrayPlace]] = {}
    with h5py.File(file, "w", libver="latest", userblock_size=room) as out:
        out.attrs["kind"] = np.bytes_(header.kind)
        names = np.array([name.encode() for name in header.class_names], dtype=f"S{longest}")
        out.create_dataset("class_names", data=names, track_times=False)
        for split, arrays in shapes.items():
            timeless = h5py.h5p.create(h5py.h5p.GROUP_CREATE)  # the same content, the same bytes
            timeless.set_obj_track_times(False)
            group = h5py.Group(h5py.h5g.create(out.id, split.encode(), gcpl=timeless))
            places[split] = {
                name: _placed(group, name, ARRAYS[header.kind][name][0], shape)
                for name, shape in arrays.items()
            }
    return places


def _placed(group: h5py.Group, name: str, dtype: str, shape: tuple[int, ...]) -> ArrayPlace:
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_obj_track_times(False)
    properties.set_layout(h5py.h5d.CONTIGUOUS)
    properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    properties.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    space = h5py.h5s.create_simple(shape)
    kind = h5py.h5t.py_create(np.dtype(dtype))
    made = h5py.h5d.create(group.id, name.encode(), kind, space, properties)
    offset = made.get_offset() or 0  # an array of no bytes has no place
    checked = None if name in ("images", "bytes") else 0
    return ArrayPlace(offset=offset, dtype=dtype, shape=list(shape), crc32c=checked)


def _remove_leftovers(path: Path) -> None:
    """Remove leftovers of killed packs of this file; a running pack holds a lock."""
    for aside in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        try:
            handle = os.open(aside, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:  # gone, or none of ours
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            aside.unlink(missing_ok=True)
        except OSError:
            pass
        finally:
            os.close(handle)
