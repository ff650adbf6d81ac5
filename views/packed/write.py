"""Pack a dataset into a file: decoded pixels, or encoded files, original or re-encoded."""

from __future__ import annotations

import errno
import fcntl
import glob
import math
import os
import shlex
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO

import h5py
import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from teach_once.configs.schema import ImageFolder
from teach_once.runtime.command.progress import Progress
from teach_once.runtime.safe.files import written_aside
from teach_once.views.images.decode import shown_path
from teach_once.views.images.encoded import EncodedSource, EncodedSplit
from teach_once.views.packed.format import (
    ARRAYS,
    HEAD_BYTES,
    LABELS,
    MOST_SHARDS,
    SPLITS,
    ArrayPlace,
    Header,
    PackedFile,
    key_of,
    sha256_of,
    shard_path,
    write_index,
)
from teach_once.views.packed.recode import Recode, recoded, recoded_files
from teach_once.views.seeds import choice
from teach_once.views.splits import (
    DIGEST_BYTES,
    DatasetError,
    Ids,
    ImageSource,
    Split,
    check_class_name,
    check_same_size,
    crc32c,
)

_STRUCTURE_BYTES = 2**16  # HDF5 structures around the arrays: more than enough
Shapes = Mapping[str, Mapping[str, tuple[int, ...]]]  # {split: {array: shape}}


@dataclass
class NewPackedFile:
    """A new file with a location for each array, ready for writing."""

    path: Path
    handle: int
    places: dict[str, dict[str, ArrayPlace]] = field(default_factory=dict)

    def write(self, split: str, name: str, position: int, data: NDArray[np.uint8]) -> None:
        """Write bytes to an array; position: offset in the array, in bytes."""
        content = np.ascontiguousarray(data).reshape(-1).data
        self._write_at(self.places[split][name].offset + position, content)

    def put(self, split: str, name: str, array: NDArray[np.generic]) -> None:
        """Write a whole array and record its checksum."""
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
        except OSError as error:  # it lacks the file's name
            raise OSError(error.errno, error.strerror, str(self.path)) from None


@contextmanager
def new_packed_file(path: Path, header: Header, shapes: Shapes) -> Iterator[NewPackedFile]:
    """Create a packed file, which is renamed to `path` only when it is complete.

    header: with placeholder locations of at least as many digits as the real ones. Raises
    DatasetError if the file cannot be written.
    """
    check_folder_exists(path)
    _remove_leftovers(path)
    room = 1 << max(9, (len(header.to_bytes()) - 1).bit_length())
    with written_aside(path) as aside:
        _check_room(aside, path, room + _size_of(header, shapes))
        places = _laid_out(aside, header, shapes, room)
        handle = os.open(aside, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            out = NewPackedFile(path, handle, places)
            yield out
            out.put_header(header, room)
        finally:
            os.close(handle)


def check_folder_exists(path: Path) -> None:
    """Raise DatasetError if the file's folder does not exist."""
    if not path.parent.is_dir():
        fix = f"mkdir -p {shlex.quote(str(path.parent))}"
        raise DatasetError(f"folder {shown_path(path.parent)} not found", fix=fix)


def _size_of(header: Header, shapes: Shapes) -> int:
    """Return the total size of all arrays in bytes."""
    return sum(
        math.prod(shape) * np.dtype(ARRAYS[header.kind][name][0]).itemsize
        for arrays in shapes.values()
        for name, shape in arrays.items()
    )


def _check_room(file: Path, path: Path, num_bytes: int) -> None:
    """Raise OSError, with the name `path`, if the disk lacks `num_bytes` of free space.

    The HDF5 library would only print a failed write and continue.
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
    """Let HDF5 allocate each array, after a user block of `room` bytes."""
    assert room >= HEAD_BYTES
    classes = [name.encode() for name in header.class_names or ()]
    places: dict[str, dict[str, ArrayPlace]] = {}
    with h5py.File(file, "w", libver="latest", userblock_size=room) as out:
        out.attrs["kind"] = np.bytes_(header.kind)
        if classes:
            names = np.array(classes, dtype=f"S{max(map(len, classes))}")
            out.create_dataset("class_names", data=names, track_times=False)
        for split, arrays in shapes.items():
            timeless = h5py.h5p.create(h5py.h5p.GROUP_CREATE)  # no timestamps in it
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
    offset = made.get_offset() or 0  # an empty array has no offset
    checked = None if name in ("images", "bytes") else 0
    return ArrayPlace(offset=offset, dtype=dtype, shape=list(shape), crc32c=checked)


def _remove_leftovers(path: Path) -> None:
    """Remove leftovers of killed packs of this file; a running pack holds a lock."""
    for aside in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        try:
            handle = os.open(aside, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:  # already removed, or not a packed file
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            aside.unlink(missing_ok=True)
        except OSError:
            pass
        finally:
            os.close(handle)


_CHUNK_BYTES = 2**26  # decoded images in memory
_LARGEST = ArrayPlace(offset=2**48, dtype="<i8", shape=[2**48] * 4, crc32c=2**32 - 1)
OWN_TYPE = "packed"  # type of a dataset whose images were re-encoded, which is a dataset of its own
Advance = Callable[[int], None]


def pack_pixels(source: ImageSource, file: Path, chosen: Iterable[Ids] = ()) -> None:
    """Pack decoded images. Raises DatasetError unless all have the same size.

    chosen: subsets of the training samples that configs will use, in addition to all of them.
    """
    every = np.arange(len(source.train))
    digests = {key_of(ids): source.digest_of(ids) for ids in (every, *chosen)}
    digests |= {"all": digests[key_of(every)], "test": source.test_digest()}
    splits = dict(zip(SPLITS, (source.train, source.test), strict=True))
    shapes = {
        name: {
            "images": (len(split), *split.first_shape),
            "source_digest": (len(split), DIGEST_BYTES),
            **_shapes_of_rows(split),
        }
        for name, split in splits.items()
    }
    header = new_header("pixels", source.type, source.class_names, digests=digests)
    with new_packed_file(file, header, shapes) as out:
        for name, split in splits.items():
            _write_pixels(out, name, split)


def pack_encoded(
    source: EncodedSource,
    file: Path,
    recode: Recode | None = None,
    *,
    max_pixels: int = ImageFolder.max_pixels,
    num_workers: int = 0,
    advance: Advance = lambda count: None,
    **extra: object,
) -> None:
    """Pack the files' original or re-encoded bytes. Raises DatasetError if one cannot be read.

    num_workers: processes that re-encode; 0: this process. advance: called with the number of files
    just packed. extra: additional fields of the header. Re-encoded files are first written to an
    unnamed file in the same folder.
    """
    if recode is None:
        _pack_files(source, file, _counted(source.files(max_pixels), advance), extra)
        return
    check_folder_exists(file)
    with tempfile.TemporaryFile(dir=file.parent) as spool:
        sizes = {}
        for name, split in source.splits.items():
            files = recoded_files(split, recode, max_pixels, num_workers)
            sizes[name] = _spooled(_counted(files, advance), spool, file)
        spool.seek(0)
        small = EncodedSource(
            OWN_TYPE,
            source.class_names,
            replace(source.train, sizes=sizes["train"]),
            replace(source.test, sizes=sizes["test"]),
        )
        contents = (spool.read(size) for each in sizes.values() for size in each)
        _pack_files(small, file, contents, {**extra, "recoded": recode.plain()})


def _shapes_of_rows(split: Split | EncodedSplit) -> dict[str, tuple[int, ...]]:
    names = ("crc32c",) if split.labels is None else (LABELS, "crc32c")
    return dict.fromkeys(names, (len(split),))


def new_header(
    kind: str, dataset_type: str, class_names: Iterable[str] | None, **more: object
) -> Header:
    """Return a header with placeholder locations. Raises DatasetError for invalid names."""
    names = None if class_names is None else list(class_names)
    for name in names or ():
        check_class_name(name, f"class {name!r}")
    places = {name: dict.fromkeys(ARRAYS[kind], _LARGEST) for name in SPLITS}
    return Header(kind=kind, type=dataset_type, class_names=names, splits=places, **more)


def _pack_files(
    source: EncodedSource, file: Path, contents: Iterator[bytes], extra: Mapping[str, object]
) -> None:
    """Pack `contents`: all files of both splits, with the sizes given by the source."""
    names = {
        split: "".join(f"{name}\0" for name in each.names).encode()
        for split, each in source.splits.items()
    }
    shapes = {
        split: {
            "bytes": (sum(each.sizes),),
            "offsets": (len(each) + 1,),
            "names": (len(names[split]),),
            **_shapes_of_rows(each),
        }
        for split, each in source.splits.items()
    }
    header = new_header("encoded", source.type, source.class_names, **extra)
    with new_packed_file(file, header, shapes) as out:
        for split, each in source.splits.items():
            _write_files(out, split, each, contents)
            out.put(split, "names", np.frombuffer(names[split], dtype=np.uint8))


def _write_files(
    out: NewPackedFile, name: str, split: EncodedSplit, contents: Iterator[bytes]
) -> None:
    offsets = np.cumsum([0, *split.sizes], dtype=np.int64)
    sums = []
    for sample, start in enumerate(offsets[:-1].tolist()):
        content = next(contents)
        if len(content) != split.sizes[sample]:
            raise DatasetError(
                f"{split.name_of(sample)} changed while it was packed", fix="pack again"
            )
        out.write(name, "bytes", start, np.frombuffer(content, dtype=np.uint8))
        sums.append(crc32c(content))
    if split.labels is not None:
        out.put(name, LABELS, split.labels)
    out.put(name, "offsets", offsets)
    out.put(name, "crc32c", np.array(sums, dtype=np.uint32))


def _spooled(contents: Iterable[bytes], spool: IO[bytes], file: Path) -> list[int]:
    """Append all contents to a file; returns their sizes. Raises OSError with the name `file`."""
    sizes = []
    try:
        for content in contents:
            spool.write(content)
            sizes.append(len(content))
        spool.flush()
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(file)) from None
    return sizes


def _counted(contents: Iterable[bytes], advance: Advance) -> Iterator[bytes]:
    for content in contents:
        advance(1)
        yield content


def _write_pixels(out: NewPackedFile, name: str, split: Split) -> None:
    shape = split.first_shape
    rows = max(1, _CHUNK_BYTES // int(np.prod(shape)))
    sums, of_sources = [], []
    for start in range(0, len(split), rows):
        ids = np.arange(start, min(start + rows, len(split)))
        images, digests = split.load(ids)
        check_same_size(shape, images[0], split.name_of(start), split.name_of(0))
        out.write(name, "images", start * int(np.prod(shape)), images)
        sums += [crc32c(image) for image in images]
        of_sources.append(digests)
    if split.labels is not None:
        out.put(name, LABELS, split.labels)
    out.put(name, "crc32c", np.array(sums, dtype=np.uint32))
    out.put(name, "source_digest", np.concatenate(of_sources))


_SIZED_FILES = 64  # re-encoded to estimate how many fit into a shard


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
    """Pack the missing shards, then write the index; returns the total size in bytes.

    Raises DatasetError if a file cannot be read.
    """
    rows = _rows_per_shard(source, recode, max_pixels, shard_bytes)
    parts, job = _parts_of(source, rows), _job_of(source, recode, rows)
    missing = [part for part in parts if not _is_packed(index, part, job)]
    if len(missing) < len(parts):
        console.print(f"{len(parts) - len(missing)} of {len(parts)} shards are already packed")
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
    """Return samples per shard, by the mean size of all files or of some re-encoded ones."""
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
    """Return the sha256 of everything that determines the content of the shards."""
    plain = None if recode is None else recode.plain()
    return sha256_of([source.type, source.class_names, source.digests, plain, rows])


def _source_of(source: EncodedSource, part: _Part) -> EncodedSource:
    """Return the samples of one shard; the other split is empty."""
    none, some = np.arange(0), np.arange(part.start, part.stop)
    train, test = (
        split.subset(some if name == part.split else none) for name, split in source.splits.items()
    )
    return EncodedSource(source.type, source.class_names, train, test)


def _is_packed(index: Path, part: _Part, job: str) -> bool:
    path = shard_path(index, part.number)
    try:
        header = PackedFile(path).header
    except DatasetError:  # missing, damaged or of another kind: packed again
        return False
    return (header.job, header.part) == (job, part.number)
