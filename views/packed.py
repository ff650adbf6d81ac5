"""The dataset in a file of packed images: tens of thousands of small files are slow to open.

`views.packed_file` says what is in the file, `views.pack` makes it.

Every sample that is read is compared with its checksum. A packed dataset is the dataset that it was
packed from: it has that one's digest, so a cache of the one serves the other. Where the files' own
bytes are kept, the digest is computed from them; of decoded pixels it is what the packing program
found, bound to labels and checksums by the header's own sha256.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from configs.schema import Packed
from views.folders import digest_of_files, hashed_files
from views.packed_file import PackedFile
from views.pictures import decode_bytes, shown_path
from views.splits import Checksums, DatasetError, Ids, Source, Split, crc32c, refuse_other_size

RUN_SAMPLES = 1024  # neighbours are read together, at most so many
RUN_BYTES = 2**26  # and at most about so many bytes


def packed(file: Path, max_pixels: int = Packed.max_pixels) -> Source:
    """The dataset in a packed file; images are read, and checked, when they are asked for.

    Raises DatasetError where the file is missing, damaged or something else.
    """
    content = PackedFile(file)
    header = content.header
    train, test = (_PackedImages(content, split, max_pixels) for split in ("train", "test"))

    def digest_of(ids: Ids) -> str:
        if train.is_encoded:
            return train.digest_of(ids)
        if (known := header.digests.get(key_of(ids))) is not None:
            return known
        whole = header.digests.get("all", "").encode() + ids.tobytes() + train.labels.tobytes()
        return hashlib.sha256(whole).hexdigest()

    def test_digest() -> str:
        if test.is_encoded:
            return test.digest_of(np.arange(len(test.labels)))
        if (known := header.digests.get("test")) is not None:
            return known
        return hashlib.sha256(test.checksums.tobytes() + test.labels.tobytes()).hexdigest()

    return Source(
        file.stem,
        header.type,
        tuple(header.class_names),
        train.split(),
        test.split(),
        digest_of,
        test_digest,
    )


def key_of(ids: Ids) -> str:
    """What `digests` calls a choice of samples."""
    return hashlib.sha256(np.ascontiguousarray(ids, dtype="<i8").tobytes()).hexdigest()


@dataclass(frozen=True)
class _PackedImages:
    """Images of one split of a file."""

    file: PackedFile
    name: str
    max_pixels: int

    def split(self) -> Split:
        """Raises DatasetError where labels or images cannot be."""
        if not self.is_encoded:
            height, width, _ = self.file.image_shape(self.name)
            if height * width > self.max_pixels:
                raise DatasetError(
                    f"{shown_path(self.file.path)} holds images of {width:,} x {height:,} pixels, "
                    f"more than dataset.max_pixels ({self.max_pixels:,})"
                )
        return Split(self.labels, self.load, self.read_each, self.read_checksums, self.name_of)

    @property
    def is_encoded(self) -> bool:
        return self.file.header.kind == "encoded"

    @cached_property
    def labels(self) -> Ids:
        return self.file.labels(self.name)

    @cached_property
    def checksums(self) -> Checksums:
        """Of each sample's bytes in this file."""
        return self.file.checksums(self.name)

    @cached_property
    def source_checksums(self) -> Checksums:
        """Of the bytes that each sample was packed from."""
        if self.is_encoded:
            return self.checksums
        return self.file.checksums(self.name, "source_crc32c")

    @cached_property
    def offsets(self) -> Ids:
        """(N + 1,): where each sample begins among the bytes."""
        if self.is_encoded:
            return self.file.offsets(self.name)
        bytes_each = int(np.prod(self.file.image_shape(self.name)))
        return np.arange(len(self.labels) + 1, dtype=np.int64) * bytes_each

    def name_of(self, sample: int) -> str:
        return f"{self.name} sample {sample} of {shown_path(self.file.path)}"

    def digest_of(self, ids: Ids) -> str:
        """What the folder's digest would be: sha256, hex."""
        names = self.file.names(self.name)

        hashed = (ids[i : i + 1] for i in hashed_files(len(ids)))
        contents = (content.tobytes() for one in hashed for _, content in self._read(one))
        sizes = np.diff(self.offsets)[ids].tolist()
        return digest_of_files((names[i] for i in ids), sizes, self.labels[ids], contents)

    def load(self, ids: Ids) -> tuple[NDArray[np.uint8], Checksums]:
        """(M, H, W, C) uint8 and (M,) uint32, in the order asked for. Raises DatasetError."""
        images: NDArray[np.uint8] | None = None
        for place, (image, _) in enumerate(self.read_each(ids)):
            if images is None:
                images = np.empty((len(ids), *image.shape), dtype=np.uint8)
            refuse_other_size(images.shape[1:], image, self.name_of(int(ids[place])))
            images[place] = image
        if images is None:
            raise DatasetError(f"no images asked for of {shown_path(self.file.path)}")
        return images, self.source_checksums[ids]

    def read_each(self, ids: Ids) -> Iterator[tuple[NDArray[np.uint8], int]]:
        """(H, W, C) uint8 and the checksum of what it was packed from, in the order asked for."""
        for sample, content in self._read(ids):
            if self.is_encoded:
                image = decode_bytes(content.tobytes(), self.name_of(sample), self.max_pixels)
            else:
                image = content.reshape(self.file.image_shape(self.name))
            yield image, int(self.source_checksums[sample])

    def read_checksums(self, ids: Ids) -> Checksums:
        """(M,) uint32, each after its sample was read and checked."""
        for _ in self._read(ids):
            pass
        return self.source_checksums[ids]

    def _read(self, ids: Ids) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        """Sample, and what is stored of it, compared with its checksum."""
        stored = "bytes" if self.is_encoded else "images"
        for run in _runs(ids, self.offsets):
            offsets = self.offsets[run[0] : run[-1] + 2]
            content = self.file.part(self.name, stored, int(offsets[0]), int(offsets[-1]))
            for sample, start, stop in zip(
                run.tolist(), offsets - offsets[0], offsets[1:] - offsets[0], strict=False
            ):
                if int(self.checksums[sample]) != crc32c(content[start:stop]):
                    raise self.file.damaged(
                        f"{self.name} sample {sample} does not match its checksum"
                    )
                yield sample, content[start:stop]


def _runs(ids: Ids, offsets: Ids) -> Iterator[Ids]:
    """`ids`, cut where the next one is not the neighbour of the one before, or too much at once."""
    for some in np.split(ids, np.flatnonzero(np.diff(ids) != 1) + 1):
        if not len(some):
            continue
        size = max(int(offsets[some[-1] + 1] - offsets[some[0]]), 1)
        rows = max(1, min(RUN_SAMPLES, len(some) * RUN_BYTES // size))
        yield from np.split(some, range(rows, len(some), rows))
