"""Paths in configs are resolved, and caches are found by identity alone."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from teach_once.configs.load import ConfigError, load_student, load_teacher
from teach_once.configs.schema import TeacherConfig
from teach_once.precompute.command import cli as precompute
from teach_once.store.command import cli as store
from teach_once.train.cli.commands import cli as train
from tests.support.caches.teacher_cache import make_cache, setup_of
from tests.support.project import ROOT

TEACHER = """
dataset: {type: imagefolder, root: photos, normalization: {mean: [0.5], std: [0.25]}}
views: {augment: {type: pad-crop-flip, pad_px: 1}, count: 1}
teacher: {arch: resnet8, weights: weights/t.pt}
"""
STUDENT = """
teacher: t.yaml
student: {arch: resnet8}
training: {epochs: 1, batch_size: 4, learning_rate: 0.1, schedule: {type: onecycle}}
methods: {ce: [{loss: ce}]}
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder; the two files lie in its folder `mine`."""
    for name, text in (("t.yaml", TEACHER), ("s.yaml", STUDENT)):
        (tmp_path / "mine").mkdir(exist_ok=True)
        (tmp_path / "mine" / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def put(*folders_and_files: str) -> None:
    for name in folders_and_files:
        path = Path(name)
        (path.parent if path.suffix else path).mkdir(parents=True, exist_ok=True)
        if path.suffix:
            path.write_text(TEACHER)


def paths_of(config: TeacherConfig) -> tuple[str, str]:
    return config.dataset.root, config.teacher.weights  # type: ignore[union-attr]


def test_a_relative_path_means_the_folder_of_its_file(here: Path) -> None:
    put("mine/photos", "mine/weights/t.pt", "photos", "weights/t.pt", "t.yaml")
    config = load_student("mine/s.yaml")
    assert config.teacher == "mine/t.yaml"
    assert paths_of(load_teacher(config.teacher)) == ("mine/photos", "mine/weights/t.pt")


def test_what_lies_only_in_the_current_folder_is_found_there(here: Path) -> None:
    put("photos", "weights/t.pt")
    (here / "mine" / "t.yaml").rename("t.yaml")
    assert load_student("mine/s.yaml").teacher == "t.yaml"
    shutil.copy("t.yaml", "mine/t.yaml")
    assert paths_of(load_teacher("mine/t.yaml")) == ("photos", "weights/t.pt")


def test_weights_still_to_be_trained_go_beside_the_file(here: Path) -> None:
    put("photos")
    assert paths_of(load_teacher("mine/t.yaml")) == ("photos", "mine/weights/t.pt")
    assert paths_of(load_teacher(here / "mine" / "t.yaml"))[1] == str(here / "mine/weights/t.pt")


def test_the_projects_own_files_mean_the_current_folder(here: Path) -> None:
    config = load_teacher("cifar10-resnet56")
    assert paths_of(config) == ("data/cifar10", "weights/cifar10-resnet56.pt")


def test_a_path_on_the_command_line_means_the_current_folder(here: Path) -> None:
    put("mine/photos", "mine/other", "mine/o.pt")
    given = ["dataset.root=other", "teacher.weights=o.pt"]
    assert paths_of(load_teacher("mine/t.yaml", given)) == ("other", "o.pt")
    block = 'teacher={"arch":"resnet8","weights":"o.pt"}'
    assert paths_of(load_teacher("mine/t.yaml", [block])) == ("mine/photos", "o.pt")
    assert load_student("mine/s.yaml", ["teacher=other.yaml"]).teacher == "other.yaml"


def test_a_tilde_is_the_home_folder_in_files_and_on_the_command_line(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    home = here / "home"
    monkeypatch.setenv("HOME", str(home))
    put("home/photos", "home/w.pt", "home/mine")
    written = TEACHER.replace("photos", "~/photos").replace("weights/t.pt", "~/w.pt")
    (home / "mine/t.yaml").write_text(written)
    found = (f"{home}/photos", f"{home}/w.pt")
    assert paths_of(load_teacher("home/mine/t.yaml")) == found
    assert paths_of(load_teacher("~/mine/t.yaml")) == found
    overrides = ["dataset.root=~/photos", "teacher.weights=~/w.pt"]
    assert paths_of(load_teacher("mine/t.yaml", overrides)) == found
    (here / "mine/s.yaml").write_text(STUDENT.replace("t.yaml", "~/mine/t.yaml"))
    assert load_student("mine/s.yaml").teacher == f"{home}/mine/t.yaml"
    (home / "caches").mkdir()
    assert store(["list", "--caches=~/caches"]) == 0
    assert f"{home}/caches" in capsys.readouterr().out
    assert not (here / "~").exists()


def test_names_and_urls_are_no_paths(here: Path) -> None:
    (here / "mine" / "digits-resnet20").mkdir()
    text = STUDENT.replace("t.yaml", "digits-resnet20")
    (here / "mine" / "s.yaml").write_text(text)
    assert load_student("mine/s.yaml").teacher == "digits-resnet20"
    name = "torchvision:ResNet18_Weights.IMAGENET1K_V1"
    (here / "mine" / "t.yaml").write_text(TEACHER.replace("weights/t.pt", name))
    put("photos")
    assert paths_of(load_teacher("mine/t.yaml"))[1] == name


def test_what_is_in_neither_folder_is_an_error_that_names_both(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put("mine/weights/t.pt")
    for command, call in ((train, ["teacher"]), (train, ["plan"]), (precompute, [])):
        assert command([*call, "mine/s.yaml" if call == ["plan"] else "mine/t.yaml"]) == 2
        told = capsys.readouterr().err
        assert "dataset.root: mine/photos (or photos in the current folder) not found" in told
    Path("mine/weights/t.pt").unlink()
    (here / "mine" / "t.yaml").unlink()
    with pytest.raises(ConfigError, match=r"teacher: .*mine/t\.yaml \(or t\.yaml in the current"):
        load_student("mine/s.yaml")
    (here / "mine" / "t.yaml").write_text(TEACHER)
    put("photos")
    for command, call in ((train, ["teacher"]), (precompute, [])):
        text = TEACHER.replace("imagefolder, root: photos", "digits")
        (here / "mine" / "t.yaml").write_text(text)
        assert command([*call, "mine/t.yaml"]) == 2
        told = capsys.readouterr().err
        assert "file mine/weights/t.pt (or weights/t.pt in the current fol" in told


# ---- caches


@pytest.fixture
def cached(small_teacher: Callable[..., TeacherConfig], tmp_path: Path) -> list[str]:
    """Arguments of a pass over 60 digits whose cache is there; the first is the config's file."""
    config = small_teacher()
    make_cache(config, tmp_path / "caches")
    overrides = [*config.source.overrides] if config.source else []
    return ["digits-resnet20", "--caches", str(tmp_path / "caches"), *overrides]


def renamed_file(tmp_path: Path) -> str:
    own = ROOT / "configs" / "teacher" / "digits-resnet20.yaml"
    shutil.copy(own, tmp_path / "mine.yaml")
    return str(tmp_path / "mine.yaml")


@pytest.mark.parametrize("what", ["file", "folder"])
def test_a_cache_is_found_under_any_name(
    cached: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    (folder,) = (tmp_path / "caches").iterdir()
    if what == "folder":
        folder = folder.rename(folder.with_name("kept"))
    else:
        cached = [renamed_file(tmp_path), *cached[1:]]
    assert precompute(cached) == 0
    assert f"{folder} is complete: nothing to do." in capsys.readouterr().out
    # Also to grow it,
    assert precompute([*cached, "views.count=4", "--device", "cpu"]) == 0
    assert f"{folder} is complete." in capsys.readouterr().out
    assert list((tmp_path / "caches").iterdir()) == [folder]
    # and to train from it.
    student = ["student", "digits-resnet8", "--method", "kd", "--runs", str(tmp_path / "runs")]
    student += ["--caches", cached[2], *(f"teacher.{each}" for each in cached[3:])]
    student += [
        "training.epochs=1",
        "training.schedule.milestones=[1]",
        f"teacher={cached[0]}",
        "--device",
        "cpu",
    ]
    assert train(student) == 0
    assert f"from {folder} into" in capsys.readouterr().out


def test_of_two_caches_with_one_identity_the_usual_name_wins(
    cached: list[str], small_teacher: Callable[..., TeacherConfig], tmp_path: Path
) -> None:
    (folder,) = (tmp_path / "caches").iterdir()
    shutil.copytree(folder, folder.with_name("a-copy"))
    config = small_teacher()
    setup = setup_of(config, tmp_path / "caches")
    assert setup.path == folder


def test_a_folder_with_the_usual_name_of_another_cache_is_passed_by(
    cached: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder,) = (tmp_path / "caches").iterdir()
    assert precompute([*cached, "views.seed=5", "--device", "cpu"]) == 0
    (other,) = set((tmp_path / "caches").iterdir()) - {folder}
    mine = folder.rename(folder.with_name("mine"))
    other.rename(folder)
    capsys.readouterr()
    assert precompute(cached) == 0
    assert f"{mine} is complete: nothing to do." in capsys.readouterr().out
