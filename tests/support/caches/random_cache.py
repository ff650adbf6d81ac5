"""A small cache of random records, written without a teacher: 11 samples, 2 views, blocks of 4."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from teach_once.store import CacheContent, CacheWriter, TapSpec
from teach_once.store.format.journal import Journal, read_journal
from teach_once.store.format.manifest import read_manifest
from teach_once.store.format.spec import SAMPLE_DIGEST
from teach_once.store.write.destination import Destination, open_destination
from teach_once.store.write.pending_blocks import Work

TAPS = {
    "logits": TapSpec((3,), "float16"),
    "stage1": TapSpec((5,), "float32"),
    "correct": TapSpec((), "uint8"),
}
IDENTITY = {"teacher": {"arch": "resnet20", "weights_sha256": "aa"}, "dataset": {"digest": "d"}}
CANARY = {"samples": [0], "views": [0], "sha256": "c"}
DIGESTS = np.random.default_rng(7).integers(0, 256, (11, 16), np.uint8)
LABELS = np.arange(11, dtype=np.int64) % 3
PREVIEW = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)


def records_of(view: int, rows: slice, seed: int = 0) -> dict[str, np.ndarray]:
    """Return records of a view: tap -> array, always the same."""
    rng = np.random.default_rng([seed, view])
    whole = {
        "logits": rng.normal(size=(11, 3)).astype(np.float16),
        "stage1": rng.normal(size=(11, 5)).astype(np.float32),
        "correct": rng.integers(0, 2, 11).astype(np.uint8),
        SAMPLE_DIGEST: DIGESTS,
    }
    return {tap: values[rows] for tap, values in whole.items()}


def open_writer(path: Path, **changes: Any) -> CacheWriter:
    """Open a writer of the cache in folder `path`; changes: see `open_any`."""
    writer = open_any(path, **changes)
    assert isinstance(writer, CacheWriter)
    return writer


def open_any(path: Path, **changes: Any) -> Destination:
    """Open a writer of the cache at `path`, a folder or a URL.

    changes: of the content or of the options of `open_destination`.
    """
    options = {
        name: changes.pop(name)
        for name in ("block_rows", "check_every_byte", "job", "spool_folder")
        if name in changes
    }
    content = CacheContent(
        **{
            "teacher": "t",
            "identity": IDENTITY,
            "taps": TAPS,
            "num_samples": len(LABELS),
            "labels": LABELS,
            "num_views": 2,
            "class_names": ["a", "b", "c"],
            "canary": CANARY,
            "preview": PREVIEW,
            "versions": {"zarr": zarr.__version__},
            **changes,
        }
    )
    return open_destination(path, content, **{"block_rows": 4, "spool_folder": path, **options})


def fill(path: Path, blocks: int | None = None, **changes: Any) -> Path:
    """Write all pending blocks, or the first `blocks` of them; returns `path`."""
    with open_any(path, **changes) as writer:
        for item in writer.work[:blocks]:
            write_item(writer, item)
    return path


def write_item(writer: Destination, item: Work, seed: int = 0) -> None:
    """Commit one block with its records."""
    rows = records_of(item.block.view, slice(item.block.start, item.block.stop), seed)
    writer.write_block(item.block, {tap: rows[tap] for tap in item.taps})


def journal_of(cache: Path) -> Journal:
    return read_journal(cache, read_manifest(cache))


def chunks(cache: Path) -> Iterator[Path]:
    """Yield every chunk file of the cache."""
    yield from sorted((cache / "teacher.zarr").glob("*/c.*"))
