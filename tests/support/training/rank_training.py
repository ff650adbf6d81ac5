"""Train students in several processes on this machine's CPU, as started by torchrun.

python -m tests.support.training.rank_training FOLDER: trains the runs in FOLDER/study.json and
writes each process's results next to it. All runs are trained one after the other, because starting
the processes takes longest.
"""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from teach_once.configs.load import load_student, load_teacher
from teach_once.runtime.command.frame import end_process
from teach_once.train.engine.epoch_result import EpochResult
from teach_once.train.engine.ranks import ALONE, Ranks, init_process_group
from teach_once.train.runs.study import Study, open_study
from teach_once.train.sessions.student import train_student
from tests.support.programs.processes import Started, start
from tests.support.project import ROOT

SECONDS = 300  # a group that hangs ends then


@dataclass(frozen=True)
class Asked:
    """A study of digits-resnet8 with its overrides, and its runs to train.

    workers: image-reading processes per rank. live: with a live teacher.
    """

    teacher: Sequence[str]
    student: Sequence[str]
    caches: str
    methods: Sequence[str]
    seed: int = 0
    placement: str = "auto"
    workers: int = 0
    live: bool = False


@dataclass(frozen=True)
class Found:
    """The result of a run; errors: (top-1, top-5) of each epoch."""

    sha256: str
    step_losses: list[float]
    losses: list[dict[str, float]]
    errors: list[list[float]]
    weights: dict[str, dict[str, torch.Tensor]]  # by file name


def study_of(asked: Asked, runs: Path) -> Study:
    return open_study(
        load_student("digits-resnet8", list(asked.student)),
        load_teacher("digits-resnet20", list(asked.teacher)),
        caches_dir=Path(asked.caches),
        runs_dir=runs,
        placement=asked.placement,
    )


def trained(asked: Sequence[Asked], folder: Path, ranks: Ranks = ALONE) -> dict[str, Found]:
    """Train each method of each study in `folder`; returns results by the run's folder name.

    Ranks other than 0 have no results of training.
    """
    found = {}
    for study, method in ((each, method) for each in asked for method in each.methods):
        run = study_of(study, folder / "runs").run(method, study.seed, study.live)
        epochs: list[EpochResult] = []
        options = {"num_workers": study.workers, "on_epoch": epochs.append, "ranks": ranks}
        train_student(run, device="cpu", **options)
        if ranks.is_first:
            found[run.folder.name] = Found(
                run.sha256,
                [loss for epoch in epochs for loss in epoch.step_losses],
                [dict(epoch.losses) for epoch in epochs],
                [list(epoch.tested.test.values()) for epoch in epochs if epoch.tested.test],
                {f.name: torch.load(f, weights_only=True) for f in run.folder.glob("*.pt")},
            )
    return found


def train_on_ranks(world: int, asked: Sequence[Asked], folder: Path) -> dict[str, Found]:
    """Train as `trained` in `world` processes."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "study.json").write_text(json.dumps([dataclasses.asdict(each) for each in asked]))
    outcomes = run_ranks(world, ["-m", __name__, str(folder)])
    assert all(code == 0 for code, _ in outcomes), outcomes
    content = torch.load(folder / "found.pt", weights_only=True)
    return {name: Found(**fields) for name, fields in content.items()}


def run_ranks(
    world: int, command: Sequence[str], environment: dict[str, str] | None = None
) -> list[tuple[int, str]]:
    """Run python with these arguments in `world` processes; returns exit statuses and outputs."""
    processes = start_ranks(world, command, environment)
    outputs = [each.communicate(timeout=SECONDS)[0] for each in processes]
    return [(each.returncode, output) for each, output in zip(processes, outputs, strict=True)]


def start_ranks(
    world: int, command: Sequence[str], environment: dict[str, str] | None = None
) -> list[Started] | list[subprocess.Popen[str]]:
    """Start python with these arguments in `world` processes; `-m` avoids importing torch."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
    shared |= {"LOCAL_WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1", **(environment or {})}
    environments = [
        {**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        for rank in range(world)
    ]
    if command[0] == "-m":
        return [start(*command[1:], env=each, merged=True) for each in environments]
    return [
        subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env=each,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for each in environments
    ]


def _main(folder: Path) -> None:
    torch.set_num_threads(1)
    asked = [Asked(**each) for each in json.loads((folder / "study.json").read_text())]
    with init_process_group("cpu") as ranks:
        found = trained(asked, folder, ranks)
        if ranks.is_first:
            content = {name: dataclasses.asdict(each) for name, each in found.items()}
            torch.save(content, folder / "found.pt")


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
    end_process(0)
