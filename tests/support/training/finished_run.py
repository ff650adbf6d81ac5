"""A study with a finished and a stopped run, to be copied and damaged."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import NamedTuple

from teach_once.configs.load import load_student, load_teacher
from teach_once.train.engine.epoch_result import EpochResult
from teach_once.train.recording.recorder import Recorder
from teach_once.train.runs.study import Run, Study, open_study
from teach_once.train.sessions.student import train_student
from tests.support.caches.teacher_cache import make_cache

STUDENT = [
    "training.epochs=3",
    "training.batch_size=16",
    "training.schedule.milestones=[2]",
    "methods={ce: [{loss: ce}], cd: [{loss: ce}, {loss: cd}]}",
]


class _Stopped(Exception):
    pass


class Trained(NamedTuple):
    """`ce` is finished, `cd` was stopped in its third epoch."""

    study: Study

    def copy(self, runs_dir: Path) -> Study:
        shutil.copytree(self.study.folder, runs_dir / self.study.config.name)
        return dataclasses.replace(self.study, runs_dir=runs_dir)


def train_both(weights: Path, folder: Path) -> Trained:
    """Fill the cache and train both runs in `folder`."""
    teacher = load_teacher(
        "digits-resnet20",
        [
            "teacher.arch=resnet8",
            f"teacher.weights={weights}",
            "dataset.max_per_class=6",
            "views.count=2",
            "taps.attention=null",
            "taps.hint=null",
        ],
    )
    make_cache(teacher, folder / "caches")
    student = load_student("digits-resnet8", STUDENT)
    places = {"caches_dir": folder / "caches", "runs_dir": folder / "runs"}
    study = open_study(student, teacher, **places)
    train_student(study.run("ce", 0), device="cpu")
    stop_in_third_epoch(study.run("cd", 0))
    return Trained(study)


def stop_in_third_epoch(run: Run) -> None:
    """Train until two steps of the third epoch are saved."""
    epochs: list[EpochResult] = []
    save = Recorder.save

    def stopping(self: Recorder, partial: object) -> None:
        save(self, partial)  # type: ignore[arg-type]
        if len(epochs) == 2 and partial.step == 2:  # type: ignore[attr-defined]
            raise _Stopped

    Recorder.save = stopping  # type: ignore[method-assign]
    try:
        train_student(run, device="cpu", checkpoint_minutes=0, on_epoch=epochs.append)
    except _Stopped:
        pass
    finally:
        Recorder.save = save  # type: ignore[method-assign]
