"""Connectors end in ReLU, or without it if the teacher's outputs can be negative."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from torch import nn

from teach_once.configs.schema import StudentConfig, TeacherConfig
from teach_once.store import TeacherCache
from teach_once.train.cli.commands import cli
from teach_once.train.engine.epoch_result import EpochResult
from teach_once.train.errors import TrainError
from teach_once.train.method.connector_ends import statistics
from teach_once.train.method.connectors import Connectors
from teach_once.train.runs.check_methods import check_methods
from teach_once.train.runs.study import Study, open_study
from teach_once.train.sessions.student import open_context, train_student
from tests.support.caches.teacher_cache import CPU, make_cache
from tests.support.training.training_runs import largest_relative

# The second of three stages ends in a batch norm, as the stages of EfficientNet do.
STAGES = {"relu": "[layer1, layer2, layer3]", "signed": "[layer1, layer2.0.bn2, layer3]"}
RELU = "student.connector=conv-bn-relu"
OpenStudy = Callable[..., Study]


@pytest.fixture(scope="module")
def teachers(
    small_teacher: Callable[..., TeacherConfig], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, TeacherConfig]]:
    """A folder of caches and the teachers whose they are, by what their second stage is."""
    folder, float32 = tmp_path_factory.mktemp("caches"), ["taps.channel_means=float32"]
    float32 += ["taps.logits=float32", "taps.hint={stage: stage2, dtype: float32}"]
    settings = {name: [*float32, f"taps.stages={stages}"] for name, stages in STAGES.items()}
    configs = {name: small_teacher(*of_one) for name, of_one in settings.items()}
    for config in configs.values():
        make_cache(config, folder)
    return folder, configs


@pytest.fixture
def open_small(
    teachers: tuple[Path, dict[str, TeacherConfig]],
    small_student: Callable[..., StudentConfig],
    tmp_path: Path,
) -> OpenStudy:
    """Opens the study of one of these teachers; overrides for the student."""
    folder, configs = teachers

    def opened(kind: str, *student: str) -> Study:
        config = small_student("training.epochs=2", *student)
        return open_study(config, configs[kind], caches_dir=folder, runs_dir=tmp_path)

    return opened


def connectors_of(study: Study, method: str = "cd") -> Connectors:
    context = open_context(study.run(method, 0), CPU)
    context.teacher.close()
    assert context.train_state.connectors is not None
    return context.train_state.connectors


def ends_in_relu(connectors: Connectors) -> list[bool]:
    return [isinstance(connect[-1], nn.ReLU) for connect in connectors.stages.values()]


def test_connectors_to_signed_means_end_without_relu_stage_by_stage(open_small: OpenStudy) -> None:
    assert ends_in_relu(connectors_of(open_small("relu"))) == [True] * 3
    assert ends_in_relu(connectors_of(open_small("signed"))) == [True, False, True]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["student.connector=conv-bn"], [False] * 3),
        ([RELU, "student.relu_to_signed=true"], [True] * 3),
    ],
)
def test_both_ends_can_be_chosen(
    open_small: OpenStudy, settings: list[str], expected: list[bool]
) -> None:
    study = open_small("signed", *settings)
    assert ends_in_relu(connectors_of(study)) == expected


def test_the_regressor_of_a_signed_hint_ends_without_relu(open_small: OpenStudy) -> None:
    methods = ["methods={fitnets: [{loss: ce}, {loss: fitnets}]}"]
    for kind, expected in (("relu", True), ("signed", False)):
        study = open_small(kind, *methods)
        regressor = connectors_of(study, "fitnets").regressor
        assert isinstance(regressor, nn.Sequential)
        assert isinstance(regressor[-1], nn.ReLU) == expected
        linear = study.run("fitnets", 0).identity["student"]["linear_connectors"]
        assert linear == ([] if expected else ["hint"])


def test_a_run_s_identity_holds_the_layers_that_were_chosen_and_not_the_key(
    open_small: OpenStudy,
) -> None:
    today = {
        "arch": "resnet8",
        "stem": "cifar",
        "connector": "conv-bn-relu",
        "stages": None,
        "options": {},
        "init": None,
        "thinner": None,
        "linear_connectors": [],
    }
    assert open_small("relu").run("cd", 0).identity["student"] == today
    signed = open_small("signed")
    of_method = {method: signed.run(method, 0).identity["student"] for method in ("kd", "cd")}
    assert of_method == {"kd": today, "cd": {**today, "linear_connectors": ["stage2"]}}
    assert signed.run("cd", 0, live_teacher=True).identity["student"] == of_method["cd"]
    relu = dataclasses.replace(signed, config=_with(signed, connector="conv-bn-relu"))
    assert relu.run("cd", 0).identity["student"] == today
    asked = dataclasses.replace(
        signed, config=_with(signed, connector="conv-bn-relu", relu_to_signed=True)
    )
    assert asked.run("cd", 0).identity["student"] == today
    linear = dataclasses.replace(signed, config=_with(signed, connector="conv-bn"))
    names = linear.run("cd", 0).identity["student"]["linear_connectors"]
    assert names == ["stage1", "stage2", "stage3"]


def _with(study: Study, **settings: object) -> StudentConfig:
    net = dataclasses.replace(study.config.student, **settings)
    return dataclasses.replace(study.config, student=net)


def test_a_cached_run_with_linear_connectors_equals_a_live_one_and_says_so_once(
    open_small: OpenStudy,
) -> None:
    study = open_small("signed")
    console, losses = Console(file=io.StringIO(), width=200), []
    for live in (False, True):
        epochs: list[EpochResult] = []
        run = study.run("cd", 0, live_teacher=live)
        train_student(run, device="cpu", on_epoch=epochs.append, console=console)
        losses.append([loss for epoch in epochs for loss in epoch.step_losses])
    assert largest_relative(*losses) < 1e-5
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue().count("connectors without ReLU: stage2") == 1


def test_normalized_cd_divides_by_the_mean_squares_of_the_cache_s_first_block(
    open_small: OpenStudy,
) -> None:
    methods = "methods={plain: [{loss: cd}], cd: [{loss: ce}, {loss: cd, normalize: true}]}"
    study, stages = open_small("signed", methods), ["stage1", "stage2", "stage3"]
    first_block = study.cache.read(range(16), 0, stages)
    expected = [np.square(first_block[stage].astype(np.float64)).mean() for stage in stages]
    context = open_context(study.run("cd", 0), CPU)
    context.teacher.close()
    assert context.train_state.mean_squares == pytest.approx(expected, rel=1e-12)
    found = {}
    for method, live in (("cd", False), ("cd", True), ("plain", False)):
        epochs: list[EpochResult] = []
        train_student(study.run(method, 0, live), device="cpu", on_epoch=epochs.append)
        found[method, live] = [loss for epoch in epochs for loss in epoch.step_losses]
    assert largest_relative(found["cd", True], found["cd", False]) < 1e-5
    assert found["cd", False] != found["plain", False]


def test_relu_to_signed_means_is_refused_unless_asked_for(
    open_small: OpenStudy, capsys: pytest.CaptureFixture[str]
) -> None:
    study = open_small("signed", RELU)
    check_methods(study, ["ce", "kd"])
    with pytest.raises(TrainError, match=r"methods\.cd: .*the teacher's stage2 have negative"):
        check_methods(study, ["ce", "cd"])
    words = ["check", "digits-resnet8", "--methods", "cd", "--caches", str(study.cache.path.parent)]
    teacher = [f"teacher.{each}" for each in (study.teacher.source.overrides)]
    assert cli([*words, *teacher, RELU]) == 2
    assert "fix: set student.connector=auto" in " ".join(capsys.readouterr().err.split())
    assert cli([*words, *teacher, RELU, "student.relu_to_signed=true"]) == 0
    assert cli([*words, *teacher]) == 0


def test_the_first_committed_block_decides_and_rounding_errors_do_not(
    small_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lowest = {0.0: False, -1e-7: False, -1e-5: True}
    for value, expected in lowest.items():
        cache = TeacherCache.open(small_cache)
        records = {"stage1": np.array([[3.0, value]], np.float32)}
        monkeypatch.setattr(TeacherCache, "read_first_block", lambda *_, found=records: found)
        (found,) = statistics(cache, ["stage1"]).values()
        assert found.is_signed == expected
        assert found.mean_square == pytest.approx(4.5)
