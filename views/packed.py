"""Image folders packed into one HDF5 file: tens of thousands of small files are slow to open.

    /                attributes: format, format_version, kind ("pixels" or "encoded"), digest
    class_names      strings
    <split>/labels   (N,) int64
    <split>/images   kind pixels:  (N, H, W, C) uint8
    <split>/bytes    kind encoded: the files' own bytes, one behind the other, and
    <split>/offsets  (N + 1,) int64, where each begins
    <split>/crc32c   (N,) uint32, of each sample's bytes

Every sample that is read is compared with its checksum. `digest` is the sha256 of the training
samples and labels.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import h5py
import numpy as np
from numpy.typing import NDArray

from views.datasets import Dataset
from views.folders import decode_bytes
from views.splits import DatasetError, Ids, Source, Split, refuse_other_size

FORMAT_NAME = "teach-once-images"
FORMAT_VERSION = 2
_RUN_SAMPLES = 1024  # neighbours are read together, at most so many at a time


def pack_pixels(dataset: Dataset, file: Path) -> None:
    """Pack decoded images, all of one size; raises DatasetError where they are not."""
    with _written_aside(file, "pixels") as out:
        digest = hashlib.sha256()
        for name, split in _splits(dataset):
            out.create_dataset(f"{name}/images", data=split.images)
            contents = (image.reshape(-1).tobytes() for image in split.images)
            _finish_split(out, name, split, digest, list(map(_added_to(digest, name), contents)))
        _finish(out, dataset, digest)


def pack_encoded(dataset: Dataset, file: Path) -> None:
    """Pack the files' own bytes, whatever the images' sizes; the dataset must be a folder's."""
    with _written_aside(file, "encoded") as out:
        digest = hashlib.sha256()
        for name, split in _splits(dataset):
            if split.paths is None:
                raise DatasetError("only an image folder can be packed as encoded bytes")
            sizes = [path.stat().st_size for path in split.paths]
            offsets = np.cumsum([0, *sizes], dtype=np.int64)
            data = out.create_dataset(f"{name}/bytes", shape=(offsets[-1],), dtype=np.uint8)
            out.create_dataset(f"{name}/offsets", data=offsets)
            checksums = []
            for path, start, stop in zip(split.paths, offsets, offsets[1:], strict=False):
                content = path.read_bytes()
                if len(content) != stop - start:
                    raise DatasetError(f"{path} changed while it was packed; pack again")
                data[start:stop] = np.frombuffer(content, dtype=np.uint8)
                checksums.append(_added_to(digest, name)(content))
            _finish_split(out, name, split, digest, checksums)
        _finish(out, dataset, digest)


def _added_to(digest: Any, split: str) -> Callable[[bytes], int]:
    """A function that gives the checksum of a sample's bytes, and digests them in training."""

    def add(content: bytes) -> int:
        if split == "train":
            digest.update(content)
        return int(google_crc32c.value(content))

    return add


def packed(file: Path) -> Source:
    """The dataset in a packed file; images are read, and checked, when they are asked for.

    Raises DatasetError where the file is missing, damaged or something else.
    """
    with _opened(file) as content:
        if content.attrs.get("format") != FORMAT_NAME:
            raise DatasetError(f"{file} is an HDF5 file, but not of packed images")
        if content.attrs["format_version"] != FORMAT_VERSION:
            raise DatasetError(f"{file} has another format version; pack the images again")
        names = tuple(name.decode() for name in content["class_names"][()])
        labels = {name: np.asarray(content[f"{name}/labels"][()]) for name in ("train", "test")}
        stated = str(content.attrs["digest"])
        test_checksums = np.asarray(content["test/crc32c"][()])

    def digest_of(ids: Ids) -> str:
        whole = stated.encode() + ids.tobytes() + labels["train"].tobytes()
        return hashlib.sha256(whole).hexdigest()

    def test_digest() -> str:
        return hashlib.sha256(test_checksums.tobytes() + labels["test"].tobytes()).hexdigest()

    train, test = (_packed_split(file, name, labels[name]) for name in ("train", "test"))
    return Source(file.stem, names, train, test, digest_of, test_digest)


def _packed_split(file: Path, name: str, labels: Ids) -> Split:
    images = _PackedImages(file, name)
    return Split(labels, images.read_some, images.read_each, images.name_of)


@dataclass(frozen=True)
class _PackedImages:
    """Images of one split, by their place in the file."""

    file: Path
    split: str

    def name_of(self, sample: int) -> str:
        return f"{self.split} sample {sample} of {self.file}"

    def read_some(self, ids: Ids) -> NDArray[np.uint8]:
        """(M, H, W, C) uint8, in the order asked for. Raises DatasetError."""
        images: NDArray[np.uint8] | None = None
        for place, image in enumerate(self.read_each(ids)):
            if images is None:
                images = np.empty((len(ids), *image.shape), dtype=np.uint8)
            refuse_other_size(images.shape[1:], image, self.name_of(int(ids[place])))
            images[place] = image
        if images is None:
            raise DatasetError(f"no images asked for of {self.file}")
        return images

    def read_each(self, ids: Ids) -> Iterator[NDArray[np.uint8]]:
        """(H, W, C) uint8, one by one in the order asked for, each checked."""
        with _opened(self.file) as packed:
            group = packed[self.split]
            checksums = group["crc32c"][()]
            for run in _runs(ids):
                for sample, content in zip(run, self._contents(group, run), strict=True):
                    if int(checksums[sample]) != _crc(content):
                        raise DatasetError(
                            f"{self.file} is damaged: {self.split} sample {sample} does not match "
                            f"its checksum; pack the images again"
                        )
                    is_encoded = "bytes" in group
                    name = self.name_of(int(sample))
                    yield decode_bytes(content.tobytes(), name) if is_encoded else content

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
        yield from np.split(some, range(_RUN_SAMPLES, len(some), _RUN_SAMPLES))


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


class _written_aside:
    """An HDF5 file that gets its name only when it is whole."""

    def __init__(self, file: Path, kind: str) -> None:
        if not file.parent.is_dir():
            raise DatasetError(f"there is no folder {file.parent}")
        self._path, self._kind = file, kind
        self._aside = file.with_name(f".{file.name}.{os.getpid()}.tmp")

    def __enter__(self) -> h5py.File:
        self._file = h5py.File(self._aside, "w", libver="latest")
        self._file.attrs["format"] = FORMAT_NAME
        self._file.attrs["format_version"] = FORMAT_VERSION
        self._file.attrs["kind"] = self._kind
        return self._file

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._file.close()
        if error is not None:
            self._aside.unlink(missing_ok=True)
            return
        with self._aside.open("rb") as done:
            os.fsync(done.fileno())
        self._aside.replace(self._path)


def _splits(dataset: Dataset) -> Iterator[tuple[str, Split]]:
    yield "train", dataset.train
    yield "test", dataset.test


def _finish_split(
    out: h5py.File, name: str, split: Split, digest: Any, checksums: list[int]
) -> None:
    out.create_dataset(f"{name}/labels", data=split.labels)
    out.create_dataset(f"{name}/crc32c", data=np.array(checksums, dtype=np.uint32))
    if name == "train":
        digest.update(split.labels.tobytes())


def _finish(out: h5py.File, dataset: Dataset, digest: Any) -> None:
    out.create_dataset("class_names", data=[name.encode() for name in dataset.class_names])
    out.attrs["digest"] = digest.hexdigest()


def _crc(data: NDArray[np.uint8]) -> int:
    return int(google_crc32c.value(np.ascontiguousarray(data).reshape(-1)))
