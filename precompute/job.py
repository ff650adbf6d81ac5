"""Which processes share one pass: the job's name, this one's rank, its share of the machine."""

from __future__ import annotations

import os

from configs.load import ConfigError
from runtime.limits import RENDEZVOUS, Share
from runtime.locks import Job

# What processes that were started together have in common: `runtime.launch`, torchrun, Slurm.
_NAMES = (RENDEZVOUS, "TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT", "SLURM_JOB_ID")


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
