"""Changes of a document, and of plain bytes."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.support.attacks.strangers.changes.values import OUTSIDE

Rewrite = Callable[[bytes], bytes]
Rewrites = Iterator[tuple[str, str, Rewrite]]  # (kind, name, function)


@dataclass(frozen=True)
class Change:
    """A change of a document.

    kind: for balanced samples. apply: changes the file or folder at a path. is_sealed: True if all
    checksums are recomputed, as by a forger.
    """

    kind: str
    name: str
    apply: Callable[[Path], None]
    is_sealed: bool = False


def outside_of(path: Path) -> Path:
    """Return the folder next to the world of `path`."""
    (world,) = (parent for parent in (path, *path.parents) if parent.name == "world")
    return world.parent / "outside"


def rewriting(rewrite: Rewrite) -> Callable[[Path], None]:
    """Apply a rewrite to a file's bytes."""

    def apply(path: Path) -> None:
        content = rewrite(path.read_bytes())
        path.write_bytes(content.replace(OUTSIDE.encode(), str(outside_of(path)).encode()))

    return apply


def byte_rewrites(content: bytes, flips: int = 40) -> Rewrites:
    """Yield rewrites of any file: truncated, doubled, noise, and evenly spaced flipped bits."""
    half = len(content) // 2
    yield "bytes", "half", lambda b: b[:half]
    yield "bytes", "last byte missing", lambda b: b[:-1]
    yield "bytes", "a byte more", lambda b: b + b"\0"
    yield "bytes", "twice", lambda b: b + b
    yield "bytes", "zeros", lambda b: bytes(len(b))
    yield "bytes", "noise", lambda b: random.Random(1).randbytes(len(b))
    yield "bytes", "start is noise", lambda b: random.Random(2).randbytes(16) + b[16:]
    chance = random.Random(len(content))
    for number in range(min(flips, len(content))):
        place = number * len(content) // min(flips, len(content))
        bit = chance.randrange(8)
        yield "flip", f"byte {place} bit {bit}", flipping(place, bit)


def flipping(place: int, bit: int) -> Rewrite:
    def rewrite(content: bytes) -> bytes:
        return content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :]

    return rewrite


_MANY_KEYS = b"{" + b"".join(b'"%d":0,' % number for number in range(150_000)) + b'"149999":1}'


def text_rewrites() -> Rewrites:
    """Yield rewrites of a text file: other encodings, and other content."""
    yield "encoding", "UTF-16", lambda b: b.decode().encode("utf-16")
    yield "encoding", "UTF-32-LE", lambda b: b.decode().encode("utf-32-le")
    yield "encoding", "byte-order mark", lambda b: b"\xef\xbb\xbf" + b
    yield "encoding", "Latin-1 byte", lambda b: b.replace(b'"', b'"\xe9', 1)
    yield "encoding", "CRLF", lambda b: b.replace(b"\n", b"\r\n")
    yield "encoding", "NUL at the end", lambda b: b + b"\0"
    yield "document", "of 80 MB of spaces", lambda b: b + b" " * 80_000_000
    yield "document", "of 60 MB of lists", lambda b: b"[" + b"[]," * 20_000_000 + b"[]]"
    yield "document", "of many keys, one twice", lambda b: _MANY_KEYS
    yield "document", "of many lines", lambda b: (b.strip() + b"\n") * min(100_000, 2**26 // len(b))
    for other in (b"null", b"[]", b"{}", b"0", b'"x"', b"[" * 10**6, b'{"a":' * 10**5, b"\n\n"):
        yield "document", f"is {other[:8]!r}", lambda b, other=other: other
    yield "document", "trailing garbage", lambda b: b + b"}"
