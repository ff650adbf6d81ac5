"""Changes of the header and of the arrays of a packed file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import google_crc32c

from tests.support.attacks.strangers.changes.change import (
    Change,
    Rewrite,
    byte_rewrites,
    rewriting,
    text_rewrites,
)
from tests.support.attacks.strangers.changes.places import place_changes
from tests.support.attacks.strangers.changes.trees import field_rewrites


def packed_changes(file: Path) -> Iterator[Change]:
    content = file.read_bytes()
    for kind, name, rewrite in (*field_rewrites(_header(content)), *text_rewrites()):
        yield Change(kind, f"{name}, sealed", rewriting(_with_header(rewrite)), True)
    for name in _arrays(content):
        for label, change in _ODD_ARRAYS.items():
            yield Change("values", f"{name} {label}", rewriting(_with_array(name, change)), True)
    for number in range(0, 100, 3):
        yield Change("head", f"byte {number} is x", rewriting(_with_byte(number)))
    for kind, name, rewrite in byte_rewrites(content, flips=300):
        yield Change(kind, name, rewriting(rewrite))
    yield from place_changes(is_folder=False)


def _head(content: bytes) -> tuple[list[bytes], int]:
    """Return the words of the first line, and the start of the header."""
    line, _, _ = content.partition(b"\n")
    return line.split(b" "), len(line) + 1


def _header(content: bytes) -> bytes:
    (_, _, length, _), start = _head(content)
    return content[start : start + int(length)]


def _with_header(rewrite: Rewrite) -> Rewrite:
    """Rewrite the header and recompute its length and sha256; it may overwrite the arrays."""

    def rewritten(content: bytes) -> bytes:
        (name, version, length, _), start = _head(content)
        body = rewrite(content[start : start + int(length)]).strip()
        digest = hashlib.sha256(body).hexdigest().encode()
        head = b" ".join((name, version, b"%012d" % len(body), digest)) + b"\n"
        padded = (head + body).ljust(start + int(length), b"\0")
        return padded + content[len(padded) :]

    return rewritten


def _arrays(content: bytes) -> Iterator[str]:
    for split, arrays in json.loads(_header(content))["splits"].items():
        yield from (f"{split}/{name}" for name in arrays)


def _with_array(name: str, change: Callable[[bytes], bytes]) -> Rewrite:
    """Change an array's bytes and its checksum."""

    def rewritten(content: bytes) -> bytes:
        header = json.loads(_header(content))
        split, _, array = name.partition("/")
        place = header["splits"][split][array]
        size = _size(place)
        data = change(content[place["offset"] : place["offset"] + size])[:size].ljust(size, b"\0")
        content = content[: place["offset"]] + data + content[place["offset"] + size :]
        if place["crc32c"] is not None:
            place["crc32c"] = google_crc32c.value(data)
        return _with_header(lambda old: json.dumps(header, separators=(",", ":")).encode())(content)

    return rewritten


def _size(place: dict[str, object]) -> int:
    size = {"<i8": 8, "<u4": 4, "|u1": 1}[str(place["dtype"])]
    for extent in place["shape"]:  # type: ignore[attr-defined]
        size *= extent
    return size


_ODD_ARRAYS: dict[str, Callable[[bytes], bytes]] = {
    "is zeros": lambda data: bytes(len(data)),
    "is ones": lambda data: b"\xff" * len(data),
    "is large numbers": lambda data: b"\xff\xff\xff\x7f" * (len(data) // 4),
    "is reversed": lambda data: data[::-1],
    "begins with an escape": lambda data: b"\x1b[31m" + data[5:],
    "begins with ../": lambda data: b"../" + data[3:],
    "has one bit flipped": lambda data: bytes([data[0] ^ 1]) + data[1:] if data else data,
}


def _with_byte(place: int) -> Rewrite:
    return lambda content: content[:place] + b"x" + content[place + 1 :]
