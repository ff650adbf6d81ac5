"""The zarr.json files of a cache: written by zarr itself, and compared field by field when read.

Their checksums in the manifest find damage. The comparison finds intact metadata that contradict
the manifest (another shape, dtype, byte order, codec or chunk key), which would make other readers
of the cache get other numbers. Spelling does not matter, because other versions of zarr write the
same fields differently.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from teach_once.runtime.safe.confined import open_inside
from teach_once.runtime.safe.safe_read import BadFile, is_out_of_resources, parse_json, read_open
from teach_once.runtime.safe.text import one_line
from teach_once.store.errors import Fault
from teach_once.store.format.manifest import Manifest, Problem
from teach_once.store.format.spec import ZARR_GROUP, ArraySpec, bytes_crc32c, crc_hex, next_path

MAX_METADATA_BYTES = 2**20
_GROUP = "zarr.json"
_NAN = {"NaN", "0x7e00", "0x7fc00000"}  # spelling of zarr's spec for float16 and float32


@dataclass(frozen=True)
class ZarrArray:
    """The description of an array in zarr.json."""

    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    dtype: str
    fill_value: float | int
    dimension_names: tuple[str | None, ...] | None = None


def zarr_arrays(manifest: Manifest) -> dict[str, ZarrArray]:
    """Return {name: description} of all arrays of the group."""
    m = manifest
    arrays = {name: _in_blocks(m, spec) for name, spec in m.arrays.items()}
    for name, (shape, dtype) in m.whole.items():
        arrays[name] = ZarrArray(shape, shape, dtype, -1 if dtype == "int64" else 0)
    return arrays


def _in_blocks(manifest: Manifest, spec: ArraySpec) -> ZarrArray:
    rows = manifest.blocks_per_view if spec.per_block else manifest.num_samples
    views = 0 if spec.all_views else 1  # dimensions
    inner: list[str | None] = [None] * len(spec.shape)
    if len(spec.shape) == 1:
        inner = ["byte" if spec.all_views else "channel"]
    return ZarrArray(
        shape=(*[manifest.num_views] * views, rows, *spec.shape),
        chunks=(*[1] * views, manifest.chunk_rows(spec), *spec.shape),
        dtype=spec.dtype,
        fill_value=spec.fill_value,
        dimension_names=(*["view"] * views, "block" if spec.per_block else "sample", *inner),
    )


def zarr_metadata(manifest: Manifest) -> dict[str, bytes]:
    """Return {path below the group: bytes of its zarr.json}, as zarr itself writes them."""
    import zarr
    from zarr.codecs import BytesCodec, Crc32cCodec
    from zarr.storage import MemoryStore

    files: dict[str, Any] = {}
    memory = MemoryStore(files)
    zarr.create_group(memory, zarr_format=3)
    for name, array in zarr_arrays(manifest).items():
        zarr.create_array(
            memory,
            name=name,
            shape=array.shape,
            chunks=array.chunks,
            dtype=array.dtype,
            fill_value=array.fill_value,
            dimension_names=array.dimension_names,
            serializer=BytesCodec(endian="little"),
            compressors=[Crc32cCodec()],
            filters=None,
            chunk_key_encoding={"name": "default", "separator": "."},
        )
    return {key: value.to_bytes() for key, value in files.items() if key.endswith("zarr.json")}


# ---- reading


Reader = Callable[[str], "bytes | None"]  # the bytes of a file of the cache; None: it is missing


def metadata_faults(cache: Path, manifest: Manifest, read: Reader | None = None) -> list[Fault]:
    """Return the zarr.json files that are missing, damaged, or contradict the manifest.

    A file that has not been replaced yet is valid if its successor next to it is. read: reads a
    file of a cache that is not a folder.
    """
    read = read or partial(_read, cache)
    arrays = zarr_arrays(manifest)
    faults = []
    for name, checksum in manifest.zarr_crc32c.items():
        path = cache / ZARR_GROUP / name
        array = arrays.get(name.removesuffix("/zarr.json"))
        if (what := _fault(cache, f"{ZARR_GROUP}/{name}", checksum, array, read)) is not None:
            faults.append(Fault(what, path))
    return faults


def _fault(
    cache: Path, name: str, checksum: str, array: ZarrArray | None, read: Reader
) -> str | None:
    try:
        content = read(name)
        if checksum_of(content) != checksum:
            before, content = content, read(str(next_path(Path(name))))
            if checksum_of(content) != checksum:
                content = read(name)  # the successor may just have been renamed
            if checksum_of(content) != checksum:
                return f"zarr metadata {'missing' if before is None else 'damaged'}"
        assert content is not None
        found = parse_json(content, cache / name)
    except BadFile as error:
        place = "" if error.path == cache / name else f"{one_line(error.path)} "
        return f"zarr metadata: {place}{error.what}"
    except OSError as error:
        if is_out_of_resources(error):
            raise
        return f"zarr metadata unreadable ({error.strerror})"
    problem = next(_problems(found, array), None)
    return None if problem is None else f"zarr metadata: {problem}"


def _read(cache: Path, name: str) -> bytes | None:
    try:
        with open_inside(cache, name) as file:
            return read_open(file, cache / name, MAX_METADATA_BYTES)
    except FileNotFoundError:
        return None


def file_checksum(cache: Path, name: str) -> str | None:
    """Return the crc32c of a zarr.json's bytes; None if there is no such file. Raises BadFile."""
    return checksum_of(_read(cache, name))


def checksum_of(content: bytes | None) -> str | None:
    """Return the crc32c of these bytes; None for None."""
    if content is None:
        return None
    return crc_hex(bytes_crc32c(content))


def _problems(found: object, array: ZarrArray | None) -> Iterator[Problem]:
    if not isinstance(found, dict):
        yield Problem("the document", "an object", found)
        return
    expected = _expected_group() if array is None else _expected_array(array)
    for key, right in expected.items():
        value = _normal(found.get(key))
        if value not in right:
            yield Problem(key, f"{right[0]!r}", found.get(key))
    for key in found.keys() - expected.keys():
        yield Problem(key, "no such key", found[key])


_NO_ATTRIBUTES: list[Any] = [{}, None]


def _expected_group() -> dict[str, list[Any]]:
    return {
        "zarr_format": [3],
        "node_type": ["group"],
        "attributes": _NO_ATTRIBUTES,
        "consolidated_metadata": [None],
    }


def _expected_array(array: ZarrArray) -> dict[str, list[Any]]:
    """Return {key: all values that mean the same, normalized, the usual one first}."""
    fill = [array.fill_value] if isinstance(array.fill_value, int) else ["NaN", *sorted(_NAN)]
    named = [None] if array.dimension_names is None else [list(array.dimension_names), None]
    return {
        "zarr_format": [3],
        "node_type": ["array"],
        "shape": [list(array.shape)],
        "data_type": [array.dtype],
        "chunk_grid": [_named("regular", chunk_shape=list(array.chunks))],
        "chunk_key_encoding": [_named("default", separator=".")],
        "fill_value": fill,
        "codecs": _codecs(np.dtype(array.dtype).itemsize),
        "attributes": _NO_ATTRIBUTES,
        "dimension_names": named,
        "storage_transformers": [[], None],
    }


def _codecs(itemsize: int) -> list[Any]:
    little = [_named("bytes", endian="little"), "crc32c"]
    single = [["bytes", "crc32c"], [_named("bytes", endian=None), "crc32c"]]
    return [little] if itemsize > 1 else [little, *single]


def _named(name: str, **configuration: Any) -> dict[str, Any]:
    return {"name": name, "configuration": configuration}


def _normal(value: Any) -> Any:
    """Return a value in one spelling: an extension without configuration becomes its name."""
    if isinstance(value, list):
        return [_normal(item) for item in value]
    if isinstance(value, dict):
        inner = {key: _normal(item) for key, item in value.items()}
        if inner.keys() <= {"name", "configuration"} and not inner.get("configuration"):
            return inner.get("name", inner)
        return inner
    return _Exactly(value) if isinstance(value, bool | float) else value


class _Exactly:
    """A value that only equals its own type, although True == 1 and 3.0 == 3."""

    def __init__(self, value: object) -> None:
        self.value = value

    def __repr__(self) -> str:
        return repr(self.value)
