"""The student's maps are read at the teacher's taps; batches of one sample."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from teach_once.configs.schema import TeacherConfig
from teach_once.nets.networks.zoo import build
from teach_once.nets.teacher.taps import Tap, channel_means
from teach_once.nets.teacher.teacher import Teacher
from teach_once.nets.weights.files import save_atomically
from teach_once.runtime.command.options import Compute
from teach_once.train.engine.epoch_result import EpochResult
from teach_once.train.errors import TrainError
from teach_once.train.recording.options import Recording
from teach_once.train.runs.study import Study
from teach_once.train.sessions.student import train_student
from teach_once.train.sessions.teacher import train_teacher
from teach_once.train.sessions.trial import try_run
from tests.support.caches.teacher_cache import CPU
from tests.support.own_network import ONE_PIXEL

MakeStudy = Callable[..., Study]
IN_PLACE = "python:tests.support.own_network:InPlace"
STAGES = "stages=[first,second,third]"


@pytest.mark.filterwarnings("ignore")  # torch's compiler has its own
@pytest.mark.parametrize("compiled", ["false", "true"])
def test_a_copy_of_the_teacher_has_its_means_and_attentions_whatever_follows_in_place(
    make_study: MakeStudy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiled: str
) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    copied = build(IN_PLACE, num_classes=10, in_channels=1, seed=0)
    save_atomically(copied.state_dict(), tmp_path / "t.pt")
    taps = ("taps.channel_means=float32", "taps.attention=float32", f"taps.{STAGES}")
    study = make_study(
        teacher=[*taps, f"teacher.arch={IN_PLACE}", f"teacher.weights={tmp_path / 't.pt'}"],
        student=[
            f"student.arch={IN_PLACE}",
            f"student.{STAGES}",
            "student.connector=none",
            "training.learning_rate=1e-12",
            f"training.compile={compiled}",
            "methods.both=[{loss: ce}, {loss: cd}, {loss: at}]",
        ],
    )
    epochs: list[EpochResult] = []
    train_student(study.run("both", 0), device="cpu", on_epoch=epochs.append)
    assert max(epoch.losses["cd"] for epoch in epochs) < 1e-9
    assert max(epoch.losses["at"] for epoch in epochs) < 1e-9


def test_a_teachers_means_and_hint_are_of_the_same_moment() -> None:
    network = build(IN_PLACE, num_classes=10, in_channels=1, seed=0).eval()
    teacher = Teacher(network, {"stage1": "first"}, "float32", CPU)
    images = torch.randn(2, 1, 8, 8)
    taps = [Tap("stage", "stage1"), Tap("hint", "stage1")]
    found = teacher.outputs(images, torch.zeros(2, dtype=torch.int64), taps)
    assert torch.equal(channel_means(found["hint"]), found["stage1"])
    assert found["hint"].min() < 0


# 60 samples in batches of 59: the last one of an epoch is one sample.
LONE = ("training.batch_size=59", "training.epochs=2")


@pytest.mark.parametrize("method", ["ce", "cd"])
def test_a_lone_last_sample_that_batch_norm_cannot_take_is_refused_before_training(
    make_study: MakeStudy, method: str
) -> None:
    study = make_study(student=[*ONE_PIXEL, *LONE])
    epochs: list[EpochResult] = []
    told = r"batch_size is 59, .*a single sample of 60.*\n  fix: set training\.batch_size=60"
    with pytest.raises(TrainError, match=told):
        train_student(study.run(method, 0), device="cpu", on_epoch=epochs.append)
    assert epochs == []
    with pytest.raises(TrainError, match=told):
        try_run(study.run(method, 0), CPU)
    better = make_study(student=[*ONE_PIXEL, *LONE, "training.batch_size=60"])
    assert train_student(better.run("ce", 0), device="cpu")["epochs"] == 2


def test_a_lone_last_sample_is_trained_with_where_batch_norm_can(make_study: MakeStudy) -> None:
    study = make_study(student=LONE)
    assert train_student(study.run("cd", 0), device="cpu")["epochs"] == 2


def test_a_lone_last_sample_is_refused_for_teachers_too(
    small_teacher: Callable[..., TeacherConfig], tmp_path: Path, console
) -> None:
    config = small_teacher(
        "teacher.arch=python:tests.support.own_network:OnePixel",
        f"teacher.weights={tmp_path / 'w.pt'}",
        "training.batch_size=59",
        "training.max_per_class=6",
        "training.epochs=2",
    )
    with pytest.raises(TrainError, match=r"\n  fix: set training\.batch_size=60"):
        train_teacher(config, Compute("cpu"), Recording(console=console))
