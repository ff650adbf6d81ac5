"""Detect files that replace data after an incomplete clone or a failed download."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import NamedTuple

HEAD_BYTES = 1024  # enough to recognize one
_LFS = (b"version https://git-lfs.github.com/spec/", b"version https://hawser.github.com/spec/")
_HTML = (b"<!doctype html", b"<html", b"<head")
_XML = b"<?xml"


class StandIn(NamedTuple):
    """The description of a placeholder file, after "is", and the instruction to get the data."""

    what: str
    fix: str


def find_stand_in(head: bytes, path: Path) -> StandIn | None:
    """Return the placeholder at `path` from its first HEAD_BYTES; None for any other file."""
    if head.startswith(_LFS):
        where = shlex.quote(str(path.parent))
        return StandIn(
            "is a Git LFS pointer: the file itself has not been fetched",
            f"git -C {where} lfs pull --include {shlex.quote(path.name)}",
        )
    if head.startswith((b"/annex/objects/", b".git/annex/objects/")):
        where = shlex.quote(str(path.parent))
        return StandIn(
            "is a git-annex pointer: the file itself has not been fetched",
            f"git -C {where} annex get {shlex.quote(path.name)}",
        )
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith(_HTML) or (text.startswith(_XML) and b"<html" in text):
        return StandIn(
            "is an HTML page: a web page was saved in place of the file",
            "download the file again from the address that gives the file itself; on the Hugging "
            "Face Hub and on GitHub it contains /resolve/ or /raw/ in place of /blob/",
        )
    if text.startswith(_XML) and b"<error>" in text:
        return StandIn(
            "is an error message of an object store, saved in place of the file",
            "download the file again; the message in the file describes the failure",
        )
    return None
