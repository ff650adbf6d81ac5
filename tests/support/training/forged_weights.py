"""Forged weights files: other members with valid checksums."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path


def repacked(source: Path, target: Path, compression: int = zipfile.ZIP_STORED) -> Path:
    """Copy a file of torch's format with its members compressed differently."""
    return forged_pickle(source, target, lambda pickle: pickle, compression)


def forged_pickle(
    source: Path,
    target: Path,
    forge: Callable[[bytes], bytes],
    compression: int = zipfile.ZIP_STORED,
) -> Path:
    """Copy a file of torch's format with another pickle."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for name in old.namelist():
            content = old.read(name)
            new.writestr(name, forge(content) if name.endswith("/data.pkl") else content)
    return target
