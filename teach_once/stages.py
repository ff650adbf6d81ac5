"""Build what a student or a cache lacks, in order: the teachers' weights, then their caches.

One process does all the work and loads torch only for what is missing. With several processes per
network (`--nproc`), each stage with work is launched separately: this process starts `nproc` ranks
of the same command line with `--stage` and waits for them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console

from teach_once.configs.load import load_teacher
from teach_once.precompute.command import CacheRequest, fill_caches, open_fillers
from teach_once.precompute.job import JobOptions, WorkerOptions
from teach_once.runtime.command.help import RUN
from teach_once.runtime.command.options import CacheStorage, Compute
from teach_once.runtime.command.program import PROJECT
from teach_once.runtime.errors import UserError
from teach_once.runtime.launch import launch
from teach_once.runtime.machine.resources import num_ranks
from teach_once.store.read.mirror import local_folder
from teach_once.train.cli.options import TrainTeacher
from teach_once.train.cli.student import console_of, joined
from teach_once.train.recording.options import Recording
from teach_once.train.sessions.missing_weights import train_missing_weights

if TYPE_CHECKING:
    from teach_once.precompute.filling import CacheFiller

Stage = Literal["weights", "cache", "student"]
Stages = dict[Stage, Callable[[], None]]


@dataclass(frozen=True)
class TeacherOptions(WorkerOptions):
    """Options for building teachers, and the number of processes or workers."""

    full_check: Annotated[
        bool, typer.Option(help="check every byte of a large cache too", rich_help_panel=RUN)
    ] = False
    train_teacher: TrainTeacher = False
    nproc: Annotated[
        int,
        typer.Option(
            min=1, max=4096, help="processes that train a network together, and run the teacher"
        ),
    ] = 1
    stage: Annotated[
        Stage | None, typer.Option(hidden=True, help="run this stage only, as a rank of --nproc")
    ] = None


@dataclass(frozen=True)
class Teachers:
    """The teachers whose weights and caches are needed, and how they are built.

    named: name and overrides of each. cluster: address of a Ray cluster that runs the teachers.
    """

    named: Sequence[tuple[str, list[str]]]
    storage: CacheStorage
    compute: Compute
    options: TeacherOptions
    cluster: str | None = None

    def stages(self, console: Console) -> Stages:
        """Return the stages that build them, in order."""
        return {"weights": self.make_weights, "cache": lambda: self.make_caches(console)}

    def make_weights(self) -> None:
        """Train the missing weights; every rank calls it. Raises as `train_teacher` does."""
        storage, compute = self.storage, self.compute
        with joined(compute.device) as ranks:
            folder = local_folder(storage.caches, storage.mirror, storage.mirror_gb)
            recording = Recording(console=console_of(ranks))
            agreed = self.options.train_teacher
            for name, changes in self.named:
                config = load_teacher(name, changes)
                train_missing_weights(
                    config, folder, compute, recording, retrain=False, agreed=agreed, ranks=ranks
                )

    def make_caches(self, console: Console) -> None:
        """Fill the incomplete caches; every rank calls it. Raises as `fill_caches` does."""
        fill_caches(self.named, self._request(), console)

    def open_fillers(self, console: Console) -> list[CacheFiller]:
        """Prepare the caches to be filled while a student trains. Raises as `fill_caches` does."""
        return open_fillers(self.named, self._request(), console)

    def _request(self) -> CacheRequest:
        return CacheRequest(
            self.storage,
            self.compute,
            full_check=self.options.full_check,
            job=JobOptions.of_launcher(),
            cluster=self.cluster,
            workers=self.options,
        )


def run_stages(stages: Stages, options: TeacherOptions) -> None:
    """Run stages in order: in this process, or each in `nproc` processes.

    Raises errors of the stages, and typer.Exit with the status of the first process that failed.
    """
    if options.stage is not None:
        stages[options.stage]()
        return
    if num_ranks() > 1:
        raise UserError(
            "this command runs several stages and starts their processes itself",
            fix="run it once with --nproc N; or start `train teacher`, `precompute` and `train "
            "student` under torchrun",
        )
    for stage, run in stages.items():
        if options.nproc == 1:
            run()
        elif status := launch(options.nproc, _command(stage), {"PYTHONPATH": str(PROJECT)}):
            raise typer.Exit(status)


def _command(stage: Stage) -> list[str]:
    """Return this process's command line for one stage. -P: files of the folder hide no module."""
    name, *words = sys.argv[1:]
    return [sys.executable, "-P", "-m", "teach_once", name, "--stage", stage, *words]
