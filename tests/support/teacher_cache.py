"""A cache that a pass of a real teacher makes."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from rich.console import Console

from configs.schema import TeacherConfig, as_plain
from nets.archs import has_stem
from nets.source import arch_source
from nets.taps import stage_modules
from precompute.run import PassOptions, fill_cache
from precompute.setup import Setup
from store import TeacherCache
from store.identity import cache_identity, file_sha256
from store.reader import cache_folder
from views.augment import AUGMENT_VERSION
from views.datasets import load_dataset

CPU = torch.device("cpu")


def setup_of(config: TeacherConfig, caches_dir: Path) -> Setup:
    dataset = load_dataset(config.dataset)
    stages = stage_modules(config.teacher.arch, config.taps.stages)
    identity = cache_identity(
        as_plain(config),
        dataset_digest=dataset.digest,
        dataset_type=dataset.type,
        augment_version=AUGMENT_VERSION,
        stages=stages,
        weights_sha256=file_sha256(Path(config.teacher.weights)),
        source=arch_source(config.teacher.arch),
        limit_cuts=dataset.limit_cuts,
        has_stem=has_stem(config.teacher.arch),
    )
    path = cache_folder(caches_dir, config.name, identity)
    return Setup(config, dataset, stages, identity, path)


def make_cache(
    config: TeacherConfig,
    caches_dir: Path,
    *,
    batch_size: int = 256,
    block_rows: int | None = 16,
) -> TeacherCache:
    options = PassOptions(CPU, batch_size, block_rows)
    cache = fill_cache(setup_of(config, caches_dir), options, Console(file=io.StringIO()))
    assert cache is not None
    return cache
