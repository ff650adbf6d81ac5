"""The commit log of a cache in a bucket: a block's chunks, then its line, each put if absent.

Nothing is locked, renamed or appended, so any number of writers may commit the same block at the
same time, and each may be killed at any moment. A writer keeps an intact chunk that already exists.
Devices round differently, and either result is valid. So the line names the checksums of the chunks
that are stored, whichever writer put them. Only the line makes the block exist.

A block's lines are numbered objects, `journal/<view>/<block>/<number>.jsonl`. None is ever changed:
what is committed again, because it was damaged or taps were added, takes the next number.
"""

from __future__ import annotations

import dataclasses
import io
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from teach_once.runtime.formats import counted
from teach_once.runtime.safe.safe_read import BadFile
from teach_once.store.errors import (
    CacheBusy,
    CacheDamaged,
    CacheError,
    CacheMissing,
    SamplesChanged,
    remote_fix,
)
from teach_once.store.format.journal import (
    IDENTITY_DIGITS,
    MAX_LINE_BYTES,
    SPARE_BYTES,
    Coverage,
    Journal,
    Line,
    enter_line,
    is_journal_file,
    journal_text,
    line_text,
    most_journal_bytes,
    parse_line,
    read_journal_file,
)
from teach_once.store.format.manifest import Manifest
from teach_once.store.format.spec import (
    CHECKSUM_BYTES,
    DIGEST_BYTES,
    JOURNAL,
    Block,
    bytes_crc32c,
    chunk_name,
    crc_hex,
)
from teach_once.store.identity import identity_sha256
from teach_once.store.place.bucket import Bucket, in_parallel
from teach_once.store.place.commit_log import Chunks

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
    objects: Bucket,
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
    """Return True if a chunk's bytes are those of the checksum that ends them."""
    return len(chunk) > CHECKSUM_BYTES and (bytes_crc32c(chunk[:-CHECKSUM_BYTES]) == _stated(chunk))


def _stated(chunk: bytes) -> int:
    return int.from_bytes(chunk[-CHECKSUM_BYTES:], "little")


def _put_or_adopt(objects: Bucket, key: str, data: bytes, is_unsound: bool) -> bytes:
    """What is there of a chunk afterwards: `data`, or the sound bytes of another writer."""
    for _ in range(_TRIES):
        if objects.create(key, data):
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


def _refuse_others(objects: Bucket, block: Block, ours: bytes, theirs: bytes) -> None:
    """Raise SamplesChanged where records that are there were computed from other bytes."""
    if ours != theirs:
        values, others = (
            np.frombuffer(each[:-CHECKSUM_BYTES], np.uint8).reshape(-1, DIGEST_BYTES)
            for each in (ours, theirs)
        )
        changed = np.flatnonzero((values != others).any(axis=1)[: block.rows])
        raise SamplesChanged(objects.url, block.start + changed)


def _put_line(objects: Bucket, line: Line, number: int) -> tuple[bool, int]:
    """Put a line under the first free number; whether it is new, and its number."""
    text = line_text(line) + b"\n"
    while number <= MOST_LINES:
        key = line_key(line.view, line.block, number)
        if objects.create(key, text):
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


def read_line(objects: Bucket, key: str) -> Line | None:
    """A block's line; None where the object is not exactly one. Raises CacheMissing."""
    content = objects.get_tagged(key, MAX_LINE_BYTES).content or b""
    return parse_line(content[:-1]) if content.endswith(b"\n") else None


def _says(there: Line, line: Line) -> bool:
    """Return True if a line commits all that another one would."""
    same = there[:4] == line[:4]
    return same and there.checksums.items() >= line.checksums.items()


_OTHER_OBJECTS = 100_000  # zarr.json, labels, whole journals, and what others have put there
_MOST_WHOLE = 10_000  # whole journals
_MOST_REPEATED = 32  # times that they may say all there is to say, twice each
_LINES_PER_BLOCK = 100  # on average, and far more than any cache has
_LINE_KEY = re.compile(rf"{JOURNAL}/(0|[1-9]\d{{0,6}})/(0|[1-9]\d{{0,9}})/(\d{{6}})\.jsonl")


class _Key(NamedTuple):
    """Of one line."""

    number: int
    view: int
    block: int

    def __str__(self) -> str:
        return line_key(self.view, self.block, self.number)


@dataclass(frozen=True)
class RemoteJournal:
    """What is committed of a cache on a store, and the numbers of its lines.

    newest: number of the newest whole journal; 0 without one. numbers: (view, block) -> the highest
    of its lines. num_loose: lines that no whole journal repeats. These two are empty where the
    newest whole journal was enough.
    """

    committed: Journal
    newest: int = 0
    numbers: dict[tuple[int, int], int] = field(default_factory=dict)
    num_loose: int = 0

    def next_number(self, view: int, block: int) -> int:
        """Under which a line of that block is newer than all that is committed."""
        return max(self.newest, self.numbers.get((view, block), 0)) + 1


def read_remote_journal(
    objects: Bucket, manifest: Manifest, *, every_line: bool = False
) -> RemoteJournal:
    """What is committed. every_line: look for lines even if the newest whole journal is complete.

    Needs a request for the names and one for the newest whole journal. Where that does not name all
    that the manifest plans, also one for each other journal, one for each thousand lines, and one
    for each line that no journal repeats. Raises CacheDamaged, ObjectsUnreachable.
    """
    sizes = _whole_sizes(objects, manifest)
    last = _whole_journals(objects, manifest, dict(list(sizes.items())[-1:]))
    if not every_line and Coverage(manifest, last.journal.there).is_complete:
        return RemoteJournal(last.journal, last.newest)
    read = _whole_journals(objects, manifest, sizes) if len(sizes) > 1 else last
    whole, newest = read.journal, read.newest
    keys = _line_keys(objects, manifest)
    loose = [key for key in keys if key.number > newest or _lacks(whole, key)]
    lines = dict(zip(loose, in_parallel(lambda k: read_line(objects, str(k)), loose), strict=True))
    journal = Journal.empty(manifest)
    _enter(objects, manifest, journal, {k: v for k, v in lines.items() if k.number <= newest})
    _overlay(journal, whole)
    _enter(objects, manifest, journal, {k: v for k, v in lines.items() if k.number > newest})
    numbers = {(key.view, key.block): key.number for key in keys}  # the highest one comes last
    return RemoteJournal(journal, newest, numbers, len(loose))


def put_whole_journal(objects: Bucket, manifest: Manifest, known: RemoteJournal) -> RemoteJournal:
    """Put all that is known to be committed as one object, newer than all lines it repeats.

    Returns what is known afterwards. Another process may put the same at the same time; lines that
    are put meanwhile still count.
    """
    text = journal_text(identity_sha256(manifest.identity), manifest, known.committed.committed)
    number = max(known.newest + 1, *known.numbers.values(), 0)
    while number <= MOST_LINES:
        key = f"{JOURNAL}/{number:06d}-0000.jsonl"
        is_there = objects.create(key, text)
        if is_there or objects.get_tagged(key, len(text)).content == text:
            return dataclasses.replace(known, newest=number, num_loose=0)
        number += 1
    raise no_number_left(objects.url / JOURNAL)


def line_numbers(keys: Iterable[str]) -> Iterator[tuple[int, int, int]]:
    """The number, view and block of each key that is one of a line."""
    for key in keys:
        if (match := _LINE_KEY.fullmatch(key)) is not None:
            view, block, number = map(int, match.groups())
            yield number, view, block


def most_objects(manifest: Manifest) -> int:
    """More than a cache ever has on a store: its chunks, its lines, and the rest."""
    blocks = manifest.num_views * manifest.blocks_per_view
    return (2 * len(manifest.arrays) + _LINES_PER_BLOCK) * blocks + _OTHER_OBJECTS


class _Whole(NamedTuple):
    """What whole journals say. newest: the highest number of one that has a line of this cache."""

    journal: Journal
    newest: int


def _whole_sizes(objects: Bucket, manifest: Manifest) -> dict[str, int]:
    """The names of the whole journals, in order, with their bytes.

    Raises CacheDamaged where there is more of them than any cache has.
    """
    _, found = objects.names(JOURNAL)
    listed = {each.key.rpartition("/")[2]: each.size for each in found}
    sizes = {name: listed[name] for name in sorted(filter(is_journal_file, listed))}
    most = SPARE_BYTES + _MOST_REPEATED * (most_journal_bytes(manifest) - SPARE_BYTES)
    if (total := sum(sizes.values())) > most or len(sizes) > _MOST_WHOLE:
        raise CacheDamaged(
            f"{objects.url / JOURNAL} holds {counted(len(sizes), 'file')} of {total:,} bytes, "
            f"expected at most {_MOST_WHOLE:,} of {most:,}",
            fix=remote_fix(objects.url, manifest.teacher),
        )
    return sizes


def _whole_journals(objects: Bucket, manifest: Manifest, sizes: Mapping[str, int]) -> _Whole:
    """Read whole journals; later names win. Keeps a few of them in memory at a time.

    A file without any line of this cache does not count: else another cache's could take the last
    number, and no block would ever be committed again. sizes: as listed; of more than that, nothing
    is read.
    """
    journal, newest = Journal.empty(manifest), 0
    keys = {f"{JOURNAL}/{name}": size for name, size in sizes.items()}
    contents = in_parallel(lambda key: objects.get(key, keys[key]), list(keys))
    for key, content in zip(keys, contents, strict=True):
        file: Any = io.BytesIO(content)
        try:
            is_ours = read_journal_file(file, objects.url / key, len(content), manifest, journal)
        except BadFile as error:
            fix = remote_fix(objects.url, manifest.teacher)
            raise CacheDamaged(error.problem, fix=fix) from None
        if is_ours:
            newest = int(key.rpartition("/")[2][:6])
    return _Whole(journal, newest)


def _line_keys(objects: Bucket, manifest: Manifest) -> list[_Key]:
    """List the keys of all lines of planned blocks, in the order of their numbers. Raises
    CacheDamaged.
    """
    keys, most = list[_Key](), _LINES_PER_BLOCK * manifest.num_views * manifest.blocks_per_view
    listed = objects.list_files(JOURNAL, most_objects(manifest))
    for number, view, block in line_numbers(each.key for each in listed):
        if view < manifest.num_views and block < manifest.blocks_per_view:
            keys.append(_Key(number, view, block))
        if len(keys) > most:
            raise CacheDamaged(
                f"{objects.url / JOURNAL} has more than {most:,} lines of single blocks",
                fix=remote_fix(objects.url, manifest.teacher),
            )
    return sorted(keys)


def _lacks(journal: Journal, key: _Key) -> bool:
    """Return True if a journal does not name all of a block."""
    return not all(there[key.view, key.block] for there in journal.there.values())


def _enter(
    objects: Bucket, manifest: Manifest, journal: Journal, lines: dict[_Key, Line | None]
) -> None:
    identity = identity_sha256(manifest.identity)[:IDENTITY_DIGITS]
    for key, line in lines.items():
        is_own = line is not None and line[:3] == (identity, key.view, key.block)
        if line is None or not is_own or not enter_line(line, manifest, journal):
            journal.damaged_lines.append(str(objects.url / str(key)))


def _overlay(journal: Journal, newer: Journal) -> None:
    """Enter all of `newer`."""
    journal.damaged_lines += newer.damaged_lines
    for array, there in newer.there.items():
        np.copyto(journal.crc32c[array], newer.crc32c[array], where=there)
        journal.there[array] |= there


Position = tuple[int, int]  # view, block


@dataclass(frozen=True)
class Before:
    """What was committed before of the blocks that are to be committed.

    number: of a new line, for blocks that have none; numbers: for others. unsound: arrays whose
    chunks are not what a line says.
    """

    number: int = 1
    numbers: dict[Position, int] = field(default_factory=dict)
    unsound: dict[Position, tuple[str, ...]] = field(default_factory=dict)

    def number_of(self, view: int, block: int) -> int:
        """Return the first number that a new line of that block may have."""
        return self.numbers.get((view, block), self.number)


class BucketLog:
    """Commits blocks of the cache in a bucket. before: what this process knows of older lines."""

    def __init__(self, bucket: Bucket, manifest: Manifest, before: Before | None = None) -> None:
        self.bucket, self.manifest = bucket, manifest
        self.before = before or Before()
        self._shared: dict[tuple[str, int], bytes] = {}  # checksums of all views' chunks there

    def read(self) -> Journal:
        return self.read_lines().committed

    def read_lines(self) -> RemoteJournal:
        """Return what is committed and the numbers of all lines, for a writer."""
        return read_remote_journal(self.bucket, self.manifest, every_line=True)

    def commit(self, block: Block, chunks: Chunks) -> None:
        specs = self.manifest.arrays
        content = {array: data.tobytes() for array, data in chunks}
        shared = {
            (array, block.index): chunk[-CHECKSUM_BYTES:]
            for array, chunk in content.items()
            if specs[array].all_views
        }
        position = (block.view, block.index)
        commit_block(
            self.bucket,
            self.manifest,
            block,
            content,
            number=self.before.number_of(*position),
            unsound=self.before.unsound.get(position, ()),
            known=[key[0] for key in shared if self._shared.get(key) == shared[key]],
        )
        self._shared.update(shared)

    def has_line(self, block: Block) -> bool:
        """Return True if another writer has committed the block since `before` was read."""
        number = self.before.number_of(block.view, block.index)
        return self.bucket.has(line_key(block.view, block.index, number))

    def close(self) -> None:
        """Do nothing: each line is an object of its own."""
