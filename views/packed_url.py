"""Packed images at s3://bucket/prefix/FILE.h5, or in the shards of FILE.json there.

All of them are fetched into the mirror before the first image is read: a training reads its samples
in random order, and the processes that decode them are forked, which no client of an object store
survives. What the mirror holds is compared with the index, or with the head of the file there, and
not fetched again.
"""

from __future__ import annotations

from pathlib import Path

from runtime.errors import UserError
from runtime.urls import ObjectUrl
from store.mirror_files import MirrorFiles
from views.packed_file import HEAD_BYTES, PackedFile, sha256_in_head
from views.packed_samples import verify_packed
from views.shard_index import MOST_INDEX_BYTES, SUFFIX, read_index, shard_path
from views.splits import DatasetError

_COPY_AGAIN = "copy the packed files there again"


def local_packed(url: ObjectUrl) -> Path:
    """The file, or the index, in the mirror: complete, and every byte that is new there verified.

    Raises DatasetError.
    """
    try:
        return _fetched(url)
    except DatasetError:
        raise
    except UserError as error:
        raise DatasetError(f"dataset.file: {error.problem}", fix=error.fix) from None


def _fetched(url: ObjectUrl) -> Path:
    files = MirrorFiles(ObjectUrl(*url.parent.parts))
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
        except DatasetError:  # another one of that name, or damaged
            return False

    def verify(name: str, path: Path) -> None:
        file = PackedFile(path, called=url.with_name(name), fix=_COPY_AGAIN)
        if file.header_sha256 != heads[name]:
            raise file.damaged(f"it is not the file that {url} names")
        verify_packed(file)

    files.fetch(list(heads), is_right, verify)
    return files.path(url.name)


def _header_sha256(url: ObjectUrl, start: bytes) -> str:
    if (found := sha256_in_head(start)) is None:
        raise DatasetError(f"{url} does not hold packed images, or is damaged", fix=_COPY_AGAIN)
    return found
