"""Weights files as a forger makes them: other members, and the checksums right again."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path


def repacked(source: Path, target: Path, compression: int = zipfile.ZIP_STORED) -> Path:
    """A copy of a file of torch's format, with its members compressed in another way."""
    return forged_pickle(source, target, lambda pickle: pickle, compression)


def forged_pickle(
    source: Path,
    target: Path,
    forge: Callable[[bytes], bytes],
    compression: int = zipfile.ZIP_STORED,
) -> Path:
    """A copy of a file of torch's format, with another pickle in it."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for name in old.namelist():
            content = old.read(name)
            new.writestr(name, forge(content) if name.endswith("/data.pkl") else content)
    return target
