"""The program of the kill loop: a pass over a small cache, in a process that may die any time."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from rich.console import Console

from teach_once.precompute.compute.setup import prepare
from teach_once.precompute.compute.teacher_pass import PassOptions
from teach_once.precompute.run_pass import fill_cache

torch.set_num_threads(1)


def run_pass(overrides: list[str], caches: Path, batch_size: int = 2) -> None:
    setup = prepare("digits-resnet20", overrides, caches)
    options = PassOptions(torch.device("cpu"), batch_size, block_rows=4)
    fill_cache(setup, options, Console(file=io.StringIO()))
