"""Image folders packed into one HDF5 file: tens of thousands of small files are slow to open.

    /                     attributes: format, format_version, kind ("pixels" or "encoded"), type
                          (of the dataset that was packed), digests (JSON, see below)
    class_names           strings
    <split>/labels        (N,) int64
    <split>/images        kind pixels:  (N, H, W, C) uint8
    <split>/bytes         kind encoded: the files' own bytes, one behind the other, and
    <split>/offsets       (N + 1,) int64, where each begins
    <split>/names         kind encoded: (N,) strings, `<class>/<file>`
    <split>/crc32c        (N,) uint32, of each sample's bytes in this file
    <split>/source_crc32c kind pixels:  (N,) uint32, of the bytes that it was packed from

Every sample that is read is compared with its checksum. A packed dataset is the dataset that it was
packed from: it has that one's digest, so a cache of the one serves the other. The digest is
computed from what is stored where the kind is encoded; `digests` holds those of all training
samples ("all"), of the test split ("test"), and of the choices of the packing config, by the sha256
of their ids.
Version 2, without type, digests, names and source_crc32c, is read as a dataset of its own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
from numpy.typing import NDArray

from configs.schema import Packed as PackedConfig
from runtime.files import written_aside
from views.folders import digest_of_files, relative_name
from views.pictures import decode_bytes
from views.splits import (
    Checksums,
    DatasetError,
    Ids,
    Source,
    Split,
    crc32c,
    refuse_other_size,
)

FORMAT_NAME = "teach-once-images"
FORMAT_VERSION = 3
_READABLE_VERSIONS = (2, 3)
RUN_SAMPLES = 1024  # neighbours are read together, at most so many at a time


def pack_pixels(source: Source, file: Path, chosen: Iterable[Ids] = ()) -> None:
    """Pack decoded images, all of one size; raises DatasetError where they are not.

    chosen: training samples that configs will choose, besides all of them.
    """
    with _new_file(file, "pixels") as out:
        for name, split in _splits(source):
            images, of_source = split.loaded
            out.create_dataset(f"{name}/images", data=images)
            _finish_split(out, name, split, list(map(crc32c, images)))
            out.create_dataset(f"{name}/source_crc32c", data=of_source)
        _finish(out, source, chosen)


def pack_encoded(source: Source, file: Path, chosen: Iterable[Ids] = ()) -> None:
    """Pack the files' own bytes, whatever the images' sizes; the dataset must be a folder's."""
    with _new_file(file, "encoded") as out:
        for name, split in _splits(source):
            if split.paths is None:
                raise DatasetError("only an image folder can be packed as encoded bytes")
            sizes = [path.stat().st_size for path in split.paths]
            offsets = np.cumsum([0, *sizes], dtype=np.int64)
            data = out.create_dataset(f"{name}/bytes", shape=(offsets[-1],), dtype=np.uint8)
            out.create_dataset(f"{name}/offsets", data=offsets)
            names = [relative_name(path).encode() for path in split.paths]
            out.create_dataset(f"{name}/names", data=names)
            checksums = []
            for path, start, stop in zip(split.paths, offsets, offsets[1:], strict=False):
                content = path.read_bytes()
                if len(content) != stop - start:
                    raise DatasetError(f"{path} changed while it was packed; pack again")
                data[start:stop] = np.frombuffer(content, dtype=np.uint8)
                checksums.append(crc32c(content))
            _finish_split(out, name, split, checksums)
        _finish(out, source, chosen)


def packed(file: Path, max_pixels: int = PackedConfig.max_pixels) -> Source:
    """The dataset in a packed file; images are read, and checked, when they are asked for.

    Raises DatasetError where the file is missing, damaged or something else.
    """
    with _opened(file) as content:
        if content.attrs.get("format") != FORMAT_NAME:
            raise DatasetError(f"{file} is an HDF5 file, but not of packed images")
        if content.attrs["format_version"] not in _READABLE_VERSIONS:
            raise DatasetError(f"{file} has another format version; pack the images again")
        names = tuple(name.decode() for name in content["class_names"][()])
        labels = {name: np.asarray(content[f"{name}/labels"][()]) for name in ("train", "test")}
        test_checksums = np.asarray(content["test/crc32c"][()])
        kind = str(content.attrs.get("type", "packed"))
        digests = json.loads(content.attrs.get("digests", "{}"))
        own = str(content.attrs.get("digest", digests.get("all")))

    def digest_of(ids: Ids) -> str:
        if (known := digests.get(_key(ids))) is not None:
            return str(known)
        if train.is_named:
            return train.digest_of(ids, labels["train"][ids])
        whole = own.encode() + ids.tobytes() + labels["train"].tobytes()
        return hashlib.sha256(whole).hexdigest()

    def test_digest() -> str:
        if (known := digests.get("test")) is not None:
            return str(known)
        return hashlib.sha256(test_checksums.tobytes() + labels["test"].tobytes()).hexdigest()

    train, test = (_PackedImages(file, name, max_pixels) for name in ("train", "test"))
    splits = (train.split(labels["train"]), test.split(labels["test"]))
    return Source(file.stem, kind, names, *splits, digest_of, test_digest)


def _key(ids: Ids) -> str:
    """What `digests` calls a choice of samples."""
    return hashlib.sha256(np.ascontiguousarray(ids, dtype="<i8").tobytes()).hexdigest()


@dataclass(frozen=True)
class _PackedImages:
    """Images of one split, by their place in the file."""

    file: Path
    name: str
    max_pixels: int

    def split(self, labels: Ids) -> Split:
        return Split(labels, self.load, self.read_each, self.read_checksums, self.name_of)

    def name_of(self, sample: int) -> str:
        return f"{self.name} sample {sample} of {self.file}"

    @property
    def is_named(self) -> bool:
        """Whether the files' names and bytes are there, so that their digest can be computed."""
        with _opened(self.file) as packed:
            return "names" in packed[self.name]

    def digest_of(self, ids: Ids, labels: Ids) -> str:
        """What the folder's digest would be: sha256, hex."""
        with _opened(self.file) as packed:
            group = packed[self.name]
            names = (name.decode() for name in group["names"][()][ids])
            sizes = np.diff(group["offsets"][()])[ids].tolist()

            def read(index: int) -> bytes:
                (content,) = self._contents(group, ids[index : index + 1])
                return content.tobytes()

            return digest_of_files(names, sizes, labels, read)

    def load(self, ids: Ids) -> tuple[NDArray[np.uint8], Checksums]:
        """(M, H, W, C) uint8 and (M,) uint32, in the order asked for. Raises DatasetError."""
        images: NDArray[np.uint8] | None = None
        checksums = np.empty(len(ids), dtype=np.uint32)
        for place, (image, checksums[place]) in enumerate(self.read_each(ids)):
            if images is None:
                images = np.empty((len(ids), *image.shape), dtype=np.uint8)
            refuse_other_size(images.shape[1:], image, self.name_of(int(ids[place])))
            images[place] = image
        if images is None:
            raise DatasetError(f"no images asked for of {self.file}")
        return images, checksums

    def read_each(self, ids: Ids) -> Iterator[tuple[NDArray[np.uint8], int]]:
        """(H, W, C) uint8 and the checksum of what it was packed from, in the order asked for."""
        for sample, content, is_encoded, checksum in self._read(ids):
            if is_encoded:
                yield (
                    decode_bytes(content.tobytes(), self.name_of(sample), self.max_pixels),
                    checksum,
                )
            else:
                yield content, checksum

    def read_checksums(self, ids: Ids) -> Checksums:
        """(M,) uint32, each after its sample was read and checked."""
        found = (checksum for *_, checksum in self._read(ids))
        return np.fromiter(found, dtype=np.uint32, count=len(ids))

    def _read(self, ids: Ids) -> Iterator[tuple[int, NDArray[np.uint8], bool, int]]:
        """Sample, what is stored of it, whether that is encoded, and its source's checksum."""
        with _opened(self.file) as packed:
            group = packed[self.name]
            checksums = group["crc32c"][()]
            sources = group["source_crc32c"][()] if "source_crc32c" in group else checksums
            for run in _runs(ids):
                for sample, content in zip(run.tolist(), self._contents(group, run), strict=True):
                    if int(checksums[sample]) != crc32c(content):
                        raise DatasetError(
                            f"{self.file} is damaged: {self.name} sample {sample} does not match "
                            f"its checksum; pack the images again"
                        )
                    yield sample, content, "bytes" in group, int(sources[sample])

    def _contents(self, group: h5py.Group, run: Ids) -> list[NDArray[np.uint8]]:
        """What is stored of neighbouring samples."""
        start, stop = int(run[0]), int(run[-1]) + 1
        if "images" in group:
            return list(np.asarray(group["images"][start:stop]))
        offsets = np.asarray(group["offsets"][start : stop + 1])
        data = np.asarray(group["bytes"][offsets[0] : offsets[-1]])
        return np.split(data, offsets[1:-1] - offsets[0])


def _runs(ids: Ids) -> Iterator[Ids]:
    """`ids`, cut where the next one is not the neighbour of the one before."""
    for some in np.split(ids, np.flatnonzero(np.diff(ids) != 1) + 1):
        yield from np.split(some, range(RUN_SAMPLES, len(some), RUN_SAMPLES))


class _opened:
    """An HDF5 file for reading; what h5py raises becomes a DatasetError that names the file."""

    def __init__(self, file: Path) -> None:
        self._path = file

    def __enter__(self) -> h5py.File:
        if not self._path.is_file():
            raise DatasetError(f"dataset.file: there is no file {self._path}")
        try:
            self._file = h5py.File(self._path, "r")
        except (OSError, RuntimeError) as error:
            raise self._unreadable(error) from None
        return self._file

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._file.close()
        if isinstance(error, (OSError, KeyError, RuntimeError, IndexError)):
            raise self._unreadable(error) from None

    def _unreadable(self, error: BaseException) -> DatasetError:
        return DatasetError(f"{self._path} cannot be read as packed images: {error}")


@contextmanager
def _new_file(path: Path, kind: str) -> Iterator[h5py.File]:
    """An HDF5 file that gets its name only when it is whole. Raises DatasetError."""
    if not path.parent.is_dir():
        raise DatasetError(f"there is no folder {path.parent}", fix=f"mkdir -p {path.parent}")
    with written_aside(path) as aside, h5py.File(aside, "w", libver="latest") as file:
        file.attrs["format"] = FORMAT_NAME
        file.attrs["format_version"] = FORMAT_VERSION
        file.attrs["kind"] = kind
        yield file


def _splits(source: Source) -> Iterator[tuple[str, Split]]:
    yield "train", source.train
    yield "test", source.test


def _finish_split(out: h5py.File, name: str, split: Split, checksums: list[int]) -> None:
    out.create_dataset(f"{name}/labels", data=split.labels)
    out.create_dataset(f"{name}/crc32c", data=np.array(checksums, dtype=np.uint32))


def _finish(out: h5py.File, source: Source, chosen: Iterable[Ids]) -> None:
    out.create_dataset("class_names", data=[name.encode() for name in source.class_names])
    every = np.arange(len(source.train))
    digests = {_key(ids): source.digest_of(ids) for ids in (every, *chosen)}
    out.attrs["type"] = source.type
    named = {"all": digests[_key(every)], "test": source.test_digest()}
    out.attrs["digests"] = json.dumps({**digests, **named})
