"""Packs a dataset into one file: decoded pixels, or encoded files as they are or made smaller."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import numpy as np

from configs.schema import ImageFolder
from views.encoded import EncodedSource, EncodedSplit
from views.new_packed import NewPackedFile, new_packed_file, refuse_missing_folder
from views.packed_file import ARRAYS, SPLITS, key_of
from views.packed_header import ArrayPlace, Header
from views.recode import Recode
from views.recoding import recoded_files
from views.splits import (
    DatasetError,
    Ids,
    Source,
    Split,
    check_class_name,
    crc32c,
    refuse_other_size,
)

_CHUNK_BYTES = 2**26  # of decoded images in memory
_LARGEST = ArrayPlace(offset=2**48, dtype="<i8", shape=[2**48] * 4, crc32c=2**32 - 1)
_PER_SAMPLE = ("labels", "crc32c", "source_crc32c")
OWN_TYPE = "packed"  # of a dataset whose images were encoded anew: it is one of its own
Advance = Callable[[int], None]


def pack_pixels(source: Source, file: Path, chosen: Iterable[Ids] = ()) -> None:
    """Pack decoded images, all of one size; raises DatasetError where they are not.

    chosen: training samples that configs will choose, besides all of them.
    """
    every = np.arange(len(source.train))
    digests = {key_of(ids): source.digest_of(ids) for ids in (every, *chosen)}
    digests |= {"all": digests[key_of(every)], "test": source.test_digest()}
    splits = dict(zip(SPLITS, (source.train, source.test), strict=True))
    shapes = {
        name: {
            "images": (len(split), *split.first_shape),
            **dict.fromkeys(_PER_SAMPLE, (len(split),)),
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
    **extra: Any,
) -> None:
    """Pack the files' own bytes, or what they are recoded to. Raises DatasetError.

    num_workers: processes that recode; 0: this one. advance: is told of files that are done.
    extra: more fields of the header. Recoded files wait in an unnamed file of the same folder.
    """
    if recode is None:
        _pack_files(source, file, _counted(source.files(max_pixels), advance), extra)
        return
    refuse_missing_folder(file)
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


def new_header(kind: str, dataset_type: str, class_names: Iterable[str], **more: Any) -> Header:
    """A header whose places take as many digits as any; raises DatasetError for odd names."""
    names = list(class_names)
    for name in names:
        check_class_name(name, f"class {name!r}")
    places = {name: dict.fromkeys(ARRAYS[kind], _LARGEST) for name in SPLITS}
    return Header(kind=kind, type=dataset_type, class_names=names, splits=places, **more)


def _pack_files(
    source: EncodedSource, file: Path, contents: Iterator[bytes], extra: Mapping[str, Any]
) -> None:
    """contents: of all files of both splits, of the sizes that the source says."""
    names = {
        split: "".join(f"{name}\0" for name in each.names).encode()
        for split, each in source.splits.items()
    }
    shapes = {
        split: {
            "bytes": (sum(each.sizes),),
            "offsets": (len(each) + 1,),
            "names": (len(names[split]),),
            **dict.fromkeys(("labels", "crc32c"), (len(each),)),
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
    out.put(name, "labels", split.labels)
    out.put(name, "offsets", offsets)
    out.put(name, "crc32c", np.array(sums, dtype=np.uint32))


def _spooled(contents: Iterable[bytes], spool: IO[bytes], file: Path) -> list[int]:
    """Append all to a file; their sizes. Raises OSError with the name `file`."""
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
        images, checksums = split.load(ids)
        refuse_other_size(shape, images[0], split.name_of(start), split.name_of(0))
        out.write(name, "images", start * int(np.prod(shape)), images)
        sums += [crc32c(image) for image in images]
        of_sources.append(checksums)
    out.put(name, "labels", split.labels)
    out.put(name, "crc32c", np.array(sums, dtype=np.uint32))
    out.put(name, "source_crc32c", np.concatenate(of_sources))
