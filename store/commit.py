"""Commits one block to an object store: its chunks, then a line of the journal, each if absent.

Nothing is locked, renamed or appended, so any number of writers may commit the same block at the
same time, and each may be killed at any moment. Who finds a chunk there that is whole adopts it:
another device rounds otherwise, and the records of either will do. What the line says is what is
there, whoever put it. Only the line makes the block exist.

A block's lines are numbered objects, `journal/<view>/<block>/<number>.jsonl`. None is ever changed:
what is committed again, because it was damaged or taps were added, takes the next number.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NamedTuple

import google_crc32c
import numpy as np

from store.errors import CacheBusy, CacheError, CacheMissing, SamplesChanged
from store.identity import identity_sha256
from store.journal import IDENTITY_DIGITS, MAX_LINE_BYTES, Line, line_text, parse_line
from store.layout import CHECKSUM_BYTES, JOURNAL, Block, chunk_name, crc_hex
from store.manifest import Manifest
from store.objects import Objects, in_parallel

MOST_LINES = 999_999  # of a block; their numbers have six digits
_TRIES = 5  # to put one chunk, while others put and replace it


class Committed(NamedTuple):
    """A block that exists. checksums: crc32c (hex) of each array's chunk.

    adopted: arrays whose chunks another writer put, with other bytes than ours. is_new: whether
    this call put the line; else the same one was there. number: of that line.
    """

    checksums: dict[str, str]
    adopted: frozenset[str]
    is_new: bool
    number: int


def commit_block(
    objects: Objects,
    manifest: Manifest,
    block: Block,
    chunks: Mapping[str, bytes],
    *,
    number: int = 1,
    unsound: Collection[str] = (),
    known: Collection[str] = (),
) -> Committed:
    """Put a block's chunks, or adopt those that are there; then its line.

    chunks: array -> the bytes of its chunk, with their checksum, as `encode_chunk` makes them.
    number: the first that the line may have. unsound: arrays whose chunks were found not to be
    what an earlier line says; whatever is there of them is replaced, unless it has these bytes.
    known: arrays of which these very bytes are there for sure, and are not put again.

    Raises SamplesChanged where the samples' checksums are there and others; CacheBusy where other
    processes keep replacing a chunk; ObjectsUnreachable, which names the object.
    """
    arrays = manifest.arrays
    keys = {array: chunk_name(array, arrays[array], block) for array in chunks}

    def put(array: str) -> tuple[str, bytes]:
        if array in known:
            return array, chunks[array]
        return array, _put_or_adopt(objects, keys[array], chunks[array], array in unsound)

    shared = [array for array in chunks if arrays[array].all_views]  # before all that rest on them
    there = dict(map(put, shared))
    for array in shared:
        _refuse_others(objects, block, chunks[array], there[array])
    there |= in_parallel(put, [array for array in chunks if array not in there])
    checksums = {array: crc_hex(_stated(there[array])) for array in sorted(chunks)}
    identity = identity_sha256(manifest.identity)[:IDENTITY_DIGITS]
    line = Line(identity, block.view, block.index, block.rows, checksums)
    is_new, number = _put_line(objects, line, number)
    adopted = frozenset(array for array in chunks if there[array] != chunks[array])
    return Committed(checksums, adopted, is_new, number)


def line_key(view: int, block: int, number: int) -> str:
    """The object of one line: `journal/<view>/<block>/<number>.jsonl`."""
    return f"{JOURNAL}/{view}/{block}/{number:06d}.jsonl"


def is_sound(chunk: bytes) -> bool:
    """Whether a chunk's bytes are those of the checksum that ends them."""
    return len(chunk) > CHECKSUM_BYTES and (
        google_crc32c.value(chunk[:-CHECKSUM_BYTES]) == _stated(chunk)
    )


def _stated(chunk: bytes) -> int:
    return int.from_bytes(chunk[-CHECKSUM_BYTES:], "little")


def _put_or_adopt(objects: Objects, key: str, data: bytes, is_unsound: bool) -> bytes:
    """What is there of a chunk afterwards: `data`, or the sound bytes of another writer."""
    for _ in range(_TRIES):
        if objects.put_if_absent(key, data):
            return data
        try:
            found = objects.get_tagged(key, len(data))
            if found.content == data:
                return data
            whole = found.content if found.size == len(data) else None
            if whole is not None and is_sound(whole) and not is_unsound:
                return whole
            objects.replace(key, data, found.tag)
            return data
        except CacheMissing:  # removed meanwhile
            continue
        except CacheBusy:
            is_unsound = False  # whoever replaced it has mended it
    raise CacheBusy(
        f"{objects.url / key} is replaced again and again by other processes",
        fix="end all but one of the passes that write this cache, and run again",
    )


def _refuse_others(objects: Objects, block: Block, ours: bytes, theirs: bytes) -> None:
    """Raise SamplesChanged where records that are there were computed from other bytes."""
    if ours != theirs:
        values, others = (np.frombuffer(each[:-CHECKSUM_BYTES], "<u4") for each in (ours, theirs))
        changed = np.flatnonzero((values != others)[: block.rows])
        raise SamplesChanged(objects.url, block.start + changed)


def _put_line(objects: Objects, line: Line, number: int) -> tuple[bool, int]:
    """Put a line under the first free number; whether it is new, and its number."""
    text = line_text(line) + b"\n"
    while number <= MOST_LINES:
        key = line_key(line.view, line.block, number)
        if objects.put_if_absent(key, text):
            return True, number
        there = read_line(objects, key)
        if there is not None and _says(there, line):
            return False, number
        number += 1
    raise no_number_left(objects.url / JOURNAL)


def no_number_left(journal: Path) -> CacheError:
    """The error of a journal with a file or a line of the last number."""
    return CacheError(
        f"{journal} has a file or a line of the last number, {MOST_LINES}: none is left for others",
        fix=f"remove what has the number {MOST_LINES} there with the store's own programs, then "
        "run the same command again: chunks that are there are kept",
    )


def read_line(objects: Objects, key: str) -> Line | None:
    """A block's line; None where the object is not exactly one. Raises CacheMissing."""
    content = objects.get_tagged(key, MAX_LINE_BYTES).content or b""
    return parse_line(content[:-1]) if content.endswith(b"\n") else None


def _says(there: Line, line: Line) -> bool:
    """Whether a line commits all that another one would."""
    same = there[:4] == line[:4]
    return same and there.checksums.items() >= line.checksums.items()
