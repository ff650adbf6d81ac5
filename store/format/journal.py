"""The journal: one line per committed block. Only a line here makes a block exist.

Each writer appends to a file of its own. A line carries a checksum of itself; a crash may cut off
the last line of a file, which then counts as never written. A line has exactly one spelling
(canonical JSON), so that a pattern reads it: nothing is parsed that is not a line.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from teach_once.runtime.safe.confined import (
    append_whole,
    create_inside,
    listed_inside,
    make_folder_inside,
    open_inside,
    remove_inside,
    write_inside,
)
from teach_once.runtime.safe.safe_read import BadFile
from teach_once.runtime.safe.text import one_line
from teach_once.store.errors import CacheBusy, CacheError
from teach_once.store.format.manifest import Manifest
from teach_once.store.format.spec import (
    JOURNAL,
    Block,
    bytes_crc32c,
    crc_hex,
    optional_taps,
    tap_of,
)
from teach_once.store.identity import NAME_PATTERN, canonical_json, identity_sha256

LINE_CHECKSUM = "line_crc32c"
IDENTITY_DIGITS = 16
MAX_LINE_BYTES = 64_000
_MOST_DAMAGED = 100  # lines of a file: it is not a journal, and is not read to its end
SPARE_BYTES = 64 * 10**6
_LISTINGS = 20  # of the folder, while another process removes files
_FILE_NAME = re.compile(r"\d{6}-\d{4,6}\.jsonl")
_INT = rb"(0|[1-9][0-9]{0,9})"
_TAP = b'"' + NAME_PATTERN.encode() + b'"'
_CHECKSUM = rb'"[0-9a-f]{8}"'
_LINE = re.compile(
    rb'\{"block":' + _INT + rb',"crc32c":\{(' + _TAP + b":" + _CHECKSUM + rb"(?:," + _TAP + b":"
    + _CHECKSUM + rb')*)\},"identity":"([0-9a-f]{16})",("line_crc32c":"([0-9a-f]{8})",)"rows":'
    + _INT + rb',"taps":\[(' + _TAP + rb"(?:," + _TAP + rb')*)\],"view":' + _INT + rb"\}"
)  # fmt: skip
_ENTRY = re.compile(rb'"([^"]+)":"([0-9a-f]{8})"')
_START = b'{"block":'
ChunkKey = tuple[str, int, int]  # array, view, block index


class Line(NamedTuple):
    """One committed block. checksums: crc32c (hex) of each array's chunk."""

    identity: str
    view: int
    block: int
    rows: int
    checksums: dict[str, str]


@dataclass
class Journal:
    """What is committed of a cache; and where there are lines that cannot be read.

    there, crc32c: array -> (views, blocks), whether a chunk is committed, and its checksum.
    """

    there: dict[str, NDArray[np.bool_]]
    crc32c: dict[str, NDArray[np.uint32]]
    damaged_lines: list[str] = field(default_factory=list)

    @classmethod
    def empty(cls, manifest: Manifest) -> Journal:
        """Memory is taken only for what is then committed."""
        shape = (manifest.num_views, manifest.blocks_per_view)
        return cls(
            {array: np.zeros(shape, dtype=np.bool_) for array in manifest.arrays},
            {array: np.zeros(shape, dtype=np.uint32) for array in manifest.arrays},
        )

    @property
    def committed(self) -> dict[ChunkKey, str]:
        """Chunk -> crc32c (hex), of every committed chunk."""
        return {
            (array, int(view), int(block)): crc_hex(int(self.crc32c[array][view, block]))
            for array, there in self.there.items()
            for view, block in np.argwhere(there)
        }


class JournalWriter:
    """Appends commits to a new file of the journal. identity: the sha256 of the cache's."""

    def __init__(self, cache: Path, identity: str, rank: int = 0) -> None:
        self._cache, self._identity = cache, identity[:IDENTITY_DIGITS]
        make_folder_inside(cache, JOURNAL)
        numbers = [int(name.split("-")[0]) for name in _file_names(cache)]
        self._file_name = f"{JOURNAL}/{max(numbers, default=0) + 1:06d}-{rank:04d}.jsonl"
        self.path = cache / self._file_name
        if not _FILE_NAME.fullmatch(self.path.name):
            raise CacheError(f"{one_line(cache / JOURNAL)} has no number left for another file")
        try:
            self._file = create_inside(cache, self._file_name)
        except FileExistsError:
            raise CacheError(
                f"another process of rank {rank} has just created {self.path}"
            ) from None
        self._size = 0  # bytes of whole lines

    def commit(self, block: Block, crc32c: Mapping[str, int]) -> None:
        """Append one line and flush it to disk; when this returns the block exists.

        crc32c: per zarr array. Raises OSError if the disk refuses the line, of which nothing then
        stays; CacheError if the file has been removed, so that the block does not exist.
        """
        checksums = {name: crc_hex(value) for name, value in crc32c.items()}
        line = Line(self._identity, block.view, block.index, block.rows, checksums)
        text = line_text(line) + b"\n"
        append_whole(self._file, text, self._size)
        try:
            os.fsync(self._file.fileno())
        except BaseException:
            with suppress(OSError):  # the next line is written over it
                os.ftruncate(self._file.fileno(), self._size)
            raise
        self._size += len(text)
        if not self._has_its_name():
            raise CacheError(
                f"{self.path} was removed or replaced while this pass was writing to it; the "
                "blocks whose lines it held will be computed again",
                fix="run the same command again, and leave the files of the cache alone meanwhile",
            )

    def close(self) -> None:
        if self._size == 0 and self._has_its_name():
            remove_inside(self._cache, self._file_name)
        self._file.close()

    def _has_its_name(self) -> bool:
        """Return True if readers find the open file under its name."""
        try:
            with open_inside(self._cache, self._file_name) as named:
                return os.path.samestat(os.fstat(named.fileno()), os.fstat(self._file.fileno()))
        except (FileNotFoundError, BadFile):
            return False


def read_journal(cache: Path, manifest: Manifest) -> Journal:
    """Read all files in the order of their numbers; of two lines for a chunk the later one counts.

    Lines of another identity, or of blocks of another size, count as damaged. What lies beyond the
    manifest's plan is left out: leftovers of an interrupted trim. A file that is not a journal is
    damage, too. Another process may remove files meanwhile, whose lines it has dropped.
    """
    for _ in range(_LISTINGS):
        try:
            return _read_files(cache, manifest)
        except FileNotFoundError:
            continue  # removed since the folder was listed
    raise CacheBusy(
        f"{one_line(cache / JOURNAL)} is changed again and again by another process",
        fix="wait until that ends, then run the same command again",
    )


def _read_files(cache: Path, manifest: Manifest) -> Journal:
    journal = Journal.empty(manifest)
    for name in _file_names(cache, journal.damaged_lines):
        with _opened(cache, name) as file:
            size = os.fstat(file.fileno()).st_size
            read_journal_file(file, cache / JOURNAL / name, size, manifest, journal)
    return journal


def read_journal_file(
    file: BinaryIO, path: Path, size: int, manifest: Manifest, journal: Journal
) -> bool:
    """Enter the lines of one file; return True if any is of this cache.

    path: for messages. Raises BadFile where the file is too large.
    """
    identity = identity_sha256(manifest.identity)[:IDENTITY_DIGITS]
    damaged, is_ours = list[str](), False
    for place, text in _lines(file, path, size, most_journal_bytes(manifest), damaged):
        line = parse_line(text)
        if line is None or line.identity != identity or not enter_line(line, manifest, journal):
            damaged.append(place)
        else:
            is_ours = True
        if len(damaged) > _MOST_DAMAGED:
            damaged.append(f"{place} and what follows")
            break
    journal.damaged_lines += damaged
    return is_ours


def journal_text(identity: str, manifest: Manifest, committed: Mapping[ChunkKey, str]) -> bytes:
    """A whole journal as one file, block by block. identity: the sha256 of the cache's."""
    of_block: dict[tuple[int, int], dict[str, str]] = {}
    for (array, view, block), checksum in committed.items():
        of_block.setdefault((view, block), {})[array] = checksum
    lines = (
        line_text(
            Line(identity[:IDENTITY_DIGITS], view, block, manifest.block(view, block).rows, arrays)
        )
        for (view, block), arrays in sorted(of_block.items())
    )
    return b"".join(line + b"\n" for line in lines)


def is_journal_file(name: str) -> bool:
    """Return True if a file of the journal's folder, or an object, is one of lines."""
    return _FILE_NAME.fullmatch(name) is not None


def enter_line(line: Line, manifest: Manifest, journal: Journal) -> bool:
    """Note the chunks of a line; False if its block has another number of rows."""
    view, block = line.view, line.block
    if view >= manifest.num_views or block >= manifest.blocks_per_view:
        return True
    if line.rows != manifest.block(view, block).rows:
        return False
    for array, checksum in line.checksums.items():
        if (there := journal.there.get(array)) is not None:
            there[view, block] = True
            journal.crc32c[array][view, block] = int(checksum, 16)
    return True


def forget(cache: Path, is_forgotten: Callable[[ChunkKey], bool], manifest: Manifest) -> None:
    """Remove chunks from the journal; each file is replaced in one step.

    Unreadable lines stay, because they still count as damage. manifest: bounds the files.
    """
    for name in _file_names(cache):
        path, most_bytes = cache / JOURNAL / name, most_journal_bytes(manifest)
        with _opened(cache, name) as file:
            size = os.fstat(file.fileno()).st_size
            lines = [text for _, text in _lines(file, path, size, most_bytes, [])]
        remaining = [text for line in lines if (text := _without(line, is_forgotten))]
        if remaining and remaining != lines:
            write_inside(cache, f"{JOURNAL}/{name}", b"\n".join([*remaining, b""]))
        elif not remaining:
            remove_inside(cache, f"{JOURNAL}/{name}")


def _without(text: bytes, is_forgotten: Callable[[ChunkKey], bool]) -> bytes:
    """A line without these chunks; empty if it names no others."""
    line = parse_line(text)
    if line is None:
        return text
    remaining = {
        array: checksum
        for array, checksum in line.checksums.items()
        if not is_forgotten((array, line.view, line.block))
    }
    if remaining == line.checksums:
        return text
    return line_text(line._replace(checksums=remaining)) if remaining else b""


def _file_names(cache: Path, others: list[str] | None = None) -> list[str]:
    """The files of the journal, in order. others: takes those that are called otherwise."""
    try:
        names = sorted(listed_inside(cache, JOURNAL))
    except FileNotFoundError:
        return []
    if others is not None:
        odd = (n for n in names if n.endswith(".jsonl") and not n.startswith("."))
        others += [str(cache / JOURNAL / n) for n in odd if not _FILE_NAME.fullmatch(n)]
    return [name for name in names if _FILE_NAME.fullmatch(name)]


def _opened(cache: Path, name: str) -> BinaryIO:
    raw = cast(Any, open_inside(cache, f"{JOURNAL}/{name}"))
    return cast(BinaryIO, io.BufferedReader(raw))


def _lines(
    file: BinaryIO, path: Path, size: int, most_bytes: int, damaged: list[str]
) -> Iterator[tuple[str, bytes]]:
    """Yield the place and text of each whole line. damaged: takes the places of other text."""
    if size > most_bytes:
        raise BadFile(path, f"has {size:,} bytes, expected at most {most_bytes:,}")
    for number, text in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES), b""), start=1):
        place = f"{path}, line {number}"
        if text.endswith(b"\n"):
            yield place, text[:-1]
            continue
        if len(text) == MAX_LINE_BYTES or not _may_be_torn(text):
            damaged.append(place)
        return


def _may_be_torn(text: bytes) -> bool:
    """Return True if a line may have begun so, which a crash cut off."""
    return text.startswith(_START[: len(text)])


def most_journal_bytes(manifest: Manifest) -> int:
    """More than the journal of such a cache ever has, even if each block was written twice."""
    line = 150 + sum(2 * len(array) + 16 for array in manifest.arrays)
    return 2 * line * manifest.num_views * manifest.blocks_per_view + SPARE_BYTES


def parse_line(text: bytes) -> Line | None:
    """What a line says, without its newline; None where it is damaged or spelled otherwise."""
    match = _LINE.fullmatch(text)
    if match is None:
        return None
    block, entries, identity, _, checksum, rows, taps, view = match.groups()
    start, stop = match.span(4)  # of the checksum, which covers the line without it
    if google_crc32c.extend(google_crc32c.value(text[:start]), text[stop:]) != int(checksum, 16):
        return None
    pairs = _ENTRY.findall(entries)
    checksums = {array.decode(): value.decode() for array, value in pairs}
    line = Line(identity.decode(), int(view), int(block), int(rows), checksums)
    arrays = list(checksums)
    is_canonical = len(arrays) == len(pairs) and arrays == sorted(arrays)
    return line if is_canonical and taps == _taps_text(arrays) else None


def _taps_text(arrays: list[str]) -> bytes:
    return ",".join(f'"{tap}"' for tap in sorted({tap_of(array) for array in arrays})).encode()


def line_text(line: Line) -> bytes:
    """The only spelling of a line, without its newline."""
    content = {
        "identity": line.identity,
        "taps": sorted({tap_of(array) for array in line.checksums}),
        "view": line.view,
        "block": line.block,
        "rows": line.rows,
        "crc32c": line.checksums,
    }
    checksum = crc_hex(bytes_crc32c(canonical_json(content).encode()))
    return canonical_json({**content, LINE_CHECKSUM: checksum}).encode()


Mask = NDArray[np.bool_]


class Coverage:
    """there: array -> (views, blocks), whether the chunk is committed."""

    def __init__(self, manifest: Manifest, there: Mapping[str, Mask]) -> None:
        self._manifest, self.there = manifest, dict(there)

    @classmethod
    def nothing(cls, manifest: Manifest) -> Coverage:
        """Return the coverage of a cache that is not begun."""
        shape = (manifest.num_views, manifest.blocks_per_view)
        return cls(manifest, {array: np.zeros(shape, np.bool_) for array in manifest.arrays})

    def within(self, manifest: Manifest) -> Coverage:
        """Return the covered part of another plan of the same blocks."""
        other = Coverage.nothing(manifest)
        for array, there in self.there.items():
            if array in other.there:
                views, blocks = map(min, there.shape, other.there[array].shape)
                other.there[array][:views, :blocks] = there[:views, :blocks]
        return other

    @property
    def fraction(self) -> float:
        """The fraction of all planned chunks."""
        counts = [np.count_nonzero(mask) / mask.size for mask in self.there.values()]
        return float(sum(counts) / len(counts))

    @property
    def is_complete(self) -> bool:
        return all(bool(mask.all()) for mask in self.there.values())

    @property
    def num_bytes(self) -> int:
        """Bytes on disk of all committed chunks, sound or not."""
        arrays = self._manifest.arrays
        return sum(
            int(np.count_nonzero(mask)) * self._manifest.chunk_file_bytes(arrays[array])
            for array, mask in self.there.items()
        )

    def incomplete_taps(self, num_views: int) -> set[str]:
        """Taps of which the first views lack some chunk."""
        return {tap_of(array) for array, mask in self.there.items() if not mask[:num_views].all()}

    def lacking(self, tap: str, num_views: int) -> Mask:
        """(num_views, blocks): whether an array of this tap is missing there."""
        whole = np.ones((num_views, self._manifest.blocks_per_view), dtype=np.bool_)
        for array, mask in self.there.items():
            if tap_of(array) == tap:
                whole &= mask[:num_views]
        return ~whole

    def lacking_any(self, taps: Collection[str], num_views: int) -> Mask:
        """(num_views, blocks): whether one of these taps is missing there."""
        lacks = np.zeros((num_views, self._manifest.blocks_per_view), dtype=np.bool_)
        for tap in taps:
            lacks |= self.lacking(tap, num_views)
        return lacks

    def first_lacking_view(self, tap: str, num_views: int) -> int | None:
        """The first view that lacks some of the tap; None where all have it."""
        views = self.lacking(tap, num_views).any(axis=1)
        return int(views.argmax()) if views.any() else None

    def num_complete_views(self) -> int:
        """How many views, from the first on, have every tap that a cache cannot lack."""
        optional = optional_taps(self._manifest.taps)
        taps = [tap for tap in self._manifest.stored if tap not in optional]
        lacks = self.lacking_any(taps, self._manifest.num_views)
        return _first_true(np.logical_or.reduce(lacks, axis=1))

    def missing(self, num_views: int | None = None) -> Iterator[tuple[str, int, int]]:
        """(array, view, block index) of what the first views lack, in the order of the blocks."""
        views = self._manifest.num_views if num_views is None else num_views
        lacks = self.lacking_any(list(self._manifest.stored), views)
        for position in np.flatnonzero(lacks):
            view, block = divmod(int(position), lacks.shape[1])
            for array, mask in self.there.items():
                if not mask[view, block]:
                    yield array, view, block

    def num_missing(self, num_views: int | None = None) -> int:
        """How many chunks the first views lack."""
        parts = [mask[:num_views] for mask in self.there.values()]
        return sum(part.size - int(np.count_nonzero(part)) for part in parts)

    def first_missing(self, num: int) -> list[tuple[str, int, int]]:
        return list(islice(self.missing(), num))


def _first_true(mask: Mask) -> int:
    """The index of the first True of a (N,) mask; N where there is none."""
    return int(mask.argmax()) if mask.any() else len(mask)
