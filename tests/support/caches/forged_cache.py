"""Forge documents of a cache with valid checksums."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google_crc32c

from teach_once.store.identity import canonical_json


def crc(content: bytes) -> str:
    return f"{google_crc32c.value(content):08x}"


def forged_manifest(text: bytes, change: Callable[[dict[str, Any]], object]) -> bytes:
    """Return the manifest after `change` with a recomputed checksum."""
    content = json.loads(text)
    del content["manifest_crc32c"]
    change(content)
    content["manifest_crc32c"] = crc(canonical_json(content).encode())
    return json.dumps(content).encode()


def forge_manifest(cache: Path, change: Callable[[dict[str, Any]], object]) -> None:
    file = cache / "manifest.json"
    file.write_bytes(forged_manifest(file.read_bytes(), change))


def forge_metadata(cache: Path, name: str, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a zarr.json, and its checksum in the manifest. name: path below the group."""
    file = cache / "teacher.zarr" / name
    content = json.loads(file.read_bytes())
    change(content)
    file.write_text(json.dumps(content))
    checksum = crc(file.read_bytes())
    forge_manifest(cache, lambda manifest: manifest["zarr_crc32c"].update({name: checksum}))


def set_at(*keys: str | int, to: Any) -> Callable[[Any], None]:
    """Return a change that sets the value at these keys."""

    def change(content: Any) -> None:
        *outer, last = keys
        for key in outer:
            content = content[key]
        content[last] = to

    return change


# Replacements of a file: kind -> function that creates it.
SPECIAL: dict[str, Callable[[Path], object]] = {
    "link": lambda path: path.symlink_to("/dev/zero"),
    "dangling link": lambda path: path.symlink_to("nowhere"),
    "loop": lambda path: path.symlink_to(path.name),
    "FIFO": os.mkfifo,
    "folder": lambda path: path.mkdir(),
    "sparse": lambda path: _sparse(path),
}


def _sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(10**10)
