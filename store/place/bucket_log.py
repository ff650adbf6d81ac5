"""The commit log of a cache in a bucket: a block's chunks, then its line, each put if absent.

Nothing is locked, renamed or appended, so any number of writers may commit the same block at the
same time, and each may be killed at any moment. A writer keeps an intact chunk that already exists.
Devices round differently, and either result is valid. So the line contains the checksums of the
stored chunks, whichever writer put them. Only the line makes the block exist.

A block's lines are numbered objects, `journal/<view>/<block>/<number>.jsonl`. They never change. A
block that is committed again, because it was damaged or taps were added, takes the next number.
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

MOST_LINES = 999_999  # per block; numbers have six digits
_TRIES = 5  # attempts to put one chunk while others put and replace it


class Committed(NamedTuple):
    """A committed block. checksums: array -> crc32c (hex) of its chunk.

    adopted: arrays whose chunks another writer put with different bytes. is_new: True if this call
    put the line, False if an equal line existed. number: number of the line.
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
    invalid: Collection[str] = (),
    known: Collection[str] = (),
) -> Committed:
    """Put a block's chunks, or adopt existing ones; then put its line.

    chunks: array -> bytes of its chunk with their checksum, as in `encode_chunk`. number: first
    possible number of the line. invalid: arrays whose chunks differ from an earlier line's
    checksums, and are replaced unless they have these bytes. known: arrays whose chunks are already
    stored, and are not put again.

    Raises SamplesChanged if other checksums of the samples are stored, CacheBusy if other processes
    keep replacing a chunk, ObjectsUnreachable with the object's name.
    """
    arrays = manifest.arrays
    keys = {array: chunk_name(array, arrays[array], block) for array in chunks}

    def put(array: str) -> tuple[str, bytes]:
        if array in known:
            return array, chunks[array]
        return array, _put_or_adopt(objects, keys[array], chunks[array], array in invalid)

    shared = [array for array in chunks if arrays[array].all_views]  # before their dependents
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
    """Return the key of a line: `journal/<view>/<block>/<number>.jsonl`."""
    return f"{JOURNAL}/{view}/{block}/{number:06d}.jsonl"


def is_valid(chunk: bytes) -> bool:
    """Return True if a chunk's bytes match the checksum at their end."""
    return len(chunk) > CHECKSUM_BYTES and (bytes_crc32c(chunk[:-CHECKSUM_BYTES]) == _stated(chunk))


def _stated(chunk: bytes) -> int:
    return int.from_bytes(chunk[-CHECKSUM_BYTES:], "little")


def _put_or_adopt(objects: Bucket, key: str, data: bytes, is_invalid: bool) -> bytes:
    """Put a chunk unless a valid one is stored; return the stored bytes."""
    for _ in range(_TRIES):
        if objects.create(key, data):
            return data
        try:
            found = objects.get_tagged(key, len(data))
            if found.content == data:
                return data
            whole = found.content if found.size == len(data) else None
            if whole is not None and is_valid(whole) and not is_invalid:
                return whole
            objects.replace(key, data, found.tag)
            return data
        except CacheMissing:  # another process removed it
            continue
        except CacheBusy:
            is_invalid = False  # the process that replaced it has repaired it
    raise CacheBusy(
        f"other processes keep replacing {objects.url / key}",
        fix="stop all other passes that write this cache, then run again",
    )


def _refuse_others(objects: Bucket, block: Block, ours: bytes, theirs: bytes) -> None:
    """Raise SamplesChanged if existing records were computed from other bytes."""
    if ours != theirs:
        values, others = (
            np.frombuffer(each[:-CHECKSUM_BYTES], np.uint8).reshape(-1, DIGEST_BYTES)
            for each in (ours, theirs)
        )
        changed = np.flatnonzero((values != others).any(axis=1)[: block.rows])
        raise SamplesChanged(objects.url, block.start + changed)


def _put_line(objects: Bucket, line: Line, number: int) -> tuple[bool, int]:
    """Put a line under the first free number; return True if it is new, and its number."""
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
    """Return the error for a journal in which a file or a line has the last number."""
    return CacheError(
        f"{journal} has a file or a line of the last number, {MOST_LINES}: none is left for others",
        fix=f"remove the objects with the number {MOST_LINES} with the store's own tools, then "
        "run the same command again; existing chunks are kept",
    )


def read_line(objects: Bucket, key: str) -> Line | None:
    """Read a block's line; None if the object is not exactly one line. Raises CacheMissing."""
    content = objects.get_tagged(key, MAX_LINE_BYTES).content or b""
    return parse_line(content[:-1]) if content.endswith(b"\n") else None


def _says(there: Line, line: Line) -> bool:
    """Return True if a line commits everything that another one would."""
    same = there[:4] == line[:4]
    return same and there.checksums.items() >= line.checksums.items()


_OTHER_OBJECTS = 100_000  # zarr.json, labels, whole journals, and other objects
_MOST_WHOLE = 10_000  # maximum number of whole journals
_MOST_REPEATED = 32  # maximum total size, in complete journals with each line twice
_LINES_PER_BLOCK = 100  # on average, far more than any cache has
_LINE_KEY = re.compile(rf"{JOURNAL}/(0|[1-9]\d{{0,6}})/(0|[1-9]\d{{0,9}})/(\d{{6}})\.jsonl")


class _Key(NamedTuple):
    """The position of one line."""

    number: int
    view: int
    block: int

    def __str__(self) -> str:
        return line_key(self.view, self.block, self.number)


@dataclass(frozen=True)
class RemoteJournal:
    """The committed blocks of a cache on a store, and the numbers of its lines.

    newest: number of the newest whole journal; 0 without one. numbers: (view, block) -> highest
    number of its lines. num_loose: number of lines that no whole journal repeats. The last two are
    empty if the newest whole journal was sufficient.
    """

    committed: Journal
    newest: int = 0
    numbers: dict[tuple[int, int], int] = field(default_factory=dict)
    num_loose: int = 0

    def next_number(self, view: int, block: int) -> int:
        """Return the number for a line of that block that is newer than everything committed."""
        return max(self.newest, self.numbers.get((view, block), 0)) + 1


def read_remote_journal(
    objects: Bucket, manifest: Manifest, *, every_line: bool = False
) -> RemoteJournal:
    """Read the committed blocks.

    every_line: read lines even if the newest whole journal is complete. Needs a request for the
    names and one for the newest whole journal. If that does not contain all planned blocks, also
    one for each other journal, one per thousand lines, and one for each line that no journal
    repeats. Raises CacheDamaged, ObjectsUnreachable.
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
    numbers = {(key.view, key.block): key.number for key in keys}  # the highest number comes last
    return RemoteJournal(journal, newest, numbers, len(loose))


def put_whole_journal(objects: Bucket, manifest: Manifest, known: RemoteJournal) -> RemoteJournal:
    """Put all known commits as one object with a higher number than the lines it repeats.

    Returns the updated journal. Another process may put the same at the same time; lines that are
    put meanwhile still count.
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
    """Yield the number, view and block of each key of a line."""
    for key in keys:
        if (match := _LINE_KEY.fullmatch(key)) is not None:
            view, block, number = map(int, match.groups())
            yield number, view, block


def most_objects(manifest: Manifest) -> int:
    """Return an upper bound for a cache's objects on a store: chunks, lines, and the rest."""
    blocks = manifest.num_views * manifest.blocks_per_view
    return (2 * len(manifest.arrays) + _LINES_PER_BLOCK) * blocks + _OTHER_OBJECTS


class _Whole(NamedTuple):
    """The whole journals' content. newest: highest number of a journal with lines of this cache."""

    journal: Journal
    newest: int


def _whole_sizes(objects: Bucket, manifest: Manifest) -> dict[str, int]:
    """Return {name: bytes} of the whole journals, in order.

    Raises CacheDamaged if there are more than a cache can have.
    """
    _, found = objects.names(JOURNAL)
    listed = {each.key.rpartition("/")[2]: each.size for each in found}
    sizes = {name: listed[name] for name in sorted(filter(is_journal_file, listed))}
    most = SPARE_BYTES + _MOST_REPEATED * (most_journal_bytes(manifest) - SPARE_BYTES)
    if (total := sum(sizes.values())) > most or len(sizes) > _MOST_WHOLE:
        raise CacheDamaged(
            f"{objects.url / JOURNAL} contains {counted(len(sizes), 'file')} of {total:,} bytes, "
            f"expected at most {_MOST_WHOLE:,} of {most:,}",
            fix=remote_fix(objects.url, manifest.teacher),
        )
    return sizes


def _whole_journals(objects: Bucket, manifest: Manifest, sizes: Mapping[str, int]) -> _Whole:
    """Read whole journals; later names win. Only a few are in memory at a time.

    A file without lines of this cache is ignored. Otherwise another cache's file could take the
    last number, and no block could be committed any more. sizes: listed sizes, beyond which nothing
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
    """List the keys of all lines of planned blocks by number. Raises CacheDamaged."""
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
    """Return True if a journal does not contain all arrays of a block."""
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
    """Add all commits of `newer`."""
    journal.damaged_lines += newer.damaged_lines
    for array, there in newer.there.items():
        np.copyto(journal.crc32c[array], newer.crc32c[array], where=there)
        journal.there[array] |= there


Position = tuple[int, int]  # view, block


@dataclass(frozen=True)
class Before:
    """The state of blocks before they are committed.

    number: first number of a new line, for blocks without lines. numbers: (view, block) -> first
    number, for the others. invalid: (view, block) -> arrays whose chunks differ from the lines'
    checksums.
    """

    number: int = 1
    numbers: dict[Position, int] = field(default_factory=dict)
    invalid: dict[Position, tuple[str, ...]] = field(default_factory=dict)

    def number_of(self, view: int, block: int) -> int:
        """Return the first number that a new line of that block may have."""
        return self.numbers.get((view, block), self.number)


class BucketLog:
    """Commits blocks of the cache in a bucket. before: this process's knowledge of older lines."""

    def __init__(self, bucket: Bucket, manifest: Manifest, before: Before | None = None) -> None:
        self.bucket, self.manifest = bucket, manifest
        self.before = before or Before()
        self._shared: dict[tuple[str, int], bytes] = {}  # checksums of stored all-view chunks

    def read(self) -> Journal:
        return self.read_lines().committed

    def read_lines(self) -> RemoteJournal:
        """Return the committed blocks and the numbers of all lines, for a writer."""
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
            invalid=self.before.invalid.get(position, ()),
            known=[key[0] for key in shared if self._shared.get(key) == shared[key]],
        )
        self._shared.update(shared)

    def has_line(self, block: Block) -> bool:
        """Return True if another writer has committed the block since `before` was read."""
        number = self.before.number_of(block.view, block.index)
        return self.bucket.has(line_key(block.view, block.index, number))

    def close(self) -> None:
        """Do nothing: each line is its own object."""
