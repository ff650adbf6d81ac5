"""Looks at a file of weights before anything is made of it. Imports no torch.

torch trusts the numbers in a file: it unpacks compressed members whatever their size, builds what
the pickle asks for, and compares no checksum. So torch never opens one. A file must be a regular
one, whose members are stored as they are and match their CRC-32, with a pickle of a bounded length.
`nets.weights.pickle` interprets the pickle. Each storage that it names must be in the file, with
the length that it claims. Nothing in the pickle is executed.
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
from teach_once.runtime.safe.stand_ins import HEAD_BYTES, find_stand_in
from teach_once.runtime.safe.text import one_line

_MOST_DIRECTORY_BYTES = 16 * 2**20
_PIECE = 2**20
_END, _END_64 = struct.Struct("<4s4H2LH"), struct.Struct("<4sQ2H2L4Q")
_MEMBER = struct.Struct("<4s5H3L2H")  # what stands before a member
_LOCATOR_BYTES = 20
# The first two pickles of a file older than torch 1.6; the third describes the machine.
_LEGACY_MAGIC, _LEGACY_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
_LENGTH = struct.Struct("<q")  # before each storage there


@dataclass(frozen=True)
class Container:
    """The pickle of a file, and where in the file the storages are that it names."""

    pickle: bytes
    offsets: Mapping[Hashable, int]  # by the key of the storage


def check_container(file: BinaryIO, path: Path) -> Container:
    """Where the content of an opened file is.

    path: for the message. Raises ArchError if the file is damaged, compressed, too large for what
    it holds, or holds more than weights.
    """
    refuse_stand_in(file, path)
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


def refuse_stand_in(file: BinaryIO, path: Path) -> None:
    """Raise ArchError if the opened file is a Git LFS pointer, an HTML page or the like."""
    file.seek(0)
    if found := find_stand_in(file.read(HEAD_BYTES), path):
        raise ArchError(f"{one_line(path)} {found.what}", fix=found.fix)


class _Refused(Exception):
    """What is wrong with a file."""

    def __init__(self, what: str, *, is_sound: bool = False) -> None:
        super().__init__(what)
        self._is_sound = is_sound

    def fix_for(self, path: Path) -> str | None:
        """Where torch can read the file, the command that saves it as it should be."""
        if not self._is_sound:
            return None
        plain = path.with_name(f"{path.stem}-plain.pt")
        lines = (
            f"import torch; content = torch.load({str(path)!r}, weights_only=True); "
            f"torch.save(content, {str(plain)!r})"
        )
        return f"if you trust it: python -c {shlex.quote(lines)}"


class _Foreign(Exception):
    """A pickle that names a class which is not known."""

    def __init__(self, pickle: bytes, name: str) -> None:
        super().__init__(name)
        self.pickle, self.name = pickle, name


def _starts_as_zip(file: BinaryIO) -> bool:
    file.seek(0)
    return file.read(4) == b"PK\x03\x04"  # as torch decides


def _is_script(file: BinaryIO) -> bool:
    """As torch decides."""
    if _directory_bytes(file) > _MOST_DIRECTORY_BYTES:
        raise _Refused("lists too many members")
    with zipfile.ZipFile(file) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


class _Member(NamedTuple):
    start: int
    num_bytes: int


def _zip_container(file: BinaryIO) -> Container:
    """Raises _Refused, _Foreign, or what zipfile raises."""
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
                f"is not a readable weights file: it says that the tensor {one_line(key)} has "
                f"{storage.num_bytes:,} bytes, but holds {found.num_bytes:,}"
            )
    return Container(pickle, {key: members[str(key)].start for key in storages})


def _check_members(archive: zipfile.ZipFile, size: int) -> None:
    """Raise _Refused, or what zipfile raises, unless all members are whole, stored and unique."""
    members = archive.infolist()
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise _Refused("is compressed, expected members stored as they are", is_sound=True)
    if len({member.filename for member in members}) < len(members):
        raise _Refused("holds two members of one name")
    if sum(member.file_size for member in members) > size:
        raise _Refused("is not a readable weights file: it claims more bytes than it has")
    for member in members:
        if member.filename.endswith(".pkl") and member.file_size > MOST_PICKLE_BYTES:
            raise _Refused(f"holds a pickle of {member.file_size:,} bytes")
        with archive.open(member) as content:  # compares the CRC-32 at the end
            while content.read(_PIECE):
                pass


def _start_of(file: BinaryIO, member: zipfile.ZipInfo) -> int:
    """The offset of a member's first byte, whose header zipfile has compared."""
    file.seek(member.header_offset)
    *_, name_bytes, extra_bytes = _MEMBER.unpack(file.read(_MEMBER.size))
    return member.header_offset + _MEMBER.size + int(name_bytes) + int(extra_bytes)


def _storages_of(stream: io.BytesIO, pickle: bytes) -> dict[Hashable, Storage]:
    """The storages that the pickle at the position of `stream` names.

    pickle: for the message. Raises _Refused, _Foreign, BadPickle.
    """
    try:
        return read_pickle(stream, lambda *_: None).storages
    except UnknownClass as error:
        raise _Foreign(pickle, error.name) from None
    except UnsupportedForm as error:
        raise _Refused(str(error), is_sound=True) from None


def _legacy_container(file: BinaryIO) -> Container:
    """Read the form before torch 1.6: pickles, and then a length and the bytes of each storage.

    torch reads the storages that a list in the file names, and leaves the others as they are in
    memory. So the list must be of all of them. Raises _Refused, _Foreign, BadPickle.
    """
    size = os.fstat(file.fileno()).st_size
    file.seek(0)
    stream = io.BytesIO(file.read(MOST_PICKLE_BYTES))
    magic, protocol, machine = (_plain(stream) for _ in range(3))
    if magic != _LEGACY_MAGIC or protocol != _LEGACY_PROTOCOL or not isinstance(machine, dict):
        raise BadPickle("it is not a file that torch.save wrote")
    _check_byteorder(machine.get("little_endian") is True)
    pickle = stream.getbuffer()[stream.tell() :].tobytes()
    storages = _storages_of(stream, pickle)
    keys = _plain(stream)
    if not isinstance(keys, list) or len(set(keys)) < len(keys) or set(keys) != set(storages):
        raise BadPickle("its list of tensors is not of those that it names")
    offsets, position = {}, stream.tell()
    for key in keys:
        file.seek(position)
        (length,) = _LENGTH.unpack(file.read(_LENGTH.size))
        offsets[key] = position + _LENGTH.size
        position = offsets[key] + storages[key].num_bytes
        if length != storages[key].length or position > size:
            raise BadPickle(
                f"it says that the tensor {one_line(key)} has {storages[key].length:,} numbers, "
                f"but holds others"
            )
    return Container(pickle, offsets)


def _plain(stream: io.BytesIO) -> object:
    """The value of a pickle without tensors."""
    return read_pickle(stream, lambda *_: None).content


def _check_byteorder(is_little: bool) -> None:
    if not is_little:
        raise _Refused("holds numbers in the order of another processor's bytes", is_sound=True)


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
