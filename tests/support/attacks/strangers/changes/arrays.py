"""Changes of a chunk of a zarr array: invalid values and bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from tests.support.attacks.strangers.changes.change import Change, byte_rewrites, rewriting
from tests.support.attacks.strangers.changes.places import place_changes
from tests.support.attacks.strangers.changes.seals import seal_chunk

_CHECKSUM_BYTES = 4


def chunk_changes(dtype: str) -> Callable[[Path], Iterator[Change]]:
    """Return the changes of a chunk; dtype: of the array's values."""

    def changes(file: Path) -> Iterator[Change]:
        for name, change in _values(np.dtype(dtype)):
            yield Change("values", name, _sealed(change, dtype), True)
        for kind, name, rewrite in byte_rewrites(file.read_bytes()):
            yield Change(kind, name, rewriting(rewrite))
        yield from place_changes(is_folder=False)

    return changes


def _values(dtype: np.dtype) -> Iterator[tuple[str, Callable[[np.ndarray], None]]]:
    numbers = (np.nan, np.inf, -np.inf, 6e4, 0.0) if dtype.kind == "f" else (0, 1, 7, 255)
    if dtype.kind == "i":
        numbers = (-1, 10, 1000, -(2**62), 2**62)
    places = {"first": slice(0, 1), "last": slice(-1, None), "all": slice(None)}
    for number in numbers:
        for where, rows in places.items():
            yield f"{where} {number}", lambda a, r=rows, n=number: a.__setitem__(r, n)
    yield "bytes swapped", lambda a: a.byteswap(inplace=True)
    yield "reversed", lambda a: a.__setitem__(slice(None), a[::-1].copy())


def _sealed(change: Callable[[np.ndarray], None], dtype: str) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        content = path.read_bytes()
        values = np.frombuffer(content[:-_CHECKSUM_BYTES], dtype).copy()
        change(values)
        path.write_bytes(values.tobytes() + content[-_CHECKSUM_BYTES:])
        seal_chunk(path)

    return apply
