"""The content that other readers find in a cache: zarr, h5py and the text of the format.

A forger may write any numbers and seal them, which is valid. It is a fault if another reader finds
other numbers than the project, or numbers that no teacher gives.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import zarr

from teach_once.store.read.evaluation import evaluation_names
from teach_once.store.read.reader import TeacherCache
from tests.support.attacks.strangers.changes.seals import canonical, crc

Arrays = Mapping[str, np.ndarray]
_OF_ALL_VIEWS = ("labels", "preview", "sample_digest")


def problem_of_folder(cache: Path, num_views: int | None = None) -> str:
    """Return why a cache folder must not be called valid; "" if it may be.

    num_views: check only the first views, if others were planned but never computed.
    """
    group = zarr.open_group(cache / "teacher.zarr", mode="r")
    theirs = {
        name: np.asarray(array[...] if name in _OF_ALL_VIEWS else array[:num_views])
        for name, array in group.arrays()
    }
    text = (cache / "manifest.json").read_bytes()
    if missing := set(_chunks(group)) - set(_committed(cache)):
        return f"no line of the journal names {sorted(missing)[0]}"
    return _problem(cache, text, theirs, num_views) or _wrong_name(cache, text)


def _chunks(group: zarr.Group) -> Iterator[tuple[str, str]]:
    """Yield (array, checksum) of each chunk that the journal must contain."""
    for name, array in group.arrays():
        if name not in ("labels", "preview"):
            folder = Path(array.store_path.store.root) / name
            for file in folder.glob("c.*"):
                yield name, file.read_bytes()[-4:][::-1].hex()


def _committed(cache: Path) -> Iterator[tuple[str, str]]:
    """Yield the readable lines of the journal; others never count as commits."""
    for lines in sorted((cache / "journal").glob("*.jsonl")):
        for line in lines.read_bytes().split(b"\n")[:-1]:
            with suppress(ValueError, KeyError, TypeError, AttributeError, RecursionError):
                content = json.loads(line)
                stated = content.pop("line_crc32c")
                if stated == crc(canonical(content)):
                    named = content["crc32c"].items()
                    yield from ((array, str(checksum)) for array, checksum in named)


def problem_of_file(file: Path) -> str:
    """Return why an exported file must not be called valid; "" if it may be.

    It is the cache and the evaluation caches that the project lists.
    """
    with h5py.File(file) as content:
        groups = {file: content}
        for name in evaluation_names(file):
            groups[file / "evaluation" / name] = content["evaluation"][name]
        problems = (_problem_of_group(path, group) for path, group in groups.items())
        return next(filter(None, problems), "")


def _problem_of_group(path: Path, group: h5py.Group) -> str:
    """path: of the cache in the project's words."""
    theirs = {}
    for name in group:
        if name == "evaluation":
            continue
        if not isinstance(group.get(name, getlink=True), h5py.HardLink):
            return f"{name} is a link"
        if group[name].external or group[name].is_virtual:
            return f"the bytes of {name} lie in another file"
        if group[name].shape:
            theirs[name] = group[name][()]
    return _problem(path, bytes(group["manifest"][()]), theirs)


def _problem(cache: Path, text: bytes, theirs: Arrays, num_views: int | None = None) -> str:
    manifest = _strict_json(text)
    if hashlib.sha256(canonical(manifest["identity"])).hexdigest() != manifest["identity_sha256"]:
        return "the identity has another sha256"
    if min(manifest["num_views"], manifest["num_samples"], len(manifest["taps"])) < 1:
        return "it holds nothing"
    ours = dict(arrays_of(cache, num_views))
    for name, values in ours.items():
        if name not in theirs:
            return f"another reader finds no {name}"
        found = theirs[name] if name in _OF_ALL_VIEWS else theirs[name][:num_views]
        if not _equal(values, found):
            return f"another reader sees another {name}: {found.shape} {found.dtype}"
    return _wrong_values(ours, len(manifest["class_names"]))


def arrays_of(cache: Path, num_views: int | None = None) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the arrays as the project reads them, unscaled."""
    opened = TeacherCache.open(cache, num_views=num_views)
    manifest, source = opened.manifest, opened.source
    yield "labels", opened.labels
    yield "preview", opened.preview
    for name, spec in manifest.arrays.items():
        views = 1 if spec.all_views else opened.num_views
        found = []
        for block in manifest.blocks(views):
            rows = np.empty((manifest.rows_in(spec, block), *spec.shape), spec.dtype)
            source.read(name, block, rows)
            found.append(rows)
        whole = np.concatenate(found)
        yield name, whole if spec.all_views else whole.reshape(views, -1, *spec.shape)


def _equal(ours: np.ndarray, theirs: np.ndarray) -> bool:
    return (
        ours.shape == theirs.shape
        and ours.dtype == theirs.dtype
        and bool(np.array_equal(ours, theirs, equal_nan=ours.dtype.kind == "f"))
    )


def _wrong_values(arrays: Arrays, num_classes: int) -> str:
    labels = arrays["labels"]
    if labels.min() < 0 or labels.max() >= num_classes:
        return "labels are out of range"
    if arrays["correct"].max() > 1:
        return "`correct` is neither 0 nor 1"
    for name, values in arrays.items():
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            return f"{name} is not finite"
    return ""


def _strict_json(text: bytes) -> Any:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a key occurs twice")
        return dict(pairs)

    return json.loads(text.decode("utf-8"), object_pairs_hook=once)


def _wrong_name(cache: Path, text: bytes) -> str:
    sha256 = json.loads(text)["identity_sha256"]
    named = re.search("-([0-9a-f]{8})$", cache.name)
    other = named is not None and named[1] != sha256[:8]
    return "its name is another identity's" if other else ""
