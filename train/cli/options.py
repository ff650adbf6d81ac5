"""Options shared by the commands of `python -m train`, each explained once."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from teach_once.runtime.command.help import MACHINE, RUN
from teach_once.runtime.command.options import CacheOrUrl, CacheStorage
from teach_once.runtime.machine.urls import path_or_url
from teach_once.store.read.mirror import local_caches
from teach_once.train.recording.tracking import TRACKERS
from teach_once.train.runs.study import MOST_SEED

Method = Annotated[str, typer.Option(help="one of the config's methods")]
Methods = Annotated[str, typer.Option(help='methods, as in "ce kd"; default: all of the config')]
Seed = Annotated[
    int, typer.Option(min=0, max=MOST_SEED, help="seed of the initial weights and the sample order")
]
Seeds = Annotated[str, typer.Option(help='seeds, as in "0 1 2"')]
Runs = Annotated[Path, typer.Option(help="folder of the runs")]
PlacementOption = Annotated[
    Literal["auto", "device", "host", "window"],
    typer.Option(
        help="where a view's teacher outputs are kept during its epoch",
        rich_help_panel=MACHINE,
    ),
]
Jobs = Annotated[int, typer.Option(min=1, help="number of runs to train in parallel")]
SharedLoading = Annotated[
    bool | None,
    typer.Option(
        "--shared-loading/--no-shared-loading",
        help="train runs with the same seed together, with shared loading of images; default: if "
        "images are read in every epoch",
        show_default=False,
    ),
]
RanksOption = Annotated[
    int, typer.Option(min=1, help="number of processes that train the student together")
]
CpusPerRun = Annotated[int, typer.Option(min=1, help="CPUs of each run on a cluster")]
GpusPerRun = Annotated[
    float | None,
    typer.Option(
        min=0, help="GPUs of each run on a cluster, as in 0.5; default: 1 if it has any GPU"
    ),
]
Retrain = Annotated[
    bool,
    typer.Option(
        help="train finished runs again; the old result stays until the new one is finished"
    ),
]
Logger = Annotated[
    list[str] | None,
    typer.Option(
        "--logger",
        metavar="|".join(TRACKERS),
        help="also send the metrics of each epoch to this tracker; may be repeated",
    ),
]
LiveTeacher = Annotated[
    bool, typer.Option(help="run the teacher in the loop instead of reading the cache")
]
LiveBatchNorm = Annotated[
    bool,
    typer.Option(
        "--live-bn",
        help="run the teacher in the loop with batch norm in training mode, as the original "
        "implementation does; its outputs then depend on the batch and cannot be cached",
    ),
]
CheckpointMinutes = Annotated[
    float, typer.Option(min=0, help="minutes between checkpoints within an epoch")
]
TrainTeacher = Annotated[
    bool,
    typer.Option(
        "--train-teacher",
        help="train even if it takes over ten minutes of processor time",
        rich_help_panel=RUN,
    ),
]
Checkpoint = Annotated[
    Literal["best", "last"], typer.Option(help="export the weights of this epoch")
]
RemoveRuns = Annotated[bool, typer.Option("--remove", help="delete unfinished runs, after asking")]
Superseded = Annotated[
    bool,
    typer.Option(
        "--superseded",
        help="with --remove: also finished runs superseded by a later run of the method and seed "
        "with other settings",
    ),
]
CompleteCaches = Annotated[
    Path | None,
    typer.Option(
        metavar="PATH",
        help="train nothing if a complete cache is in this folder, or at this URL",
        parser=path_or_url,
    ),
]


@dataclass(frozen=True)
class StudyStorage(CacheStorage):
    """Location of the caches, or of one cache, and of the runs of a study."""

    runs: Runs = Path("runs")
    cache: CacheOrUrl = None

    def local(self) -> StudyStorage:
        """Return the storage with local folders; data at URLs is fetched into the mirror."""
        caches, cache = local_caches(self.caches, self.cache, self.mirror, self.mirror_gb)
        return dataclasses.replace(self, caches=caches, cache=cache)
