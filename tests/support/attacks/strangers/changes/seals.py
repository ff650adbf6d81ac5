"""Recompute every checksum of a changed file, as a forger would.

A file that cannot be sealed, for example because it is not JSON any more, stays unchanged.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import google_crc32c
import h5py
import numpy as np

Seal = Callable[[Path], None]


def crc(data: bytes) -> str:
    return f"{google_crc32c.value(data):08x}"


def canonical(value: Any) -> bytes:
    """Return canonical JSON as in the format, but allow NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def seal_manifest(file: Path) -> None:
    """Recompute identity_sha256, the checksum, the journal's lines, and the folder's name."""
    with suppress(Exception):
        cache = file.parent
        old, new = resealed_manifest(file)
        if old != new:
            for lines in (cache / "journal").glob("*.jsonl"):
                _rewrite_lines(lines, lambda line: {**line, "identity": new[:16]})
            cache.rename(cache.with_name(f"{cache.name.rpartition('-')[0]}-{new[:8]}"))


def resealed_manifest(file: Path) -> tuple[str, str]:
    """Recompute a manifest's checksums; returns the identity's sha256 before and after."""
    content, old, new = _resealed(file.read_bytes())
    file.write_bytes(content)
    return old, new


def _resealed(content: bytes) -> tuple[bytes, str, str]:
    manifest = json.loads(content)
    stated = manifest.get("identity_sha256")
    new = hashlib.sha256(canonical(manifest.get("identity"))).hexdigest()
    pattern = rb'("identity_sha256"\s*:\s*)"[0-9a-f]{64}"'
    content, changed = re.subn(pattern, rb'\g<1>"' + new.encode() + b'"', content)
    manifest = json.loads(content)
    manifest.pop("manifest_crc32c", None)
    checksum = crc(canonical(manifest)).encode()
    pattern = rb'("manifest_crc32c"\s*:\s*)"[0-9a-f]{8}"'
    content = re.sub(pattern, rb'\g<1>"' + checksum + b'"', content)
    return content, str(stated), new if changed else str(stated)


def _rewrite_lines(file: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    lines = [change(json.loads(line)) for line in file.read_bytes().splitlines()]
    file.write_bytes(b"".join(map(_sealed_line, lines)))


def _sealed_line(line: dict[str, Any]) -> bytes:
    line.pop("line_crc32c", None)
    return canonical({**line, "line_crc32c": crc(canonical(line))}) + b"\n"


def seal_journal(file: Path) -> None:
    """Recompute the checksum of each line that is still JSON."""
    sealed = []
    for line in file.read_bytes().split(b"\n"):
        with suppress(Exception):
            content = json.loads(line)
            stated = content.pop("line_crc32c")
            line = line.replace(stated.encode(), crc(canonical(content)).encode())
        sealed.append(line)
    file.write_bytes(b"\n".join(sealed))


def seal_zarr_json(file: Path) -> None:
    """Recompute the manifest's checksum of this zarr.json."""
    group = next(parent for parent in file.parents if parent.name == "teacher.zarr")
    name = str(file.relative_to(group))
    _change_manifest(group.parent, "zarr_crc32c", name, crc(file.read_bytes()))


def seal_chunk(file: Path) -> None:
    """Recompute the trailing checksum, and the journal's or the manifest's entry."""
    content = file.read_bytes()
    checksum = google_crc32c.value(content[:-4])
    file.write_bytes(content[:-4] + checksum.to_bytes(4, "little"))
    array, cache = file.parent.name, file.parent.parent.parent
    if array in ("labels", "preview"):
        _change_manifest(cache, "whole_crc32c", array, f"{checksum:08x}")
        return
    numbers = [int(part) for part in file.name.split(".")[1:]]
    view, block = (None, numbers[0]) if array == "sample_digest" else (numbers[0], numbers[1])

    def change(line: dict[str, Any]) -> dict[str, Any]:
        if line["block"] == block and view in (None, line["view"]):
            line["crc32c"][array] = f"{checksum:08x}"
        return line

    for lines in (cache / "journal").glob("*.jsonl"):
        _rewrite_lines(lines, change)


def _change_manifest(cache: Path, table: str, name: str, checksum: str) -> None:
    file = cache / "manifest.json"
    manifest = json.loads(file.read_bytes())
    manifest[table][name] = checksum
    file.write_text(json.dumps(manifest, indent=1) + "\n")
    resealed_manifest(file)


def seal_hdf5_cache(file: Path) -> None:
    """Recompute the checksums of all blocks, of labels and preview, and of the manifest."""
    with suppress(Exception), h5py.File(file, "r+") as content:
        text = bytes(content["manifest"][()])
        with suppress(Exception):
            text = _with_whole_checksums(text, content)
        text = _resealed(text)[0]
        del content["manifest"]
        content.create_dataset("manifest", data=np.bytes_(text))
        rows = json.loads(text)["block_rows"]
        for name, data in content.items():
            if "block_crc32c" in data.attrs:
                with suppress(Exception):
                    data.attrs["block_crc32c"] = _block_checksums(name, data, rows)


def _with_whole_checksums(text: bytes, content: h5py.File) -> bytes:
    for name, stated in json.loads(text)["whole_crc32c"].items():
        checksum = crc(np.ascontiguousarray(content[name][()]).tobytes())
        text = text.replace(f'"{stated}"'.encode(), f'"{checksum}"'.encode())
    return text


def _block_checksums(name: str, data: h5py.Dataset, rows: int) -> np.ndarray:
    old = data.attrs["block_crc32c"]
    found = np.zeros_like(old)
    for view, block in np.ndindex(*old.shape):
        if name == "sample_digest":
            part = data[block * rows : (block + 1) * rows]
        elif name.endswith(".scale") and data.shape[1] == old.shape[1]:
            part = data[view, block : block + 1]
        else:
            part = data[view, block * rows : (block + 1) * rows]
        found[view, block] = google_crc32c.value(np.ascontiguousarray(part).tobytes())
    return found
