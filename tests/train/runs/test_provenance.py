"""A run's identity contains everything that determines its result, and nothing else."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from teach_once.configs.load import load_teacher
from teach_once.configs.schema import StudentConfig, TeacherConfig
from teach_once.nets.networks.zoo import build
from teach_once.store import CacheError
from teach_once.train.cli.commands import cli
from teach_once.train.runs.study import Study, open_study
from teach_once.train.terms import loss_named
from tests.support.caches.teacher_cache import make_cache
from tests.support.datasets.image_folders import write_image_folder

MakeStudy = Callable[..., Study]


@pytest.fixture
def study_of(
    small_student: Callable[..., StudentConfig], tmp_path: Path
) -> Callable[[TeacherConfig], Study]:
    """The study of a teacher whose cache lies in tmp_path/caches."""

    def make(teacher: TeacherConfig, *student: str) -> Study:
        caches, runs = tmp_path / "caches", tmp_path / "runs"
        return open_study(small_student(*student), teacher, caches_dir=caches, runs_dir=runs)

    return make


@pytest.fixture
def arguments(
    small_teacher: Callable[..., TeacherConfig], student_overrides: list[str], tmp_path: Path
) -> list[str]:
    """Of a command that trains a small student from a cache, into tmp_path/runs."""
    config = small_teacher()
    make_cache(config, tmp_path / "caches")
    small = [
        "teacher.arch=resnet8",
        f"teacher.weights={config.teacher.weights}",
        "dataset.max_per_class=6",
        "views.count=3",
        "taps.attention=null",
        "taps.hint=null",
    ]
    places = ["--caches", str(tmp_path / "caches"), "--runs", str(tmp_path / "runs")]
    return [*places, *student_overrides, *(f"teacher.{override}" for override in small)]


def test_a_cache_that_grows_leaves_runs_what_they_are(
    small_teacher: Callable[..., TeacherConfig], study_of: MakeStudy, tmp_path: Path
) -> None:
    make_cache(small_teacher(), tmp_path / "caches")
    before = study_of(small_teacher())
    make_cache(small_teacher("views.count=5"), tmp_path / "caches")
    after = study_of(small_teacher())
    assert after.num_views == before.num_views == after.cache.num_views == 3
    assert after.run("cd", 0).identity == before.run("cd", 0).identity
    assert study_of(small_teacher(), "num_views=2").num_views == 2


def test_a_cache_with_fewer_views_than_the_teachers_file_asks_for_is_refused(
    small_teacher: Callable[..., TeacherConfig], study_of: MakeStudy, tmp_path: Path
) -> None:
    make_cache(small_teacher(), tmp_path / "caches")
    with pytest.raises(CacheError, match=r"3 views.*\n  fix: make cache-teacher .*views.count=5"):
        study_of(small_teacher("views.count=5"))


OWN_LOSS = """
from teach_once.train.terms import Batch, loss_term

@loss_term(teacher_taps=["logits"])
def own(batch: Batch):
    return {factor} * (batch.logits - batch.teacher["logits"]).square().mean()
"""

OWN_NETWORK = """
from torch import nn

def make(num_classes: int, in_channels: int) -> nn.Module:
    layers = [nn.Conv2d(in_channels, 4, 3), nn.Flatten(), nn.Linear(4 * 36, num_classes){more}]
    return nn.Sequential(*layers)
"""


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of the user's own modules, imported anew by every command."""
    folder = tmp_path / "modules"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield folder
    forget_modules()


def forget_modules() -> None:
    sys.modules.pop("my_losses", None)
    sys.modules.pop("my_networks", None)
    loss_named.cache_clear()


def test_an_edited_loss_is_trained_again_and_the_file_is_named(
    arguments: list[str], modules: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = "methods.own=[{loss: ce}, {loss: my_losses:own}]"
    call = ["student", "digits-resnet8", "--method", "own", *arguments, own]
    (modules / "my_losses.py").write_text(OWN_LOSS.format(factor=1))
    assert cli(call) == 0
    assert cli(call) == 0
    assert "is finished: nothing to do" in capsys.readouterr().out
    (modules / "my_losses.py").write_text(OWN_LOSS.format(factor=0))
    forget_modules()
    assert cli(call) == 0
    told = capsys.readouterr().out
    assert "differs from the last run of own, seed 0:\n  the file of the module my_losses" in told
    assert "epoch   4/4" in told


def test_other_methods_do_not_mind_an_edited_loss(
    arguments: list[str], modules: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = "methods.own=[{loss: ce}, {loss: my_losses:own}]"
    call = ["student", "digits-resnet8", "--method", "ce", *arguments, own]
    for factor in (1, 2):
        (modules / "my_losses.py").write_text(OWN_LOSS.format(factor=factor))
        assert cli(call) == 0
    assert "is finished: nothing to do" in capsys.readouterr().out


def test_an_edited_network_is_another_student(
    arguments: list[str], modules: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arch = ["student.arch=python:my_networks:make", "student.stages=['0']"]
    call = ["student", "digits-resnet8", "--method", "ce", *arguments, *arch]
    for more in ("", ", nn.Identity()"):
        forget_modules()
        (modules / "my_networks.py").write_text(OWN_NETWORK.format(more=more))
        assert cli(call) == 0
    assert "the file of the module my_networks has changed" in capsys.readouterr().out


def test_an_edited_network_of_the_teachers_is_another_cache(
    small_teacher: Callable[..., TeacherConfig], study_of: MakeStudy, modules: Path, tmp_path: Path
) -> None:
    (modules / "my_networks.py").write_text(OWN_NETWORK.format(more=""))
    weights = tmp_path / "own.pt"
    arch = "python:my_networks:make"
    torch.save(build(arch, num_classes=10, in_channels=1).state_dict(), weights)
    own = [f"teacher.arch={arch}", f"teacher.weights={weights}", "taps.stages=['0']"]
    config = small_teacher(*own, "training=null")
    make_cache(config, tmp_path / "caches")
    study_of(config)
    (modules / "my_networks.py").write_text(OWN_NETWORK.format(more=", nn.Identity()"))
    study_of(config)  # this process goes on with the network that it has loaded
    forget_modules()
    with pytest.raises(CacheError, match=r"teacher\.source\.my_networks: expected"):
        study_of(config)


def test_swapped_labels_of_the_test_images_are_another_result(
    student_overrides: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos, weights = write_image_folder(tmp_path / "photos"), tmp_path / "folder.pt"
    torch.save(build("resnet8", num_classes=2, in_channels=3).state_dict(), weights)
    normalization = "{mean: [0.5, 0.5, 0.5], std: [0.2, 0.2, 0.2]}"
    folder = [
        f"dataset={{type: imagefolder, root: {photos}, normalization: {normalization}}}",
        "teacher.arch=resnet8",
        f"teacher.weights={weights}",
        "taps.attention=null",
        "taps.hint=null",
    ]
    make_cache(load_teacher("digits-resnet20", folder), tmp_path / "caches")
    places = ["--caches", str(tmp_path / "caches"), "--runs", str(tmp_path / "runs")]
    call = ["student", "digits-resnet8", "--method", "ce", *places, *student_overrides]
    call += [f"teacher.{override}" for override in folder]
    assert cli(call) == 0
    for name, other in (("cat", "aside"), ("dog", "cat"), ("aside", "dog")):
        (photos / "test" / name).rename(photos / "test" / other)
    assert cli(call) == 0
    assert (
        "the test or validation samples, or their labels, have changed" in capsys.readouterr().out
    )
