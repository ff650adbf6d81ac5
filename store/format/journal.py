"""The journal: one line per committed block. Only a line here makes a block exist.

Each writer appends to its own file. A line contains its own checksum. A crash may truncate the last
line of a file, which then counts as never written. A line has exactly one spelling (canonical
JSON), so a regular expression matches it before anything is parsed.
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
_MOST_DAMAGED = 100  # damaged lines; a file with more is not a journal and is not read further
SPARE_BYTES = 64 * 10**6
_LISTINGS = 20  # attempts to list the folder while another process removes files
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
    """One committed block. checksums: array -> crc32c (hex) of its chunk."""

    identity: str
    view: int
    block: int
    rows: int
    checksums: dict[str, str]


@dataclass
class Journal:
    """The committed chunks of a cache, and the positions of unreadable lines.

    there: array -> (views, blocks) bool, True for committed chunks. crc32c: array -> (views,
    blocks) uint32 checksums.
    """

    there: dict[str, NDArray[np.bool_]]
    crc32c: dict[str, NDArray[np.uint32]]
    damaged_lines: list[str] = field(default_factory=list)

    @classmethod
    def empty(cls, manifest: Manifest) -> Journal:
        """Return a journal without chunks; its memory is only allocated for committed chunks."""
        shape = (manifest.num_views, manifest.blocks_per_view)
        return cls(
            {array: np.zeros(shape, dtype=np.bool_) for array in manifest.arrays},
            {array: np.zeros(shape, dtype=np.uint32) for array in manifest.arrays},
        )

    @property
    def committed(self) -> dict[ChunkKey, str]:
        """{chunk: crc32c (hex)} of every committed chunk."""
        return {
            (array, int(view), int(block)): crc_hex(int(self.crc32c[array][view, block]))
            for array, there in self.there.items()
            for view, block in np.argwhere(there)
        }


class JournalWriter:
    """Appends commits to a new file of the journal. identity: the cache's identity_sha256."""

    def __init__(self, cache: Path, identity: str, rank: int = 0) -> None:
        self._cache, self._identity = cache, identity[:IDENTITY_DIGITS]
        make_folder_inside(cache, JOURNAL)
        numbers = [int(name.split("-")[0]) for name in _file_names(cache)]
        self._file_name = f"{JOURNAL}/{max(numbers, default=0) + 1:06d}-{rank:04d}.jsonl"
        self.path = cache / self._file_name
        if not _FILE_NAME.fullmatch(self.path.name):
            raise CacheError(f"{one_line(cache / JOURNAL)} has no file number left")
        try:
            self._file = create_inside(cache, self._file_name)
        except FileExistsError:
            raise CacheError(
                f"another process of rank {rank} has just created {self.path}"
            ) from None
        self._size = 0  # bytes of complete lines

    def commit(self, block: Block, crc32c: Mapping[str, int]) -> None:
        """Append one line and flush it to disk; when this returns the block exists.

        crc32c: array -> checksum of its chunk. Raises OSError if the disk refuses the line, which
        is then removed. Raises CacheError if the file was removed, so that the block does not
        exist.
        """
        checksums = {name: crc_hex(value) for name, value in crc32c.items()}
        line = Line(self._identity, block.view, block.index, block.rows, checksums)
        text = line_text(line) + b"\n"
        append_whole(self._file, text, self._size)
        try:
            os.fsync(self._file.fileno())
        except BaseException:
            with suppress(OSError):  # the next line overwrites it
                os.ftruncate(self._file.fileno(), self._size)
            raise
        self._size += len(text)
        if not self._has_its_name():
            raise CacheError(
                f"{self.path} was removed or replaced while this pass was writing to it; the "
                "blocks in its lines will be computed again",
                fix="run the same command again, and do not change the cache's files meanwhile",
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
    """Read all files in the order of their numbers; for a chunk with several lines the last counts.

    Lines of another identity, or of blocks of another size, count as damaged, as does a file that
    is not a journal. Chunks beyond the manifest's plan, left by an interrupted trim, are ignored.
    Another process may remove files meanwhile, whose lines are then obsolete. Raises CacheBusy if
    this happens repeatedly.
    """
    for _ in range(_LISTINGS):
        try:
            return _read_files(cache, manifest)
        except FileNotFoundError:
            continue  # removed since the folder was listed
    raise CacheBusy(
        f"another process keeps changing {one_line(cache / JOURNAL)}",
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
    """Add the lines of one file to `journal`; return True if any belongs to this cache.

    path: for messages. Raises BadFile if the file is too large.
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
            damaged.append(f"{place} and all following lines")
            break
    journal.damaged_lines += damaged
    return is_ours


def journal_text(identity: str, manifest: Manifest, committed: Mapping[ChunkKey, str]) -> bytes:
    """Format a whole journal as one file, block by block. identity: the cache's identity_sha256."""
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
    """Return True if a file of the journal's folder, or an object, contains lines."""
    return _FILE_NAME.fullmatch(name) is not None


def enter_line(line: Line, manifest: Manifest, journal: Journal) -> bool:
    """Add the chunks of a line to `journal`; False if its block has another number of rows."""
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

    Unreadable lines are kept, because they still count as damage. manifest: bounds the files' size.
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
    """Return a line without these chunks; empty if it contains no others."""
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
    """Return the files of the journal in order. others: receives the paths of files with other
    names.
    """
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
    """Yield the position and text of each whole line. damaged: receives other lines' positions."""
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
    """Return True if the text may be the beginning of a line that a crash truncated."""
    return text.startswith(_START[: len(text)])


def most_journal_bytes(manifest: Manifest) -> int:
    """Return an upper bound for the journal's size, with each block written twice."""
    line = 150 + sum(2 * len(array) + 16 for array in manifest.arrays)
    return 2 * line * manifest.num_views * manifest.blocks_per_view + SPARE_BYTES


def parse_line(text: bytes) -> Line | None:
    """Parse a line without its newline; None if it is damaged or has another spelling."""
    match = _LINE.fullmatch(text)
    if match is None:
        return None
    block, entries, identity, _, checksum, rows, taps, view = match.groups()
    start, stop = match.span(4)  # position of the checksum, which covers the rest of the line
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
    """Format a line in its only spelling, without its newline."""
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
    """The committed chunks. there: array -> (views, blocks) bool, True for committed chunks."""

    def __init__(self, manifest: Manifest, there: Mapping[str, Mask]) -> None:
        self._manifest, self.there = manifest, dict(there)

    @classmethod
    def nothing(cls, manifest: Manifest) -> Coverage:
        """Return the coverage of a new cache."""
        shape = (manifest.num_views, manifest.blocks_per_view)
        return cls(manifest, {array: np.zeros(shape, np.bool_) for array in manifest.arrays})

    def within(self, manifest: Manifest) -> Coverage:
        """Return the covered part of another plan with the same blocks."""
        other = Coverage.nothing(manifest)
        for array, there in self.there.items():
            if array in other.there:
                views, blocks = map(min, there.shape, other.there[array].shape)
                other.there[array][:views, :blocks] = there[:views, :blocks]
        return other

    @property
    def fraction(self) -> float:
        """Committed fraction of the planned chunks."""
        counts = [np.count_nonzero(mask) / mask.size for mask in self.there.values()]
        return float(sum(counts) / len(counts))

    @property
    def is_complete(self) -> bool:
        return all(bool(mask.all()) for mask in self.there.values())

    @property
    def num_bytes(self) -> int:
        """Bytes on disk of all committed chunks, valid or not."""
        arrays = self._manifest.arrays
        return sum(
            int(np.count_nonzero(mask)) * self._manifest.chunk_file_bytes(arrays[array])
            for array, mask in self.there.items()
        )

    def incomplete_taps(self, num_views: int) -> set[str]:
        """Return the taps that lack a chunk in the first views."""
        return {tap_of(array) for array, mask in self.there.items() if not mask[:num_views].all()}

    def lacking(self, tap: str, num_views: int) -> Mask:
        """Return a (num_views, blocks) mask: True if an array of this tap is missing."""
        whole = np.ones((num_views, self._manifest.blocks_per_view), dtype=np.bool_)
        for array, mask in self.there.items():
            if tap_of(array) == tap:
                whole &= mask[:num_views]
        return ~whole

    def lacking_any(self, taps: Collection[str], num_views: int) -> Mask:
        """Return a (num_views, blocks) mask: True if one of these taps is missing."""
        lacks = np.zeros((num_views, self._manifest.blocks_per_view), dtype=np.bool_)
        for tap in taps:
            lacks |= self.lacking(tap, num_views)
        return lacks

    def first_lacking_view(self, tap: str, num_views: int) -> int | None:
        """Return the first view that lacks a block of the tap; None if it is complete."""
        views = self.lacking(tap, num_views).any(axis=1)
        return int(views.argmax()) if views.any() else None

    def num_complete_views(self) -> int:
        """Return the number of leading views that have every required tap."""
        optional = optional_taps(self._manifest.taps)
        taps = [tap for tap in self._manifest.stored if tap not in optional]
        lacks = self.lacking_any(taps, self._manifest.num_views)
        return _first_true(np.logical_or.reduce(lacks, axis=1))

    def missing(self, num_views: int | None = None) -> Iterator[tuple[str, int, int]]:
        """Yield (array, view, block index) of the first views' missing chunks, in block order."""
        views = self._manifest.num_views if num_views is None else num_views
        lacks = self.lacking_any(list(self._manifest.stored), views)
        for position in np.flatnonzero(lacks):
            view, block = divmod(int(position), lacks.shape[1])
            for array, mask in self.there.items():
                if not mask[view, block]:
                    yield array, view, block

    def num_missing(self, num_views: int | None = None) -> int:
        """Return the number of chunks that the first views lack."""
        parts = [mask[:num_views] for mask in self.there.values()]
        return sum(part.size - int(np.count_nonzero(part)) for part in parts)

    def first_missing(self, num: int) -> list[tuple[str, int, int]]:
        return list(islice(self.missing(), num))


def _first_true(mask: Mask) -> int:
    """Return the index of the first True of a (N,) mask; N if there is none."""
    return int(mask.argmax()) if mask.any() else len(mask)
