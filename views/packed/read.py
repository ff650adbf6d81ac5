"""Read the dataset in a packed file, which opens faster than tens of thousands of small files.

`views.packed.format` describes the file and `views.packed.write` writes it.

Every sample is verified with its checksum when it is read. A packed dataset is the same dataset as
its original: it has the same digest, so that both share one cache. For original bytes, the digest
is computed from them. For decoded pixels, it was computed when they were packed, and the header's
sha256 binds it to labels and checksums.
"""

from __future__ import annotations

import hashlib
import math
import shlex
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from teach_once.configs.schema import Packed
from teach_once.runtime.errors import UserError
from teach_once.runtime.machine.urls import ObjectUrl
from teach_once.store.place.mirror_files import MirrorFiles
from teach_once.views.images.decode import decode_bytes, decode_picture, shown_path
from teach_once.views.images.folders import digest_of_files, hashed_files
from teach_once.views.images.listing import kept_digest
from teach_once.views.packed.format import (
    CHECKED_BY_SAMPLE,
    HEAD_BYTES,
    MOST_INDEX_BYTES,
    SPLITS,
    SUFFIX,
    PackedFile,
    key_of,
    open_shards,
    read_index,
    sha256_in_head,
    shard_path,
)
from teach_once.views.splits import (
    DatasetError,
    Decoded,
    Digests,
    Ids,
    ImageSource,
    Split,
    check_same_size,
    crc32c,
    sample_digest,
    stack_digests,
)

RUN_SAMPLES = 1024  # most adjacent samples per read
RUN_BYTES = 2**26  # approximate most bytes per read


def verify_packed(file: PackedFile) -> None:
    """Verify the checksums of all arrays and samples. Raises DatasetError for a mismatch."""
    for split in SPLITS:
        for name in file.header.arrays:
            if name not in CHECKED_BY_SAMPLE:
                file.array(split, name)
        images = FileImages(file, split)
        if len(images):
            for _ in images.read(np.arange(len(images))):
                pass


class FileImages:
    """Images of one split of one file."""

    def __init__(self, file: PackedFile, name: str) -> None:
        self.file, self.name = file, name
        self.stored = "bytes" if file.header.kind == "encoded" else "images"
        self.labels = file.labels(name)

    def __len__(self) -> int:
        return self.file.num_samples(self.name)

    @cached_property
    def checksums(self) -> NDArray[np.uint32]:
        return self.file.checksums(self.name)

    @cached_property
    def offsets(self) -> Ids:
        """Return (N + 1,) offsets at which the samples begin."""
        if self.stored == "bytes":
            return self.file.offsets(self.name)
        bytes_each = math.prod(self.file.image_shape(self.name))
        return np.arange(len(self) + 1, dtype=np.int64) * bytes_each

    def read(self, ids: Ids) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        """Yield verified samples; adjacent samples are read together if they are not too large."""
        size = max(int(self.offsets[ids[-1] + 1] - self.offsets[ids[0]]), 1)
        rows = max(1, min(RUN_SAMPLES, len(ids) * RUN_BYTES // size))
        for run in np.split(ids, range(rows, len(ids), rows)):
            offsets = self.offsets[run[0] : run[-1] + 2].tolist()
            content = self.file.part(self.name, self.stored, offsets[0], offsets[-1])
            for sample, start, stop in zip(run.tolist(), offsets, offsets[1:], strict=False):
                own = content[start - offsets[0] : stop - offsets[0]]
                if int(self.checksums[sample]) != crc32c(own):
                    raise self.file.damaged(
                        f"{self.name} sample {sample} does not match its checksum"
                    )
                yield sample, own


_COPY_AGAIN = "copy the packed files there again"


def local_packed(url: ObjectUrl) -> Path:
    """Return the path in the mirror of a remote file or index; new bytes are verified.

    Raises DatasetError if it is missing or damaged.
    """
    try:
        return _fetched(url)
    except DatasetError:
        raise
    except UserError as error:
        raise DatasetError(f"dataset.file: {error.problem}", fix=error.fix) from None


def _fetched(url: ObjectUrl) -> Path:
    files = MirrorFiles(url.parent)
    heads: dict[str, str] = {}  # name -> sha256 of the file's header
    if url.suffix == SUFFIX:
        index = read_index(files.small(url.name, MOST_INDEX_BYTES))
        for number, shard in enumerate(index.shards):
            heads[shard_path(url, number).name] = shard.sha256
    else:
        heads[url.name] = _header_sha256(url, files.start(url.name, HEAD_BYTES))

    def is_right(name: str, path: Path) -> bool:
        try:
            return PackedFile(path).header_sha256 == heads[name]
        except DatasetError:  # another file of that name, or a damaged one
            return False

    def verify(name: str, path: Path) -> None:
        file = PackedFile(path, called=url.with_name(name), fix=_COPY_AGAIN)
        if file.header_sha256 != heads[name]:
            raise file.damaged(f"it differs from the file in {url}")
        verify_packed(file)

    files.fetch(list(heads), is_right, verify)
    return files.path(url.name)


def _header_sha256(url: ObjectUrl, start: bytes) -> str:
    if (found := sha256_in_head(start)) is None:
        raise DatasetError(f"{url} does not contain packed images, or is damaged", fix=_COPY_AGAIN)
    return found


def packed(
    file: Path, max_pixels: int = Packed.max_pixels, kept_in: Path | None = None
) -> ImageSource:
    """Open the dataset in a packed file, or in the shards of an index.

    Images are read and verified when they are used. kept_in: folder of caches next to which digests
    of encoded files are stored. A file at a URL is read through the mirror. Raises DatasetError if
    a file is missing, damaged or of another kind.
    """
    fix = None
    if isinstance(file, ObjectUrl):
        file = local_packed(file)
        fix = f"rm {shlex.quote(str(file.parent))}/*.h5; then run the same command again"
    files = open_shards(file, fix) if file.suffix == SUFFIX else (PackedFile(file, fix=fix),)
    header = files[0].header
    train, test = (_PackedImages(files, split, max_pixels) for split in SPLITS)

    def digest_of(ids: Ids) -> str:
        if train.is_encoded:
            return train.digest_of(ids, kept_in)
        if (known := header.digests.get(key_of(ids))) is not None:
            return known
        whole = header.digests.get("all", "").encode() + ids.tobytes() + train.label_bytes
        return hashlib.sha256(whole).hexdigest()

    def test_digest() -> str:
        if test.is_encoded:
            return test.digest_of(np.arange(len(test)), kept_in)
        if (known := header.digests.get("test")) is not None:
            return known
        return hashlib.sha256(test.checksums.tobytes() + test.label_bytes).hexdigest()

    return ImageSource(
        file.stem,
        header.type,
        None if header.class_names is None else tuple(header.class_names),
        train.split(),
        test.split(),
        digest_of,
        test_digest,
    )


class _PackedImages:
    """Images of one split, in one or several files."""

    def __init__(self, files: Sequence[PackedFile], name: str, max_pixels: int) -> None:
        self.name, self.max_pixels = name, max_pixels
        self.is_encoded = files[0].header.kind == "encoded"
        some = [file for file in files if file.num_samples(name)]
        self.files = [FileImages(file, name) for file in some or files[:1]]
        self.starts = np.cumsum([0, *map(len, self.files)])
        labels = [file.labels for file in self.files if file.labels is not None]
        self.labels = np.concatenate(labels) if labels else None

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def label_bytes(self) -> bytes:
        return b"" if self.labels is None else self.labels.tobytes()

    def split(self) -> Split:
        """Return the split. Raises DatasetError if the images have too many pixels."""
        if not self.is_encoded:
            height, width, _ = self.files[0].file.image_shape(self.name)
            if height * width > self.max_pixels:
                raise DatasetError(
                    f"{shown_path(self.files[0].file.path)} has images of {width:,} x "
                    f"{height:,} pixels, more than dataset.max_pixels ({self.max_pixels:,})"
                )
        opened = self.open_each if self.is_encoded else None
        return Split(
            self.labels,
            self.load,
            self.read_each,
            self.read_digests,
            self.name_of,
            opened,
            num_unlabeled=len(self) if self.labels is None else 0,
        )

    @cached_property
    def checksums(self) -> NDArray[np.uint32]:
        """Return (N,) uint32 checksums of each sample's bytes in these files."""
        return np.concatenate([file.checksums for file in self.files])

    @cached_property
    def _source_digests(self) -> Digests:
        return np.concatenate([each.file.source_digests(self.name) for each in self.files])

    def _digest(self, sample: int, content: NDArray[np.uint8]) -> bytes:
        """Return the digest of the bytes that a sample was packed from; encoded: of `content`."""
        if self.is_encoded:
            return sample_digest(content)
        return bytes(self._source_digests[sample])

    def name_of(self, sample: int) -> str:
        file = self.files[self._file_of(sample)].file
        return f"{self.name} sample {sample} of {shown_path(file.path)}"

    def digest_of(self, ids: Ids, kept_in: Path | None) -> str:
        """Return the digest of the original folder: sha256, hex."""

        def hashed() -> Iterator[bytes]:
            some = (ids[i : i + 1] for i in hashed_files(len(ids)))
            return (content.tobytes() for one in some for _, content in self._read(one))

        def compute() -> str:
            names = [name for each in self.files for name in each.file.names(self.name)]
            sizes = np.concatenate([np.diff(each.offsets) for each in self.files])[ids].tolist()
            labels = None if self.labels is None else self.labels[ids]
            return digest_of_files((names[i] for i in ids), sizes, labels, hashed())

        # The headers contain the checksums of names, sizes and labels.
        key = hashlib.sha256(self.name.encode() + ids.tobytes())
        key.update("".join(each.file.header_sha256 for each in self.files).encode())
        for content in hashed():
            key.update(content)
        return kept_digest(key.digest(), compute, kept_in)

    def load(self, ids: Ids) -> tuple[NDArray[np.uint8], Digests]:
        """Return images (M, H, W, C) uint8 and digests (M, 16) uint8 in the order of `ids`.

        Raises DatasetError if a sample is damaged.
        """
        images: NDArray[np.uint8] | None = None
        digests = []
        for place, (image, digest) in enumerate(self.read_each(ids)):
            digests.append(digest)
            if images is None:
                images = np.empty((len(ids), *image.shape), dtype=np.uint8)
            check_same_size(images.shape[1:], image, self.name_of(int(ids[place])))
            images[place] = image
        if images is None:
            raise DatasetError(f"no samples requested from {shown_path(self.files[0].file.path)}")
        return images, stack_digests(digests)

    def read_each(self, ids: Ids) -> Iterator[tuple[NDArray[np.uint8], bytes]]:
        """Yield image (H, W, C) uint8 and digest of the original bytes, in the order of `ids`."""
        for sample, content in self._read(ids):
            if self.is_encoded:
                image = decode_bytes(content.tobytes(), self.name_of(sample), self.max_pixels)
            else:
                image = content.reshape(self.files[0].file.image_shape(self.name))
            yield image, self._digest(sample, content)

    def open_each(self, ids: Ids) -> Iterator[tuple[Decoded, bytes]]:
        """Yield as `read_each`, but images that are not large are Pillow's."""
        for sample, content in self._read(ids):
            image = decode_picture(content.tobytes(), self.name_of(sample), self.max_pixels)
            yield image, self._digest(sample, content)

    def read_digests(self, ids: Ids) -> Digests:
        """Return (M, 16) uint8 digests of samples, which are read and verified."""
        return stack_digests(self._digest(*sample) for sample in self._read(ids))

    def _read(self, ids: Ids) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        """Yield sample ids with their stored bytes, verified with their checksums."""
        for some in _neighbours(ids, self.starts):
            number = self._file_of(int(some[0]))
            start = int(self.starts[number])
            for sample, content in self.files[number].read(some - start):
                yield start + sample, content

    def _file_of(self, sample: int) -> int:
        return int(np.searchsorted(self.starts, sample, side="right")) - 1


def _neighbours(ids: Ids, starts: Ids) -> Iterator[Ids]:
    """Split `ids` into runs of adjacent samples in the same file."""
    cuts = (np.diff(ids) != 1) | np.isin(ids[1:], starts)
    yield from (some for some in np.split(ids, np.flatnonzero(cuts) + 1) if len(some))
