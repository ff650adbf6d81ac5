"""Image folders packed into one HDF5 file: tens of thousands of small files are slow to open.

    /                attributes: format, format_version, kind ("pixels" or "encoded"), digest
    class_names      strings
    <split>/labels   (N,) int64
    <split>/images   kind pixels:  (N, H, W, C) uint8
    <split>/bytes    kind encoded: the files' own bytes, one behind the other, and
    <split>/offsets  (N + 1,) int64, where each begins

`images` and `bytes` carry the attribute `block_crc32c`: of each 1,024 samples' bytes. Whatever is
read is read in such blocks and checked. `digest` is the sha256 of the training samples and labels.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import h5py
import numpy as np
from numpy.typing import NDArray

from views.datasets import Dataset
from views.folders import decode_bytes, refuse_other_size
from views.splits import DatasetError, Ids, Source, Split

FORMAT_NAME = "teach-once-images"
FORMAT_VERSION = 1
BLOCK_SAMPLES = 1024
_BLOCK_CRC = "block_crc32c"


def pack_pixels(dataset: Dataset, file: Path) -> None:
    """Pack decoded images, all of one size; raises DatasetError where they are not."""
    with _written_aside(file, "pixels") as out:
        digest = hashlib.sha256()
        for name, split in _splits(dataset):
            images = split.images
            data = out.create_dataset(f"{name}/images", data=images)
            blocks = [images[s : s + BLOCK_SAMPLES] for s in range(0, len(images), BLOCK_SAMPLES)]
            data.attrs[_BLOCK_CRC] = [_crc(block) for block in blocks]
            _finish_split(out, name, split, digest, [images.reshape(-1).data])
        _finish(out, dataset, digest)


def pack_encoded(dataset: Dataset, file: Path) -> None:
    """Pack the files' own bytes, whatever the images' sizes; the dataset must be a folder's."""
    with _written_aside(file, "encoded") as out:
        digest = hashlib.sha256()
        for name, split in _splits(dataset):
            if split.paths is None:
                raise DatasetError("only an image folder can be packed as encoded bytes")
            contents = [path.read_bytes() for path in split.paths]
            offsets = np.cumsum([0, *(len(content) for content in contents)], dtype=np.int64)
            joined = np.frombuffer(b"".join(contents), dtype=np.uint8)
            data = out.create_dataset(f"{name}/bytes", data=joined)
            out.create_dataset(f"{name}/offsets", data=offsets)
            edges = [*offsets[:-1:BLOCK_SAMPLES], offsets[-1]]
            blocks = [joined[a:b] for a, b in itertools.pairwise(edges)]
            data.attrs[_BLOCK_CRC] = [_crc(block) for block in blocks]
            _finish_split(out, name, split, digest, contents)
        _finish(out, dataset, digest)


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

    def digest_of(ids: Ids) -> str:
        whole = stated.encode() + ids.tobytes() + labels["train"].tobytes()
        return hashlib.sha256(whole).hexdigest()

    train, test = (
        Split(labels[name], _PackedImages(file, name).read) for name in ("train", "test")
    )
    return Source(file.stem, names, train, test, digest_of)


@dataclass(frozen=True)
class _PackedImages:
    """Images of one split, by their place in the file."""

    file: Path
    split: str

    def read(self, ids: NDArray[np.int64]) -> NDArray[np.uint8]:
        """(M, H, W, C) uint8, in the order asked for; every block that is touched is checked."""
        images: NDArray[np.uint8] | None = None
        with _opened(self.file) as packed:
            group = packed[self.split]
            for block in np.unique(ids // BLOCK_SAMPLES):
                wanted = np.flatnonzero(ids // BLOCK_SAMPLES == block)
                found = self._read_block(group, int(block), ids[wanted] % BLOCK_SAMPLES)
                if images is None:
                    images = np.empty((len(ids), *found[0].shape), dtype=np.uint8)
                for place, image in zip(wanted, found, strict=True):
                    refuse_other_size(
                        images.shape[1:], image, f"sample {ids[place]} of {self.file}"
                    )
                    images[place] = image
        if images is None:
            raise DatasetError(f"no images asked for of {self.file}")
        return images

    def _read_block(
        self, group: h5py.Group, block: int, rows: NDArray[np.int64]
    ) -> list[NDArray[np.uint8]]:
        start = block * BLOCK_SAMPLES
        if "images" in group:
            images = np.asarray(group["images"][start : start + BLOCK_SAMPLES])
            self._check(group["images"], block, images)
            return list(images[rows])
        offsets = np.asarray(group["offsets"][start : start + BLOCK_SAMPLES + 1])
        data = np.asarray(group["bytes"][offsets[0] : offsets[-1]])
        self._check(group["bytes"], block, data)
        ends = offsets - offsets[0]
        return [
            decode_bytes(data[ends[row] : ends[row + 1]].tobytes(), f"sample {start + row}")
            for row in rows
        ]

    def _check(self, data: h5py.Dataset, block: int, found: NDArray[np.uint8]) -> None:
        if int(data.attrs[_BLOCK_CRC][block]) != _crc(found):
            first = block * BLOCK_SAMPLES
            raise DatasetError(
                f"{self.file} is damaged: {self.split} samples {first} to "
                f"{first + BLOCK_SAMPLES - 1} do not match their checksum; pack the images again"
            )


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
    out: h5py.File, name: str, split: Split, digest: Any, contents: list[Any]
) -> None:
    out.create_dataset(f"{name}/labels", data=split.labels)
    if name == "train":
        for content in contents:
            digest.update(content)
        digest.update(split.labels.tobytes())


def _finish(out: h5py.File, dataset: Dataset, digest: Any) -> None:
    out.create_dataset("class_names", data=[name.encode() for name in dataset.class_names])
    out.attrs["digest"] = digest.hexdigest()


def _crc(data: NDArray[np.uint8]) -> int:
    return int(google_crc32c.value(np.ascontiguousarray(data).reshape(-1)))
