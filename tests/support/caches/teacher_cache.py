"""A cache filled by a real teacher's pass."""

from __future__ import annotations

import hashlib
import io
import shutil
from pathlib import Path

import torch
from rich.console import Console

from teach_once.configs.schema import TeacherConfig
from teach_once.precompute.compute import setup
from teach_once.precompute.compute.setup import Setup
from teach_once.precompute.compute.teacher_pass import PassOptions
from teach_once.precompute.run_pass import fill_cache
from teach_once.store import TeacherCache
from teach_once.views.datasets import load_dataset

CPU = torch.device("cpu")


def setup_of(config: TeacherConfig, caches_dir: Path) -> Setup:
    return setup.setup_of(config, load_dataset(config.dataset), caches_dir)


def make_cache(
    config: TeacherConfig,
    caches_dir: Path,
    *,
    batch_size: int = 256,
    block_rows: int | None = 16,
) -> TeacherCache:
    setup = setup_of(config, caches_dir)
    options = PassOptions(CPU, batch_size, block_rows)
    cache = fill_cache(setup, options, Console(file=io.StringIO()))
    assert cache is not None
    return cache


class CachesMadeOnce:
    """Copies of caches, each of which is computed once per config.

    The identity is not sufficient, because caches of one identity may have other taps or more
    views. Not for tests of the pass itself, nor for tests that change it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def copy_into(self, config: TeacherConfig, caches_dir: Path) -> None:
        # Some tests use all test images, and others the first ones.
        key = f"{config!r} {setup_of(config, self._folder).dataset.test_digest}"
        setup = setup_of(config, self._folder / hashlib.sha256(key.encode()).hexdigest())
        if not setup.path.exists():
            make_cache(config, setup.path.parent)
        shutil.copytree(setup.path, caches_dir / setup.path.name, dirs_exist_ok=True)
