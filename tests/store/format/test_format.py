"""Read caches according to store/FORMAT.md with json, crc32c, tensorstore and h5py only."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google_crc32c
import h5py
import numpy as np
import pytest
import tensorstore

from teach_once.configs.schema import TeacherConfig
from teach_once.store import TeacherCache
from teach_once.store.move.hdf5 import export_cache
from teach_once.views.datasets import load_dataset
from tests.support.caches.teacher_cache import make_cache


def canonical(value: Any) -> bytes:
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    ).encode()


def crc(data: bytes) -> str:
    return f"{google_crc32c.value(data):08x}"


def read_manifest(text: bytes) -> dict[str, Any]:
    manifest = json.loads(text)
    stated = manifest.pop("manifest_crc32c")
    assert stated == crc(canonical(manifest))
    assert (manifest["format"], manifest["format_version"]) == ("teach-once-cache", 1)
    return manifest


def read_journal(cache: Path, identity: str) -> dict[tuple[str, int, int], str]:
    committed = {}
    for file in sorted((cache / "journal").glob("*.jsonl")):
        *lines, torn = file.read_bytes().split(b"\n")
        assert torn == b""
        for text in lines:
            line = json.loads(text)
            assert line.pop("line_crc32c") == crc(canonical(line))
            assert line["identity"] == identity[:16]
            for array, value in line["crc32c"].items():
                committed[array, line["view"], line["block"]] = value
    return committed


def read_zarr(cache: Path, array: str) -> np.ndarray:
    path = str(cache / "teacher.zarr" / array)
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": path}}
    return np.asarray(tensorstore.open(spec, open=True, read=True).result().read().result())


def decoded(tap: str, spec: dict[str, Any], read: Callable[[str], np.ndarray], rows: int) -> Any:
    """(views, samples, ...) values of a tap, from its codes and scales where it has them."""
    values = read(tap)
    if top := spec["top"]:
        (classes,) = spec["shape"]
        share = read(f"{tap}.rest").astype(np.float32) - np.log(classes - top)
        whole = np.repeat(share[..., None], classes, axis=-1)
        np.put_along_axis(whole, read(f"{tap}.class").astype(int), values.astype(np.float32), -1)
        return whole
    if spec["scale"] is None:
        return values
    low, step = np.moveaxis(read(f"{tap}.scale"), -1 if spec["scale"] == "row" else 2, 0)
    if spec["scale"] == "row":
        return low[..., None] + values * step[..., None]
    block = np.arange(values.shape[1]) // rows
    return low[:, block] + values * step[:, block]


@pytest.fixture(
    params=[
        [],
        ["taps.logits=uint8", "taps.channel_means=uint8", "taps.attention=float16"],
        ["taps.logits={top_k: 3}"],
        ["taps.logits={top_k: 3}", "taps.channel_means=uint8"],
    ],
    ids=["float16", "uint8", "cut", "reduced"],
)
def cache(
    request: pytest.FixtureRequest, small_teacher: Callable[..., TeacherConfig], tmp_path: Path
) -> Path:
    return make_cache(small_teacher(*request.param), tmp_path).path


def test_a_folder_can_be_read_by_its_description(
    cache: Path, small_teacher: Callable[..., TeacherConfig]
) -> None:
    manifest = read_manifest((cache / "manifest.json").read_bytes())
    assert cache.name.endswith(manifest["identity_sha256"][:8])
    committed = read_journal(cache, manifest["identity_sha256"])
    rows = manifest["block_rows"]
    blocks = -(-manifest["num_samples"] // rows)
    ours = TeacherCache.open(cache)
    for tap, spec in manifest["taps"].items():
        arrays = [tap] if spec["scale"] is None else [tap, f"{tap}.scale"]
        arrays += [f"{tap}.class", f"{tap}.rest"] if spec["top"] else []
        for array in arrays:
            for view in range(manifest["num_views"]):
                for block in range(blocks):
                    check_chunk(cache, array, view, block, committed[array, view, block])
        values = decoded(tap, spec, lambda array: read_zarr(cache, array), rows)
        assert values.shape[:2] == (manifest["num_views"], manifest["num_samples"])
        for view in range(manifest["num_views"]):
            expected = ours.read_view(view, [tap])[tap]
            tolerance = 1e-5 if spec["scale"] or spec["top"] else 0
            assert np.allclose(values[view], expected, rtol=0, atol=tolerance)
    assert (read_zarr(cache, "labels") == ours.labels).all()
    images = np.ascontiguousarray(load_dataset(small_teacher().dataset).train.images)
    digests = [hashlib.blake2b(image.tobytes(), digest_size=16).digest() for image in images]
    assert list(map(bytes, read_zarr(cache, "sample_digest"))) == digests
    assert (read_zarr(cache, "preview") == ours.preview).all()
    for name, value in manifest["zarr_crc32c"].items():
        assert crc((cache / "teacher.zarr" / name).read_bytes()) == value


def check_chunk(cache: Path, array: str, view: int, block: int, committed: str) -> None:
    (file,) = (cache / "teacher.zarr" / array).glob(f"c.{view}.{block}*")
    assert set(file.name.split(".")[3:]) <= {"0"}
    data = file.read_bytes()
    assert crc(data[:-4]) == committed
    assert int(committed, 16) == int.from_bytes(data[-4:], "little")


def test_an_exported_file_can_be_read_by_its_description(cache: Path, tmp_path: Path) -> None:
    export_cache(cache, tmp_path / "cache.h5")
    ours = TeacherCache.open(cache)
    with h5py.File(tmp_path / "cache.h5") as file:
        assert file.attrs["format"] == "teach-once-cache"
        manifest = read_manifest(bytes(file["manifest"][()]))
        rows = manifest["block_rows"]
        for tap, spec in manifest["taps"].items():
            values = decoded(tap, spec, lambda array: file[array][()], rows)
            expected = np.stack([ours.read_view(v, [tap])[tap] for v in range(ours.num_views)])
            tolerance = 1e-5 if spec["scale"] or spec["top"] else 0
            assert np.allclose(values, expected, rtol=0, atol=tolerance)
            stored = file[tap]
            for view in range(manifest["num_views"]):
                for block in range(-(-manifest["num_samples"] // rows)):
                    part = stored[view, block * rows : (block + 1) * rows]
                    stated = stored.attrs["block_crc32c"][view, block]
                    assert google_crc32c.value(part.tobytes()) == stated
        assert crc(file["labels"][()].tobytes()) == manifest["whole_crc32c"]["labels"]
