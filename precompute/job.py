"""The processes or workers that share one pass."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Annotated, ClassVar

import typer

from teach_once.configs.load import ConfigError
from teach_once.runtime.command.help import MACHINE
from teach_once.runtime.machine.resources import RENDEZVOUS, Share
from teach_once.runtime.safe.locks import Job

# Variables common to processes that were started together: `runtime.launch`, torchrun, Slurm.
_NAMES = (RENDEZVOUS, "TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT", "SLURM_JOB_ID")


@dataclass(frozen=True)
class JobOptions:
    """The rank of this process in a job, from a command line or a launcher."""

    panel: ClassVar = MACHINE
    job: Annotated[str, typer.Option(help="name shared by the processes of one job")] = ""
    rank: Annotated[int, typer.Option(min=0, envvar="RANK", help="rank of this process")] = 0
    world_size: Annotated[
        int, typer.Option(min=1, envvar="WORLD_SIZE", help="number of processes")
    ] = 1

    @classmethod
    def of_launcher(cls) -> JobOptions:
        """Return the rank set by a launcher in the environment; otherwise a single process's."""
        return cls("", int(os.environ.get("RANK") or 0), int(os.environ.get("WORLD_SIZE") or 1))


@dataclass(frozen=True)
class WorkerOptions:
    """Resources of a Ray node that each worker needs."""

    panel: ClassVar = MACHINE
    cpus_per_worker: Annotated[
        int, typer.Option(min=1, help="CPUs of each worker of the cluster")
    ] = 1
    gpus_per_worker: Annotated[
        float | None,
        typer.Option(min=0, help="GPUs of each worker; default: 1 if the cluster has any"),
    ] = None


def job_of(name: str, rank: int, world: int) -> Job:
    """Return the job of this process; without a name, the launcher's job. Raises ConfigError."""
    if not name and world > 1:
        name = "-".join(os.environ.get(key, "") for key in _NAMES)
        if not name.strip("-"):
            raise ConfigError("several processes need a common name", fix="add --job NAME")
    if rank >= world:
        raise ConfigError(f"--rank {rank} is not below --world-size {world}")
    return Job(name, rank, world)


def share_of(job: Job) -> Share:
    """Return this process's share of the machine, from LOCAL_RANK and LOCAL_WORLD_SIZE.

    Without them, all ranks are assumed to run on this machine.
    """
    if job.world == 1 or "LOCAL_RANK" in os.environ or "LOCAL_WORLD_SIZE" in os.environ:
        return Share.of_this_process()
    return Share(job.rank, job.world)
