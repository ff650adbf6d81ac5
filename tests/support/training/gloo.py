"""Processes that compute together on this machine's CPU, as started by torchrun."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

_PATIENCE = timedelta(seconds=300)


def on_ranks(
    world: int, function: Callable[[int, int], dict[str, Any]], folder: Path
) -> list[dict[str, Any]]:
    """Return the result of function(rank, world) on each rank: tensors and numbers by name.

    function: importable by name. folder: an empty one for the exchange.
    """
    mp.start_processes(
        _on_rank, args=(world, function, folder), nprocs=world, start_method="forkserver"
    )
    return [torch.load(_result(folder, rank), weights_only=True) for rank in range(world)]


def _on_rank(
    rank: int, world: int, function: Callable[[int, int], dict[str, Any]], folder: Path
) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=_PATIENCE)
    try:
        torch.save(function(rank, world), _result(folder, rank))
    finally:
        dist.destroy_process_group()


def _result(folder: Path, rank: int) -> Path:
    return folder / f"rank{rank}.pt"
