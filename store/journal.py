"""The journal: one line per committed block. Only a line here makes a block exist.

Each writer appends to a file of its own. A line carries a checksum of itself; a crash may cut off
the last line of a file, which then counts as never written.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import google_crc32c

from runtime.files import flush_folder, write_atomically
from store.errors import CacheError
from store.identity import canonical_json
from store.layout import JOURNAL, Block, crc_hex, tap_of

LINE_CHECKSUM = "line_crc32c"
IDENTITY_DIGITS = 16
ChunkKey = tuple[str, int, int]  # array, view, block index


@dataclass
class Journal:
    """What is committed: chunk -> crc32c (hex); and where there are lines that cannot be read."""

    committed: dict[ChunkKey, str] = field(default_factory=dict)
    damaged_lines: list[str] = field(default_factory=list)


class JournalWriter:
    """Appends commits to a new file of the journal. identity: the sha256 of the cache's."""

    def __init__(self, cache: Path, identity: str, rank: int = 0) -> None:
        self._identity = identity[:IDENTITY_DIGITS]
        folder = cache / JOURNAL
        folder.mkdir(parents=True, exist_ok=True)
        numbers = [int(path.name.split("-")[0]) for path in _files(folder)]
        self.path = folder / f"{max(numbers, default=0) + 1:06d}-{rank:04d}.jsonl"
        try:
            self._file = self.path.open("xb")
        except FileExistsError:
            raise CacheError(
                f"another process of rank {rank} has just created {self.path}"
            ) from None
        flush_folder(folder)

    def commit(self, block: Block, crc32c: Mapping[str, int]) -> None:
        """Append one line and flush it to disk; when this returns the block exists.

        crc32c: per zarr array.
        """
        line = {
            "identity": self._identity,
            "taps": sorted({tap_of(array) for array in crc32c}),
            "view": block.view,
            "block": block.index,
            "rows": block.rows,
            "crc32c": {name: crc_hex(value) for name, value in crc32c.items()},
        }
        self._file.write(_line_text(line) + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()
        if self.path.stat().st_size == 0:
            self.path.unlink()


def read_journal(cache: Path, identity: str) -> Journal:
    """Read all files in the order of their numbers; of two lines for a chunk the later one counts.

    Lines of another identity (sha256) than the cache's count as damaged.
    """
    journal = Journal()
    folder = cache / JOURNAL
    for path in _files(folder) if folder.is_dir() else []:
        _read_file(path, identity[:IDENTITY_DIGITS], journal)
    return journal


def forget(cache: Path, is_forgotten: Callable[[ChunkKey], bool]) -> None:
    """Remove chunks from the journal; each file is replaced in one step.

    Unreadable lines stay, because they still count as damage.
    """
    folder = cache / JOURNAL
    for path in _files(folder) if folder.is_dir() else []:
        *lines, _torn = path.read_bytes().split(b"\n")
        remaining = [text for line in lines if (text := _without(line, is_forgotten))]
        if remaining and remaining != lines:
            write_atomically(path, b"\n".join([*remaining, b""]))
        elif not remaining:
            path.unlink()


def _without(text: bytes, is_forgotten: Callable[[ChunkKey], bool]) -> bytes:
    """A line without these chunks; empty if it names no others."""
    line = _parsed(text)
    if line is None:
        return text
    remaining = {
        array: checksum
        for array, checksum in line["crc32c"].items()
        if not is_forgotten((array, line["view"], line["block"]))
    }
    if remaining == line["crc32c"]:
        return text
    taps = sorted({tap_of(array) for array in remaining})
    return _line_text({**line, "crc32c": remaining, "taps": taps}) if remaining else b""


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("[0-9]*-[0-9]*.jsonl"))


def _read_file(path: Path, identity: str, journal: Journal) -> None:
    *lines, _torn = path.read_bytes().split(b"\n")  # a complete last line leaves b"" behind it
    for number, text in enumerate(lines, start=1):
        line = _parsed(text)
        if line is None or line["identity"] != identity:
            journal.damaged_lines.append(f"{path}, line {number}")
            continue
        for array, checksum in line["crc32c"].items():
            journal.committed[array, line["view"], line["block"]] = checksum


def _parsed(text: bytes) -> dict[str, Any] | None:
    try:
        line: dict[str, Any] = json.loads(text)
        stated = line.pop(LINE_CHECKSUM)
        return line if stated == _line_checksum(line) else None
    except (ValueError, KeyError, AttributeError, TypeError):
        return None


def _line_text(line: Mapping[str, Any]) -> bytes:
    return canonical_json({**line, LINE_CHECKSUM: _line_checksum(line)}).encode()


def _line_checksum(line: Mapping[str, Any]) -> str:
    return crc_hex(google_crc32c.value(canonical_json(line).encode()))
