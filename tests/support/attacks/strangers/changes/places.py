"""Replacements of a file or a folder: links, FIFOs, devices, nothing, too much."""

from __future__ import annotations

import os
import shutil
import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.support.attacks.strangers.changes.change import Change, outside_of

SPARSE_BYTES = 2**30


def place_changes(is_folder: bool) -> Iterator[Change]:
    """Yield changes of an existing file or folder."""
    for name, put in _IN_PLACE.items():
        yield Change("place", name, _in_place_of(put))
    for name, put in (_OF_FOLDERS if is_folder else _OF_FILES).items():
        yield Change("place", name, put)


def new_file_changes() -> Iterator[Change]:
    """Yield objects in place of a file that a command may create."""
    for name, put in {**_IN_PLACE, "is a text": lambda p: p.write_text("x")}.items():
        yield Change("place", name, _made(put))


def _in_place_of(put: Callable[[Path], object]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        _remove(path)
        put(path)

    return apply


def _made(put: Callable[[Path], object]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        put(path)

    return apply


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _linked(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


def _socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # the name of a socket must be short
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)


def _device(path: Path) -> None:
    """Create a device like /dev/zero if permitted, otherwise a link to it."""
    try:
        os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, 5))
    except PermissionError:
        path.symlink_to("/dev/zero")


def _sparse(path: Path) -> None:
    """Append a sparse gigabyte to the file."""
    with path.open("ab") as file:
        file.truncate(SPARSE_BYTES)


def _moved_outside(path: Path) -> None:
    """Move the file or folder elsewhere, behind a link."""
    target = outside_of(path) / "moved"
    shutil.move(path, target)
    path.symlink_to(target)


def _second_name(path: Path) -> None:
    """Add a hard link, through which writing changes another file too."""
    target = outside_of(path) / "moved"
    shutil.move(path, target)
    os.link(target, path)


def _foreign(path: Path) -> Path:
    return outside_of(path) / "folder"


_IN_PLACE: dict[str, Callable[[Path], object]] = {
    "is missing": lambda path: None,
    "is a FIFO": os.mkfifo,
    "is a socket": _socket,
    "is a device": _device,
    "is a link to /dev/zero": _linked("/dev/zero"),
    "is a link to /dev/stdin": _linked("/dev/stdin"),
    "dangles": _linked("nowhere/to/be/found"),
    "is a link to itself": lambda path: path.symlink_to(path.name),
    "is a link to its folder": _linked("."),
    "is a link to a foreign file": lambda path: path.symlink_to(outside_of(path) / "victim"),
    "is a link to a foreign folder": lambda path: path.symlink_to(outside_of(path) / "folder"),
    "is a second name of a foreign file": lambda path: os.link(outside_of(path) / "victim", path),
    "is an empty file": lambda path: path.touch(),
    "is an empty folder": lambda path: path.mkdir(),
    "is a gigabyte of nothing": lambda path: (path.touch(), _sparse(path)),
}
_OF_FILES: dict[str, Callable[[Path], None]] = {
    "has a gigabyte of nothing behind it": _sparse,
    "is behind a link": _moved_outside,
    "has a second name": _second_name,
}
_OF_FOLDERS: dict[str, Callable[[Path], None]] = {
    "is behind a link": _moved_outside,
    "holds a loop": lambda path: (path / "loop").symlink_to("."),
    "holds a link to /": lambda path: (path / "root").symlink_to("/"),
    "holds a link to a foreign folder": lambda path: (path / "a").symlink_to(_foreign(path)),
    "holds a FIFO": lambda path: os.mkfifo(path / "000009-0000.jsonl"),
    "holds an odd name": lambda path: (path / "\x1b[31m\n$(touch PWNED)").mkdir(),
    "holds a name that is no text": lambda path: os.mkdir(os.fsencode(path) + b"/\xff\xfe"),
    "holds a deep folder": lambda path: (path / "/".join(["d"] * 500)).mkdir(parents=True),
}
