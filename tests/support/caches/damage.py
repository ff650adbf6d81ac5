"""Damage to files."""

from __future__ import annotations

from pathlib import Path


def flip(path: Path, position: int) -> None:
    """Flip one bit of the byte at `position`."""
    data = bytearray(path.read_bytes())
    data[position] ^= 0x10
    path.write_bytes(data)
