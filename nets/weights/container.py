"""Check a weights file before its tensors are built. Does not import torch.

torch trusts the numbers in a file: it unpacks compressed members of any size, builds whatever the
pickle requests, and verifies no checksum. Therefore torch never opens a weights file. The file must
be a regular file with uncompressed members that match their CRC-32 and a pickle of bounded length.
`nets.weights.pickle` interprets the pickle. Each storage that the pickle names must be in the file
with the length that the pickle claims. Nothing in the pickle is executed.
"""

from __future__ import annotations

import io
import os
import shlex
import struct
import zipfile
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

from teach_once.nets.networks.archs import ArchError
from teach_once.nets.weights.classes import Storage
from teach_once.nets.weights.pickle import (
    MOST_PICKLE_BYTES,
    BadPickle,
    UnknownClass,
    UnsupportedForm,
    read_pickle,
)
from teach_once.nets.weights.unsafe_files import foreign_class, torchscript_program
from teach_once.runtime.safe.safe_read import open_regular
from teach_once.runtime.safe.stand_ins import HEAD_BYTES, find_stand_in
from teach_once.runtime.safe.text import one_line

_MOST_DIRECTORY_BYTES = 16 * 2**20
_PIECE = 2**20
_END, _END_64 = struct.Struct("<4s4H2LH"), struct.Struct("<4sQ2H2L4Q")
_MEMBER = struct.Struct("<4s5H3L2H")  # header of a member
_LOCATOR_BYTES = 20
# The first two pickles of a file older than torch 1.6; the third describes the machine.
_LEGACY_MAGIC, _LEGACY_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
_LENGTH = struct.Struct("<q")  # before each storage there


@dataclass(frozen=True)
class Container:
    """The pickle of a file, and the offsets of the storages that it names."""

    pickle: bytes
    offsets: Mapping[Hashable, int]  # by the key of the storage


def open_weights(path: Path, *, follow: bool) -> BinaryIO:
    """Open a file of weights, at its beginning, through a link only with `follow`.

    Raises ArchError if it is missing or a placeholder (a Git LFS pointer, an HTML page, ...), and
    BadFile if it is not a regular file.
    """
    try:
        file = open_regular(path, follow=follow)
    except FileNotFoundError:
        raise ArchError(f"weights file {one_line(path)} not found") from None
    if found := find_stand_in(file.read(HEAD_BYTES), path):
        file.close()
        raise ArchError(f"{one_line(path)} {found.what}", fix=found.fix)
    file.seek(0)
    return file


def check_container(file: BinaryIO, path: Path) -> Container:
    """Check an open weights file; returns the locations of its pickle and storages.

    path: for messages. Raises ArchError if the file is damaged or compressed, is larger than its
    content requires, or contains more than weights.
    """
    try:
        if not _starts_as_zip(file):
            return _legacy_container(file)
        if not _is_script(file):
            return _zip_container(file)
    except _Refused as refused:
        raise ArchError(f"{one_line(path)} {refused}", fix=refused.fix_for(path)) from None
    except _Foreign as foreign:
        raise foreign_class(foreign.pickle, path, foreign.name) from None
    except Exception as error:  # damaged bytes make zipfile and pickletools raise anything at all
        reason = one_line(error) or type(error).__name__
        raise ArchError(f"{one_line(path)} is not a readable weights file: {reason}") from None
    raise torchscript_program(path)


class _Refused(Exception):
    """A file that is rejected, with the reason."""

    def __init__(self, what: str, *, is_sound: bool = False) -> None:
        super().__init__(what)
        self._is_sound = is_sound

    def fix_for(self, path: Path) -> str | None:
        """Return the command that saves the file correctly, or None if torch cannot read it."""
        if not self._is_sound:
            return None
        plain = path.with_name(f"{path.stem}-plain.pt")
        lines = (
            f"import torch; content = torch.load({str(path)!r}, weights_only=True); "
            f"torch.save(content, {str(plain)!r})"
        )
        return f"if you trust it: python -c {shlex.quote(lines)}"


class _Foreign(Exception):
    """A pickle that names an unknown class."""

    def __init__(self, pickle: bytes, name: str) -> None:
        super().__init__(name)
        self.pickle, self.name = pickle, name


def _starts_as_zip(file: BinaryIO) -> bool:
    file.seek(0)
    return file.read(4) == b"PK\x03\x04"  # the same test as torch's


def _is_script(file: BinaryIO) -> bool:
    """Return True if the file is a TorchScript archive, by the same test as torch's."""
    if _directory_bytes(file) > _MOST_DIRECTORY_BYTES:
        raise _Refused("has too many members")
    with zipfile.ZipFile(file) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


class _Member(NamedTuple):
    start: int
    num_bytes: int


def _zip_container(file: BinaryIO) -> Container:
    """Read the zip format of torch 1.6 and later.

    Raises _Refused, _Foreign, or any error of zipfile.
    """
    with zipfile.ZipFile(file) as archive:
        _check_members(archive, os.fstat(file.fileno()).st_size)
        (content,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
        folder = content[: -len("data.pkl")]
        if folder + "byteorder" in archive.namelist():
            _check_byteorder(archive.read(folder + "byteorder") == b"little")
        pickle = archive.read(content)
        members = {
            member.filename.removeprefix(f"{folder}data/"): _Member(
                _start_of(file, member), member.file_size
            )
            for member in archive.infolist()
        }
    storages = _storages_of(io.BytesIO(pickle), pickle)
    for key, storage in storages.items():
        if (found := members.get(str(key))) is None:
            raise _Refused(f"is not a readable weights file: it lacks the tensor {one_line(key)}")
        if found.num_bytes != storage.num_bytes:
            raise _Refused(
                f"is not a readable weights file: the tensor {one_line(key)} has "
                f"{found.num_bytes:,} bytes, expected {storage.num_bytes:,}"
            )
    return Container(pickle, {key: members[str(key)].start for key in storages})


def _check_members(archive: zipfile.ZipFile, size: int) -> None:
    """Check that all members are complete, uncompressed and unique.

    Raises _Refused, or any error of zipfile.
    """
    members = archive.infolist()
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise _Refused("is compressed, expected uncompressed members", is_sound=True)
    if len({member.filename for member in members}) < len(members):
        raise _Refused("has two members with the same name")
    if sum(member.file_size for member in members) > size:
        raise _Refused("is not a readable weights file: its members are larger than the file")
    for member in members:
        if member.filename.endswith(".pkl") and member.file_size > MOST_PICKLE_BYTES:
            raise _Refused(f"has a pickle of {member.file_size:,} bytes")
        with archive.open(member) as content:  # verifies the CRC-32 at the end
            while content.read(_PIECE):
                pass


def _start_of(file: BinaryIO, member: zipfile.ZipInfo) -> int:
    """Return the offset of a member's first byte; zipfile has already checked its header."""
    file.seek(member.header_offset)
    *_, name_bytes, extra_bytes = _MEMBER.unpack(file.read(_MEMBER.size))
    return member.header_offset + _MEMBER.size + int(name_bytes) + int(extra_bytes)


def _storages_of(stream: io.BytesIO, pickle: bytes) -> dict[Hashable, Storage]:
    """Return the storages that the pickle at the current position of `stream` names.

    pickle: for messages. Raises _Refused, _Foreign or BadPickle.
    """
    try:
        return read_pickle(stream, lambda *_: None).storages
    except UnknownClass as error:
        raise _Foreign(pickle, error.name) from None
    except UnsupportedForm as error:
        raise _Refused(str(error), is_sound=True) from None


def _legacy_container(file: BinaryIO) -> Container:
    """Read the format before torch 1.6: pickles, then the length and bytes of each storage.

    torch reads only the storages in the file's list and leaves others uninitialized, so the list
    must be complete. Raises _Refused, _Foreign or BadPickle.
    """
    size = os.fstat(file.fileno()).st_size
    file.seek(0)
    stream = io.BytesIO(file.read(MOST_PICKLE_BYTES))
    magic, protocol, machine = (_plain(stream) for _ in range(3))
    if magic != _LEGACY_MAGIC or protocol != _LEGACY_PROTOCOL or not isinstance(machine, dict):
        raise BadPickle("it was not written by torch.save")
    _check_byteorder(machine.get("little_endian") is True)
    pickle = stream.getbuffer()[stream.tell() :].tobytes()
    storages = _storages_of(stream, pickle)
    keys = _plain(stream)
    if not isinstance(keys, list) or len(set(keys)) < len(keys) or set(keys) != set(storages):
        raise BadPickle("its list of tensors does not match its pickle")
    offsets, position = {}, stream.tell()
    for key in keys:
        file.seek(position)
        (length,) = _LENGTH.unpack(file.read(_LENGTH.size))
        offsets[key] = position + _LENGTH.size
        position = offsets[key] + storages[key].num_bytes
        if length != storages[key].length or position > size:
            raise BadPickle(
                f"the tensor {one_line(key)} does not have the expected "
                f"{storages[key].length:,} numbers"
            )
    return Container(pickle, offsets)


def _plain(stream: io.BytesIO) -> object:
    """Return the value of a pickle without tensors."""
    return read_pickle(stream, lambda *_: None).content


def _check_byteorder(is_little: bool) -> None:
    if not is_little:
        raise _Refused("has numbers in another byte order", is_sound=True)


def _directory_bytes(file: BinaryIO) -> int:
    """Return the size of the list of members at the end of a zip file, as zipfile will read it."""
    size = os.fstat(file.fileno()).st_size
    tail = _END_64.size + _LOCATOR_BYTES + _END.size
    file.seek(max(0, size - tail))
    end = file.read(tail).rjust(tail, b"\0")
    signature, *_, directory_bytes, _, comment_bytes = _END.unpack(end[-_END.size :])
    if signature != b"PK\x05\x06" or comment_bytes:
        raise _Refused("is not a readable weights file: it is truncated")
    if end[_END_64.size :].startswith(b"PK\x06\x07"):
        directory_bytes = _END_64.unpack(end[: _END_64.size])[8]
    return int(directory_bytes)
