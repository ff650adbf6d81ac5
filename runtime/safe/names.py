"""Which names files may be given that become folders and words of printed commands."""

from __future__ import annotations

import re

_MOST_BYTES = 150  # a file system allows 255 for a folder's, to which digits are added
_TEACHER = re.compile(r"\w(?:[\w .,+=@~-]*[\w+=@~-])?")

TEACHER_NAMES = (
    f"letters, digits and ' .,+=@~_-', beginning with a letter or digit, without '..', "
    f"of at most {_MOST_BYTES} bytes"
)


def is_teacher_name(name: str) -> bool:
    """Return True if a folder can be called so, and a shell and make leave the name as it is."""
    return (
        _TEACHER.fullmatch(name) is not None
        and ".." not in name
        and len(name.encode("utf-8", "replace")) <= _MOST_BYTES
    )
