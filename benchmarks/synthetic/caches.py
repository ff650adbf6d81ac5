"""Caches of made-up records: as many bytes as requested, without a teacher."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from numpy.typing import NDArray

from teach_once.precompute.compute.setup import Setup
from teach_once.precompute.compute.teacher_pass import PassOptions, TeacherPass
from teach_once.store import CacheContent, CacheWriter, TapSpec
from teach_once.store.format.spec import DIGEST_BYTES, SAMPLE_DIGEST, Block
from teach_once.store.write.pending_blocks import Work

DigestsOf = Callable[[NDArray[np.int64]], NDArray[np.uint8]]


def content_of(
    taps: dict[str, TapSpec],
    num_samples: int,
    num_views: int,
    num_classes: int,
    identity: dict[str, object],
) -> CacheContent:
    """Return a cache's content without images."""
    return CacheContent(
        teacher="bench",
        identity=identity,
        taps=taps,
        num_samples=num_samples,
        labels=np.zeros(num_samples, dtype=np.int64),
        num_views=num_views,
        class_names=list(map(str, range(num_classes))),
        canary={"samples": [], "views": [], "sha256": ""},
        preview=np.zeros((1, 1, 1, 1), dtype=np.uint8),
        versions={},
    )


def logits_cache(folder: Path, record_bytes: int, view_bytes: int) -> Path:
    """Write a cache with one view of random float16 logits of that size."""
    taps = {"logits": TapSpec((record_bytes // 2,), "float16")}
    identity: dict[str, object] = {"record_bytes": record_bytes}
    content = content_of(taps, view_bytes // record_bytes, 1, record_bytes // 2, identity)
    rng, path = np.random.default_rng(0), folder / f"cache-{record_bytes}"
    with CacheWriter.open(path, content) as writer:
        for item in writer.work:
            shape = (item.block.rows, record_bytes // 2)
            values = rng.integers(0, 2**14, shape, dtype=np.uint16).view(np.float16)
            writer.write_block(item.block, {"logits": values, **no_digests(item)})
    return path


def no_digests(work: Work) -> dict[str, NDArray[np.uint8]]:
    """Return the digests of samples that do not exist, if this work is to store any."""
    if SAMPLE_DIGEST not in work.taps:
        return {}
    return {SAMPLE_DIGEST: np.zeros((work.block.rows, DIGEST_BYTES), np.uint8)}


def fill_with_noise(setup: Setup, digests: DigestsOf) -> None:
    """Write every block of a teacher's cache, with random numbers in place of its outputs.

    digests: sample ids (M,) -> digests (M, 16) of their bytes.
    """
    options = PassOptions(torch.device("cpu"), num_workers=0)
    content, rng = TeacherPass(setup, options).content(), np.random.default_rng(0)
    noise = rng.random(2**20, dtype=np.float32)

    def records(block: Block, tap: str) -> NDArray[np.generic]:
        if tap == SAMPLE_DIGEST:
            return digests(np.arange(block.start, block.stop))
        spec = content.taps[tap]
        values = np.resize(noise[block.view :], (block.rows, *spec.shape))
        return values if tap != "correct" else values.astype(spec.dtype)

    # Tens of thousands of flushes would take minutes; the cache is thrown away.
    with patch.object(os, "fsync", lambda _: None), CacheWriter.open(setup.path, content) as writer:
        for item in writer.work:
            writer.write_block(item.block, {tap: records(item.block, tap) for tap in item.taps})
        writer.finish({"views": setup.config.views.num_views, "images_per_second": 1.0})
