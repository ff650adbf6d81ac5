"""The regular files in a tar archive, by their place in it; read strictly, nothing is extracted.

Python's tarfile believes what headers say: of sizes to be read into memory, of links, of sparse
files. Here a member is a name, an offset and a size that lie within the archive, or an error.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from runtime.reading import BadFile, open_regular
from runtime.text import one_line
from views.pictures import shown_path
from views.splits import DatasetError

_BLOCK = 512
_MOST_EXTRA_BYTES = 2**20  # of an extended header
_LONGEST_NAME = 4096
_EXTENDED = {b"x": "pax", b"g": "global pax", b"L": "GNU long name", b"K": "GNU long link"}


class TarMember(NamedTuple):
    """A regular file: where its bytes are in the archive."""

    name: str
    offset: int
    size: int


class Tar:
    """An archive; it is opened for each reading, since a dataset may have thousands."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self, member: TarMember) -> bytes:
        """The bytes of a member. Raises DatasetError."""
        with self._opened() as file:
            return self._read(file, member.offset, member.size)

    def members(self) -> Iterator[TarMember]:
        """All regular files in their order. Raises DatasetError."""
        with self._opened() as file:
            yield from self._members(file, os.fstat(file.fileno()).st_size)

    def _opened(self) -> BinaryIO:
        try:
            return open_regular(self.path, follow=True)
        except (BadFile, OSError) as error:
            shown = shown_path(self.path)
            raise DatasetError(f"cannot read {shown}: {one_line(error)}") from None

    def _members(self, file: BinaryIO, num_bytes: int) -> Iterator[TarMember]:
        position, extra = 0, dict[str, str]()
        while position < num_bytes:
            header = self._read(file, position, _BLOCK)
            if header == bytes(_BLOCK):  # the end
                return
            kind, name, size = self._parsed(header, position)
            size = self._number(extra["size"], position) if "size" in extra else size
            start = position + _BLOCK
            if start + size > num_bytes:
                raise self._wrong(position, "it ends too early")
            if kind in _EXTENDED:
                if size > _MOST_EXTRA_BYTES:
                    raise self._wrong(position, f"a {_EXTENDED[kind]} header of {size:,} bytes")
                extra |= self._extended(kind, self._read(file, start, size), position)
            elif kind in (b"0", b"\0", b"7"):
                yield TarMember(self._checked(extra.get("path", name), position), start, size)
                extra = {}
            elif kind == b"5":  # a folder
                size, extra = 0, {}
            else:
                raise self._wrong(position, f"{one_line(name)} is a link or another special file")
            position = start + -(-size // _BLOCK) * _BLOCK

    def _parsed(self, header: bytes, position: int) -> tuple[bytes, str, int]:
        """Type, name and size of a header whose checksum is right."""
        blank = header[:148] + b" " * 8 + header[156:]
        if self._number(_field(header[148:156]), position) != sum(blank):
            raise self._wrong(position, "a header does not match its checksum")
        name = header[:100].split(b"\0")[0]
        if header[257:263] == b"ustar\0" and header[345] != 0:
            name = header[345:500].split(b"\0")[0] + b"/" + name
        if header[124] == 0x80:  # GNU's form of large numbers
            size = int.from_bytes(header[125:136], "big")
        else:
            size = self._number(_field(header[124:136]), position)
        return header[156:157], name.decode("utf-8", "surrogateescape"), size

    def _number(self, digits: str, position: int) -> int:
        base = 10 if digits.startswith("+") else 8
        text = digits.lstrip("+")
        if len(text) > 20 or not text.isascii() or not text.isdigit():
            raise self._wrong(position, "a number that is none")
        try:
            return int(text, base)
        except ValueError:
            raise self._wrong(position, "a number that is none") from None

    def _extended(self, kind: bytes, content: bytes, position: int) -> dict[str, str]:
        """The name and the size, decimal after a "+", that a header gives the next member."""
        if kind == b"L":
            return {"path": content.rstrip(b"\0").decode("utf-8", "surrogateescape")}
        found, start = {}, 0
        while kind == b"x" and start < len(content):
            length, space, _ = content[start : start + 20].partition(b" ")
            stop = start + int(length) if space and length.isdigit() else start
            record = content[start + len(length) + 1 : max(stop - 1, start)]  # "9 path=x\n"
            key, equals, value = record.partition(b"=")
            is_whole = stop <= len(content) and content[stop - 1 : stop] == b"\n"
            if not equals or not is_whole or key.startswith(b"GNU.sparse"):
                raise self._wrong(position, "a pax header that is none, or of a sparse file")
            if key in (b"path", b"size"):
                sign = "+" if key == b"size" else ""
                found[key.decode()] = sign + value.decode("utf-8", "surrogateescape")
            start = stop
        return found

    def _checked(self, name: str, position: int) -> str:
        try:
            name.encode("utf-8")
        except UnicodeEncodeError:
            raise self._wrong(position, f"the name {one_line(name)} is not UTF-8") from None
        if not name or len(name) > _LONGEST_NAME or "\0" in name:
            raise self._wrong(position, "a name that is empty or too long")
        return name

    def _read(self, file: BinaryIO, offset: int, size: int) -> bytes:
        content = os.pread(file.fileno(), size, offset)
        if len(content) != size:
            raise self._wrong(offset, "it ends too early")
        return content

    def _wrong(self, position: int, what: str) -> DatasetError:
        return DatasetError(
            f"{shown_path(self.path)} is no tar archive of regular files: {what}, at byte "
            f"{position:,}"
        )


def _field(raw: bytes) -> str:
    """An octal number as tar has it: padded with spaces and zeros; "0" where it is empty."""
    return raw.strip(b" \0").decode("latin-1") or "0"
