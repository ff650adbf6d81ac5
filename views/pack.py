"""Packs a dataset into one file; see `views.packed_file` for what is in it.

The HDF5 library lays the file out, and the arrays are then written in their places. A file gets its
name only when it is whole; what a killed pack has left is removed by the next one.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import h5py
import numpy as np
from numpy.typing import NDArray

from runtime.files import written_aside
from views.folders import relative_name
from views.packed import key_of
from views.packed_file import ARRAYS, HEAD_BYTES, SPLITS, ArrayPlace, Header
from views.pictures import picture_size, read_picture, shown_path
from views.splits import (
    DatasetError,
    Ids,
    Source,
    Split,
    check_class_name,
    crc32c,
    refuse_other_size,
)

_STRUCTURE_BYTES = 2**16  # of HDF5 around the arrays: more than enough
_CHUNK_BYTES = 2**26  # of decoded images in memory
_LARGEST = ArrayPlace(offset=2**48, dtype="<i8", shape=[2**48] * 4, crc32c=2**32 - 1)
Shapes = Mapping[str, Mapping[str, tuple[int, ...]]]  # {split: {array: shape}}


def pack_pixels(source: Source, file: Path, chosen: Iterable[Ids] = ()) -> None:
    """Pack decoded images, all of one size; raises DatasetError where they are not.

    chosen: training samples that configs will choose, besides all of them.
    """
    every = np.arange(len(source.train))
    digests = {key_of(ids): source.digest_of(ids) for ids in (every, *chosen)}
    digests |= {"all": digests[key_of(every)], "test": source.test_digest()}
    shapes = {}
    for name, split in _splits(source):
        count = len(split)
        of_images = (count, *split.first_shape)
        shapes[name] = {"images": of_images, **dict.fromkeys(_PER_SAMPLE, (count,))}
    with _new_file(file, _header(source, "pixels", digests), shapes) as out:
        for name, split in _splits(source):
            _write_pixels(out, name, split)


def pack_encoded(source: Source, file: Path) -> None:
    """Pack the files' own bytes, whatever the images' sizes; the dataset must be a folder's."""
    shapes, names = {}, {}
    sizes: dict[str, list[int]] = {}
    for name, split in _splits(source):
        if split.paths is None:
            raise DatasetError("only an image folder can be packed as encoded bytes")
        sizes[name] = [picture_size(path) for path in split.paths]
        names[name] = _joined_names(split.paths)
        count = len(split)
        shapes[name] = {
            "bytes": (sum(sizes[name]),),
            "offsets": (count + 1,),
            "names": (len(names[name]),),
            **dict.fromkeys(("labels", "crc32c"), (count,)),
        }
    with _new_file(file, _header(source, "encoded", {}), shapes) as out:
        for name, split in _splits(source):
            _write_encoded(out, name, split, np.cumsum([0, *sizes[name]], dtype=np.int64))
            out.put(name, "names", np.frombuffer(names[name], dtype=np.uint8))


_PER_SAMPLE = ("labels", "crc32c", "source_crc32c")


def _write_pixels(out: _NewFile, name: str, split: Split) -> None:
    shape = split.first_shape
    rows = max(1, _CHUNK_BYTES // int(np.prod(shape)))
    sums, of_sources = [], []
    for start in range(0, len(split), rows):
        ids = np.arange(start, min(start + rows, len(split)))
        images, checksums = split.load(ids)
        refuse_other_size(shape, images[0], split.name_of(start), split.name_of(0))
        out.write(name, "images", start * int(np.prod(shape)), images)
        sums += [crc32c(image) for image in images]
        of_sources.append(checksums)
    out.put(name, "labels", split.labels)
    out.put(name, "crc32c", np.array(sums, dtype=np.uint32))
    out.put(name, "source_crc32c", np.concatenate(of_sources))


def _write_encoded(out: _NewFile, name: str, split: Split, offsets: Ids) -> None:
    sums = []
    for path, start, stop in zip(split.paths or (), offsets, offsets[1:], strict=False):
        content = read_picture(path)
        if len(content) != stop - start:
            raise DatasetError(f"{shown_path(path)} changed while it was packed; pack again")
        out.write(name, "bytes", int(start), np.frombuffer(content, dtype=np.uint8))
        sums.append(crc32c(content))
    out.put(name, "labels", split.labels)
    out.put(name, "offsets", offsets)
    out.put(name, "crc32c", np.array(sums, dtype=np.uint32))


def _joined_names(paths: Iterable[Path]) -> bytes:
    joined = []
    for path in paths:
        try:
            joined.append(relative_name(path).encode() + b"\0")
        except UnicodeEncodeError:
            raise DatasetError(
                f"{shown_path(path)}: its name is not UTF-8", fix="rename the file"
            ) from None
    return b"".join(joined)


def _splits(source: Source) -> Iterator[tuple[str, Split]]:
    yield from zip(SPLITS, (source.train, source.test), strict=True)


def _header(source: Source, kind: str, digests: Mapping[str, str]) -> Header:
    for name in source.class_names:
        check_class_name(name, f"class {name!r}")
    places = {name: dict.fromkeys(ARRAYS[kind], _LARGEST) for name in SPLITS}
    return Header.model_validate(
        {
            "kind": kind,
            "type": source.type,
            "class_names": list(source.class_names),
            "digests": dict(digests),
            "splits": places,
        }
    )


@dataclass
class _NewFile:
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
def _new_file(path: Path, header: Header, shapes: Shapes) -> Iterator[_NewFile]:
    """A file with room for arrays, which gets its name only when it is whole. Raises DatasetError.

    header: with places that take at least as many digits as the real ones.
    """
    if not path.parent.is_dir():
        raise DatasetError(f"there is no folder {path.parent}", fix=f"mkdir -p {path.parent}")
    _remove_leftovers(path)
    room = 1 << max(9, (len(header.to_bytes()) - 1).bit_length())
    with written_aside(path) as aside:
        _refuse_without_room(aside, path, room + _size_of(header, shapes))
        places = _laid_out(aside, header, shapes, room)
        handle = os.open(aside, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            out = _NewFile(path, handle, places)
            yield out
            out.put_header(header, room)
        finally:
            os.close(handle)


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
        out.create_dataset("class_names", data=names)
        for split, arrays in shapes.items():
            group = out.create_group(split)
            places[split] = {
                name: _placed(group, name, ARRAYS[header.kind][name][0], shape)
                for name, shape in arrays.items()
            }
    return places


def _placed(group: h5py.Group, name: str, dtype: str, shape: tuple[int, ...]) -> ArrayPlace:
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
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
    """Remove what killed packs of this file have left; whoever is still at work holds a lock."""
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
