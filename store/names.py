"""Which names a cache may contain: they become files, folders and words of printed commands."""

from __future__ import annotations

import re

NAME_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"  # of a tap, or a stage
_RESERVED = {"labels", "preview", "sample_crc32c", "zarr.json"}

TAP_NAMES = "[A-Za-z0-9._-], of at most 64 characters, none of the store's own names"


def is_tap_name(name: str) -> bool:
    """Whether a tap, and its folder, can be called so beside the arrays that every cache has."""
    return (
        re.fullmatch(NAME_PATTERN, name) is not None
        and ".." not in name
        and not name.endswith((".scale", ".class", ".rest"))
        and name not in _RESERVED
    )
