"""Which names may stand in a cache: they become files, folders and words of printed commands."""

from __future__ import annotations

import re

NAME_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"  # of a tap, or a stage
_MOST_BYTES = 150  # of a teacher's name: a file system allows 255 for a folder's
_TEACHER = re.compile(r"\w(?:[\w .,+=@~-]*[\w+=@~-])?")
_RESERVED = {"labels", "preview", "sample_crc32c", "zarr.json"}

TEACHER_NAMES = (
    f"letters, digits and ' .,+=@~_-', beginning with a letter or digit, without '..', "
    f"of at most {_MOST_BYTES} bytes"
)
TAP_NAMES = "[A-Za-z0-9._-], of at most 64 characters, none of the store's own names"


def is_teacher_name(name: str) -> bool:
    """Whether a folder can be called so, and a shell and make leave the name as it is."""
    return (
        _TEACHER.fullmatch(name) is not None
        and ".." not in name
        and len(name.encode("utf-8", "replace")) <= _MOST_BYTES
    )


def is_tap_name(name: str) -> bool:
    """Whether a tap, and its folder, can be called so beside the arrays that every cache has."""
    return (
        re.fullmatch(NAME_PATTERN, name) is not None
        and ".." not in name
        and not name.endswith(".scale")
        and name not in _RESERVED
    )
