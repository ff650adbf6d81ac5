"""A small cache of random records, written without a teacher: 11 samples, 2 views, blocks of 4."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from store import CacheContent, CacheWriter, TapSpec
from store.journal import Journal, read_journal
from store.manifest import read_manifest

TAPS = {
    "logits": TapSpec((3,), "float16"),
    "stage1": TapSpec((5,), "float32"),
    "correct": TapSpec((), "uint8"),
}
IDENTITY = {"teacher": {"arch": "resnet20", "weights_sha256": "aa"}, "dataset": {"digest": "d"}}
CANARY = {"samples": [0], "views": [0], "sha256": "c"}
LABELS = np.arange(11, dtype=np.int64) % 3
PREVIEW = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)


def records_of(view: int, rows: slice, seed: int = 0) -> dict[str, np.ndarray]:
    """Those rows of a view: tap -> array, always the same."""
    rng = np.random.default_rng([seed, view])
    whole = {
        "logits": rng.normal(size=(11, 3)).astype(np.float16),
        "stage1": rng.normal(size=(11, 5)).astype(np.float32),
        "correct": rng.integers(0, 2, 11).astype(np.uint8),
    }
    return {tap: values[rows] for tap, values in whole.items()}


def open_writer(path: Path, **changes: Any) -> CacheWriter:
    """The writer of the cache at `path`; changes: to the content, or to the options of `open`."""
    options = {
        name: changes.pop(name)
        for name in ("block_rows", "check_every_byte", "job")
        if name in changes
    }
    content = CacheContent(
        **{
            "teacher": "t",
            "identity": IDENTITY,
            "taps": TAPS,
            "labels": LABELS,
            "num_views": 2,
            "class_names": ["a", "b", "c"],
            "canary": CANARY,
            "preview": PREVIEW,
            "versions": {"zarr": zarr.__version__},
            **changes,
        }
    )
    return CacheWriter.open(path, content, **{"block_rows": 4, **options})


def fill(path: Path, blocks: int | None = None, **changes: Any) -> Path:
    """Write all pending blocks, or the first so many; returns `path`."""
    with open_writer(path, **changes) as writer:
        for item in writer.work[:blocks]:
            rows = records_of(item.block.view, slice(item.block.start, item.block.stop))
            writer.write_block(item.block, {tap: rows[tap] for tap in item.taps})
    return path


def journal_of(cache: Path) -> Journal:
    return read_journal(cache, read_manifest(cache))


def chunks(cache: Path) -> Iterator[Path]:
    """Every chunk file of the cache."""
    yield from sorted((cache / "teacher.zarr").glob("*/c.*"))
