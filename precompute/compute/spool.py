"""Store the records of unfinished blocks in a file next to the journal.

A block has thousands of samples. If images are decoded, all views of its samples are computed
together, and hours may pass before the first block is committed. Until then its records are in this
file, so that a kill loses only the current batch. The file is not part of the cache. If it is lost,
the records are computed again.

A line of JSON describes the records. Frames follow: the number of samples, the crc32c of the
payload, and the payload, which contains the taps of each view one after the other. Everything after
the first truncated or damaged frame is ignored.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from teach_once.runtime.safe.confined import (
    append_whole,
    open_to_append,
    open_to_update,
    remove_inside,
    write_inside,
)
from teach_once.runtime.safe.safe_read import BadFile, open_regular, parse_json
from teach_once.store.format.spec import JOURNAL

_FRAME = struct.Struct("<II")  # samples, crc32c
_MOST_HEADER_BYTES = 2**20
_MOST_RANKS = (
    2**32
)  # of a job; below the random numbers of `store.write.staging`, but for one in 2**31
Records = Mapping[str, NDArray[Any]]  # tap -> (M, ...)


@dataclass(frozen=True)
class SpoolLayout:
    """The content of a spool: `rows` samples from `start`, their `views`, of the cache `identity`.

    taps: name -> dtype and shape of one record.
    """

    identity: str
    start: int
    rows: int
    views: tuple[int, ...]
    taps: tuple[tuple[str, str, tuple[int, ...]], ...]

    @property
    def bytes_per_sample(self) -> int:
        return len(self.views) * sum(
            np.dtype(dtype).itemsize * math.prod(shape) for _, dtype, shape in self.taps
        )

    def covers(self, other: SpoolLayout) -> bool:
        """Return True if this spool contains everything in `other`."""
        return (
            (self.identity, self.start, self.rows) == (other.identity, other.start, other.rows)
            and {*other.views} <= {*self.views}
            and {*other.taps} <= {*self.taps}
        )

    def text(self) -> bytes:
        return json.dumps(asdict(self), sort_keys=True).encode() + b"\n"


class Spool:
    """The records computed so far for a group of blocks: its first `rows_done` samples."""

    def __init__(self, cache: Path, rank: int, layout: SpoolLayout) -> None:
        """Resume from an earlier process's file if it contains records of this group."""
        self._cache, self.layout = cache, layout
        self._name = _name_of(rank)
        self.rows_done = 0
        self._frames: list[tuple[int, int]] = []  # samples, position of the payload
        self._file: BinaryIO | None = None
        self._resume()

    @property
    def path(self) -> Path:
        return self._cache / self._name

    def add(self, parts: Mapping[int, Records]) -> None:
        """Append the records of the next samples: view -> tap -> (M, ...), in stored dtypes."""
        payload = b"".join(
            np.ascontiguousarray(parts[view][tap], dtype).tobytes()
            for view in self.layout.views
            for tap, dtype, _ in self.layout.taps
        )
        rows = len(payload) // self.layout.bytes_per_sample
        assert rows * self.layout.bytes_per_sample == len(payload)
        file = self._opened()
        end = os.fstat(file.fileno()).st_size
        append_whole(file, _FRAME.pack(rows, google_crc32c.value(payload)) + payload, end)
        self._frames.append((rows, end + _FRAME.size))
        self.rows_done += rows

    def records(self, view: int, taps: Sequence[str]) -> dict[str, NDArray[Any]]:
        """Return the records of one view for all finished samples: tap -> (rows_done, ...)."""
        parts: dict[str, list[NDArray[Any]]] = {tap: [] for tap in taps}
        with open_regular(self.path) as file:
            for rows, payload in self._frames:
                position = payload
                for each in self.layout.views:
                    for tap, dtype, shape in self.layout.taps:
                        size = rows * math.prod(shape) * np.dtype(dtype).itemsize
                        if each == view and tap in parts:
                            found = np.frombuffer(_read(file, position, size), dtype)
                            parts[tap].append(found.reshape(rows, *shape))
                        position += size
        return {tap: np.concatenate(of_tap) for tap, of_tap in parts.items()}

    def remove(self) -> None:
        """Delete the spool after its blocks are committed."""
        self.close()
        remove_inside(self._cache, self._name)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _opened(self) -> BinaryIO:
        if self._file is None:
            if not self.rows_done:
                write_inside(self._cache, self._name, self.layout.text())
            self._file = open_to_append(self._cache, self._name)
        return self._file

    def _resume(self) -> None:
        try:
            with open_regular(self.path) as file:
                self._read_frames(file)
        except (FileNotFoundError, NotADirectoryError, BadFile, KeyError, TypeError, ValueError):
            self.rows_done, self._frames = 0, []  # another group's or not a spool: replaced

    def _read_frames(self, file: BinaryIO) -> None:
        header = _first_line(file)
        there = _layout_of(parse_json(header, self.path))
        if not there.covers(self.layout):
            return
        size, position, frames = there.bytes_per_sample, len(header), []
        while rows := _sound_frame(file, position, size):
            frames.append((rows, position + _FRAME.size))
            position += _FRAME.size + rows * size
        done = sum(rows for rows, _ in frames)
        if there != self.layout and done < self.layout.rows:
            return  # it has more views and is unfinished: they would have to be computed too
        if os.fstat(file.fileno()).st_size > position:
            with os.fdopen(open_to_update(self._cache, self._name), "r+b") as own:
                own.truncate(position)
        self.layout, self._frames, self.rows_done = there, frames, done


def spooled_start(cache: Path, rank: int) -> int | None:
    """Return the first sample of the group in an earlier process's spool; None if there is none."""
    path = cache / _name_of(rank)
    try:
        with open_regular(path) as file:
            return _layout_of(parse_json(_first_line(file), path)).start
    except (FileNotFoundError, NotADirectoryError, BadFile, KeyError, TypeError, ValueError):
        return None


def _name_of(rank: int) -> Path:
    return Path(JOURNAL) / f"{rank:04d}.spool"


def remove_spools(cache: Path, *, nobody_resumes: bool = False) -> None:
    """Remove the spools of all processes after the cache is complete.

    nobody_resumes: only the spools of cluster workers, whose random numbers are never reused. The
    caller must hold the lock, and no worker may be running.
    """
    for file in (cache / JOURNAL).glob("[0-9]*.spool"):
        is_resumed = file.stem.isdigit() and int(file.stem) < _MOST_RANKS
        if not (nobody_resumes and is_resumed):
            remove_inside(cache, f"{JOURNAL}/{file.name}")


def _first_line(file: BinaryIO) -> bytes:
    content = file.read(_MOST_HEADER_BYTES)
    line, found, _ = content.partition(b"\n")
    return line + found


def _layout_of(content: dict[str, Any]) -> SpoolLayout:
    taps = tuple((str(tap), str(dtype), tuple(shape)) for tap, dtype, shape in content.pop("taps"))
    return SpoolLayout(**{**content, "views": tuple(content["views"]), "taps": taps})


def _sound_frame(file: BinaryIO, position: int, bytes_per_sample: int) -> int:
    """Return the number of samples in the frame at `position`; 0 if it is truncated or damaged."""
    head = _read(file, position, _FRAME.size)
    if len(head) < _FRAME.size:
        return 0
    rows, checksum = _FRAME.unpack(head)
    size = rows * bytes_per_sample
    if position + _FRAME.size + size > os.fstat(file.fileno()).st_size:
        return 0
    payload = _read(file, position + _FRAME.size, size)
    return int(rows) if google_crc32c.value(payload) == checksum else 0


def _read(file: BinaryIO, position: int, size: int) -> bytes:
    file.seek(position)
    pieces = []
    while size > 0 and (piece := file.read(size)):
        pieces.append(piece)
        size -= len(piece)
    return b"".join(pieces)
