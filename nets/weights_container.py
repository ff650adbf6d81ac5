"""What a file of weights may be, looked at before torch opens it. Imports no torch.

torch trusts the numbers in a file: it unpacks compressed members whatever their size, builds what
the pickle asks for, and compares no checksum. So the file is looked at first: a regular file, whose
members are stored as they are and match their CRC-32, with a pickle of a bounded length that names
no class which only takes memory. Nothing in the pickle is executed.
"""

from __future__ import annotations

import io
import os
import pickletools
import shlex
import struct
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

from nets.archs import ArchError
from runtime.text import one_line

MOST_PICKLE_BYTES = 8 * 2**20
MOST_OPERATIONS = 10**6  # a tensor takes about 25
_MOST_DIRECTORY_BYTES = 16 * 2**20
_LEGACY_HEADERS = 3  # pickles before the content, in files older than torch 1.6
_HUNGRY = ("builtins bytearray", "__builtin__ bytearray")  # bytearray(10**10) takes 10 GB
_PIECE = 2**20
_ELEMENT_BYTES = {  # by the class of a storage
    **dict.fromkeys(("BoolStorage", "ByteStorage", "CharStorage", "UntypedStorage"), 1),
    **dict.fromkeys(("QInt8Storage", "QUInt8Storage", "QUInt4x2Storage", "QUInt2x4Storage"), 1),
    **dict.fromkeys(("HalfStorage", "BFloat16Storage", "ShortStorage"), 2),
    **dict.fromkeys(("FloatStorage", "IntStorage", "QInt32Storage"), 4),
    **dict.fromkeys(("DoubleStorage", "LongStorage", "ComplexFloatStorage"), 8),
    "ComplexDoubleStorage": 16,
}
_END, _END_64 = struct.Struct("<4s4H2LH"), struct.Struct("<4sQ2H2L4Q")
_LOCATOR_BYTES = 20


# torch's zip format, the one before it, or a TorchScript program.
Container = Literal["zip", "legacy", "script"]


class Op(NamedTuple):
    """An operation of a pickle."""

    name: str
    argument: object


def check_container(file: BinaryIO, path: Path) -> Container:
    """What an opened file is by its form; what is "script" has not been looked at further.

    path: for the message. Raises ArchError where the file is damaged, compressed or too large for
    what it holds.
    """
    try:
        is_zip = _starts_as_zip(file)
        if is_zip and _is_script(file):
            return "script"
        sizes = _check_members(file) if is_zip else None
        _check_operations(operations(file), sizes)
    except _Refused as refused:
        raise ArchError(f"{one_line(path)} {refused}", fix=refused.fix_for(path)) from None
    except Exception as error:  # damaged bytes make zipfile and pickletools raise anything at all
        reason = one_line(error) or type(error).__name__
        raise ArchError(f"{one_line(path)} is not a readable weights file: {reason}") from None
    finally:
        file.seek(0)
    return "zip" if is_zip else "legacy"


def operations(file: BinaryIO) -> Iterator[Op]:
    """Those of the pickle that holds the content. Raises ValueError or BadZipFile."""
    file.seek(0)
    if _starts_as_zip(file):
        with zipfile.ZipFile(file) as archive:
            (name,) = (n for n in archive.namelist() if _is_content(n))
            pickle = io.BytesIO(archive.read(name))
    else:
        pickle = io.BytesIO(file.read(MOST_PICKLE_BYTES))
        for _ in range(_LEGACY_HEADERS):
            for _ in pickletools.genops(pickle):
                pass
    for operation, argument, _ in pickletools.genops(pickle):
        yield Op(operation.name, argument)


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


def _starts_as_zip(file: BinaryIO) -> bool:
    file.seek(0)
    start = file.read(4)
    file.seek(0)
    return start == b"PK\x03\x04"  # as torch decides


def _is_script(file: BinaryIO) -> bool:
    """As torch decides."""
    if _directory_bytes(file) > _MOST_DIRECTORY_BYTES:
        raise _Refused("lists too many members")
    with zipfile.ZipFile(file) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _check_members(file: BinaryIO) -> dict[str, int]:
    """The sizes of the storages, in bytes, by their keys.

    Raises _Refused, or what zipfile raises, unless all members are whole, stored and unique.
    """
    size = os.fstat(file.fileno()).st_size
    with zipfile.ZipFile(file) as archive:
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
            _check_crc32(archive, member)
        folder = next(m.filename[: -len("data.pkl")] for m in members if _is_content(m.filename))
        return {
            member.filename.removeprefix(f"{folder}data/"): member.file_size for member in members
        }


def _is_content(name: str) -> bool:
    return name.endswith("/data.pkl")


def _check_crc32(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> None:
    with archive.open(member) as content:  # compares the CRC-32 at the end
        while content.read(_PIECE):
            pass


def _check_operations(pickle: Iterator[Op], sizes: Mapping[str, int] | None) -> None:
    """Raise _Refused unless a pickle is short and its storages are as large as it says.

    sizes: of the storages by key; None in the older format, where torch itself compares them.
    """
    memo: dict[object, object] = {}
    values: list[object] = []  # since the last mark, as far as they are numbers and names
    is_tuple = False
    for number, (name, argument) in enumerate(pickle):
        if number >= MOST_OPERATIONS:
            raise _Refused(f"holds more than {MOST_OPERATIONS:,} operations")
        if argument in _HUNGRY:
            raise _Refused("holds an object of class bytearray beside its weights")
        if name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = values[-1] if values and not is_tuple else None
            continue
        if name == "BINPERSID" and sizes is not None:
            _check_storage(values if is_tuple else [], sizes)
        if name == "MARK":
            values = []
        elif name in ("BINGET", "LONG_BINGET"):
            values.append(memo.get(argument))
        elif name != "TUPLE":
            values.append(argument)
        is_tuple = name == "TUPLE"


def _check_storage(persistent_id: Sequence[object], sizes: Mapping[str, int]) -> None:
    """persistent_id: "storage", its class, its key, its device and its length."""
    _, kind, key, _, length = persistent_id
    size = _ELEMENT_BYTES[str(kind).split()[-1]] * int(str(length))
    if sizes[str(key)] != size:
        raise _Refused(
            f"is not a readable weights file: it says that the tensor {one_line(key)} has "
            f"{size:,} bytes, but holds {sizes[str(key)]:,}"
        )


def _directory_bytes(file: BinaryIO) -> int:
    """Of the list of members at the end of a zip file, as zipfile will read it."""
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
