"""Which processes or workers share one pass, and whether its rounds come to an end."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from teach_once.configs.load import ConfigError
from teach_once.runtime.machine.resources import RENDEZVOUS, Share
from teach_once.runtime.safe.locks import Job
from teach_once.store.errors import CacheError
from teach_once.store.write.pending_blocks import Work

# What processes that were started together have in common: `runtime.launch`, torchrun, Slurm.
_NAMES = (RENDEZVOUS, "TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT", "SLURM_JOB_ID")


@dataclass(frozen=True)
class JobOptions:
    """Which of several processes this one is, as a command line or a launcher has it."""

    job: Annotated[str, typer.Option(help="name shared by the processes of one job")] = ""
    rank: Annotated[int, typer.Option(min=0, envvar="RANK", help="rank of this process")] = 0
    world: Annotated[int, typer.Option(min=1, envvar="WORLD_SIZE", help="number of processes")] = 1

    @classmethod
    def of_launcher(cls) -> JobOptions:
        """The rank that a launcher has set in the environment; else that of a single process."""
        return cls("", int(os.environ.get("RANK") or 0), int(os.environ.get("WORLD_SIZE") or 1))


@dataclass(frozen=True)
class WorkerOptions:
    """What each worker takes of a node of a Ray cluster."""

    cpus_per_worker: Annotated[
        int, typer.Option(min=1, help="CPUs of each worker of the cluster")
    ] = 1
    gpus_per_worker: Annotated[
        float | None,
        typer.Option(min=0, help="GPUs of each worker; default: 1 if the cluster has any"),
    ] = None


def job_of(name: str, rank: int, world: int) -> Job:
    """The job of this process; without a name that of its launcher. Raises ConfigError."""
    if not name and world > 1:
        name = "-".join(os.environ.get(key, "") for key in _NAMES)
        if not name.strip("-"):
            raise ConfigError("several processes need a common name", fix="add --job NAME")
    if rank >= world:
        raise ConfigError(f"--rank {rank} is not below --world {world}")
    return Job(name, rank, world)


def share_of(job: Job) -> Share:
    """Of this machine: as LOCAL_RANK and LOCAL_WORLD_SIZE say; else as if all ranks ran here."""
    if job.world == 1 or "LOCAL_RANK" in os.environ or "LOCAL_WORLD_SIZE" in os.environ:
        return Share.of_this_process()
    return Share(job.rank, job.world)


class Rounds:
    """The rounds of one pass: after its own work, it does what others left, until nothing is left.

    Where something removes what was committed, that would never be.
    """

    def __init__(self, cache: Path) -> None:
        self._cache = cache
        self._left: int | None = None

    def check(self, left: Sequence[Work]) -> None:
        """Raise CacheError if a round has left as many blocks as the one before it."""
        if self._left is not None and len(left) >= self._left:
            raise CacheError(
                f"{self._cache}: {len(left):,} blocks are missing or damaged, after a round that "
                f"committed {self._left:,}: something removes or changes what is committed",
                fix="end whatever else writes there, then run the same command again",
            )
        self._left = len(left)
