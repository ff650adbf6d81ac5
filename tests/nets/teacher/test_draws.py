"""A network's random draws (dropout, stochastic depth) depend only on seed, epoch and step."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from teach_once.configs.schema import TeacherConfig
from teach_once.nets.teacher.draws import seeded
from teach_once.runtime.command.options import Compute
from teach_once.train.engine.epoch_result import EpochResult
from teach_once.train.recording.checkpoint import Partial
from teach_once.train.recording.options import Recording
from teach_once.train.recording.recorder import Recorder
from teach_once.train.runs.study import Study
from teach_once.train.sessions.student import train_student
from teach_once.train.sessions.teacher import train_teacher
from teach_once.train.sessions.trial import try_run
from tests.support.own_network import DROPPING, Dropping

MakeStudy = Callable[..., Study]


class Killed(Exception):
    pass


def losses_of(study: Study, seed: int = 0) -> list[list[float]]:
    """By epoch, of each step; the run is made anew, with torch's generator in another state."""
    shutil.rmtree(study.folder, ignore_errors=True)
    torch.rand(3)
    epochs: list[EpochResult] = []
    train_student(study.run("cd+gkd", seed), device="cpu", on_epoch=epochs.append)
    return [epoch.step_losses for epoch in epochs]


def metrics_of(folder: Path) -> list[float]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def killed_after_steps(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    left, keep = [steps], Recorder.save

    def kept_then_killed(self: Recorder, partial: Partial) -> None:
        keep(self, partial)
        left[0] -= 1
        if left[0] == 0:
            raise Killed

    monkeypatch.setattr(Recorder, "save", kept_then_killed)


def test_the_same_run_twice_has_the_same_losses(make_study: MakeStudy) -> None:
    study = make_study(student=DROPPING)
    first, again, other = losses_of(study), losses_of(study), losses_of(study, seed=1)
    assert first == again
    assert first != other


def test_every_step_of_every_epoch_draws_something_else(
    make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[float] = []
    forward = Dropping.forward

    def noted(self: Dropping, images: torch.Tensor) -> torch.Tensor:
        if self.training:
            drawn.append(torch.rand(()).item())
        return forward(self, images)

    monkeypatch.setattr(Dropping, "forward", noted)
    losses = losses_of(make_study(student=[*DROPPING, "training.epochs=2"]))
    assert sum(map(len, losses)) == 8
    assert len(set(drawn[-8:])) == 8


def test_a_resumed_run_draws_what_an_uninterrupted_one_does(
    make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = make_study(student=DROPPING)
    with monkeypatch.context() as patched:
        killed_after_steps(patched, 7)
        with pytest.raises(Killed):
            train_student(study.run("cd+gkd", 0), checkpoint_minutes=0)
    torch.rand(3)
    train_student(study.run("cd+gkd", 0))
    folder = study.run("cd+gkd", 0).folder
    resumed = torch.load(folder / "last.pt", weights_only=True)
    losses = metrics_of(folder)
    losses_of(study)
    whole = torch.load(folder / "last.pt", weights_only=True)
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    assert losses == metrics_of(folder)


def test_a_teacher_is_trained_to_the_same_weights(
    small_teacher: Callable[..., TeacherConfig], tmp_path: Path, console
) -> None:
    weights = []
    for name in ("first", "again"):
        torch.rand(3)
        config = small_teacher(
            "teacher.arch=python:tests.support.own_network:Dropping",
            f"teacher.weights={tmp_path / name}.pt",
            "training.epochs=2",
            "training.max_per_class=10",
        )
        train_teacher(config, Compute("cpu"), Recording(console=console))
        weights.append(torch.load(tmp_path / f"{name}.pt", weights_only=True))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_neither_runs_nor_trials_move_the_global_generator(make_study: MakeStudy) -> None:
    study = make_study(student=DROPPING)
    before = torch.random.get_rng_state()
    train_student(study.run("cd+gkd", 0), device="cpu")
    try_run(study.run("cd+gkd", 1), torch.device("cpu"))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_generator_is_as_before_also_after_an_error() -> None:
    before = torch.random.get_rng_state()
    with pytest.raises(Killed), seeded(2**64 - 1):
        raise Killed
    assert torch.equal(torch.random.get_rng_state(), before)
