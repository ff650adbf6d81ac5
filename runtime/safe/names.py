"""Check the names of files that become folder names and words of printed commands."""

from __future__ import annotations

import re

_MOST_BYTES = 150  # file systems allow 255 for a folder, to whose name digits are added
_TEACHER = re.compile(r"\w(?:[\w .,+=@~-]*[\w+=@~-])?")

TEACHER_NAMES = (
    f"letters, digits and ' .,+=@~_-', beginning with a letter or digit, without '..', "
    f"of at most {_MOST_BYTES} bytes"
)


def is_teacher_name(name: str) -> bool:
    """Return True if `name` is valid for a folder and is not changed by a shell or make."""
    return (
        _TEACHER.fullmatch(name) is not None
        and ".." not in name
        and len(name.encode("utf-8", "replace")) <= _MOST_BYTES
    )
