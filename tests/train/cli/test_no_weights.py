"""Commands that work with a cache but without its teacher's weights."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import teach_once.commands
import teach_once.train.cli.commands as train
from teach_once.configs.load import load_teacher
from teach_once.nets.networks.zoo import build
from teach_once.nets.weights.files import save_atomically
from teach_once.runtime.machine.torchvision_shim import import_torchvision
from teach_once.store.identity import file_sha256
from tests.support.caches.teacher_cache import make_cache
from tests.support.project import ROOT

Make = Callable[..., int]


@pytest.fixture
def small(teacher_weights: Path, tmp_path: Path) -> list[str]:
    """Overrides for digits-resnet20, whose weights are a file of this test's own."""
    shutil.copy(teacher_weights, tmp_path / "w.pt")
    return [
        "teacher.arch=resnet8",
        f"teacher.weights={tmp_path / 'w.pt'}",
        "dataset.max_per_class=6",
        "views.count=3",
        "taps.attention=null",
        "taps.hint=null",
        "training.epochs=3",
    ]


@pytest.fixture
def make(student_overrides: list[str], tmp_path: Path) -> Make:
    """Runs the command of a make target in this process, and returns its exit status."""

    def run(target: str, teacher: list[str], *settings: str) -> int:
        arguments = [*student_overrides, *(f"teacher.{override}" for override in teacher)]
        if target == "cache-teacher":
            arguments = teacher
        places = [f"CACHES={tmp_path / 'caches'}", "DEVICE=cpu"]
        if target != "cache-teacher":
            places.append(f"RUNS={tmp_path / 'runs'}")
        shown = subprocess.run(
            ["make", "-n", target, *places, *settings, f"ARGS={' '.join(arguments)}"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.replace("\\\n", " ")
        lines = [shlex.split(line) for line in shown.splitlines() if ".venv/bin/python -m" in line]
        (words,) = (each for each in lines if each[2] == "teach_once")
        return teach_once.commands.cli(words[3:])

    return run


@pytest.mark.parametrize("training", ["training.epochs=3", "training=null"])
def test_a_cache_suffices_to_train_a_student(
    small: list[str],
    make: Make,
    training: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make_cache(load_teacher("digits-resnet20", small), tmp_path / "caches")
    (tmp_path / "w.pt").unlink()
    (teacher,) = (tmp_path / "caches").iterdir()
    assert make("train-student", [*small, training], "METHOD=kd") == 0
    told = capsys.readouterr().out
    assert "teacher  " not in told  # the plan repeats nothing
    assert f"w.pt not found, and not needed: {teacher} is complete" in told
    assert f"{teacher} is complete: nothing to do" in told
    assert "kd, seed 0: " in told
    assert not (tmp_path / "w.pt").exists()


@pytest.mark.parametrize("misspelled", ["better-teacher.tp", "bettr-teacher.pt", "folder"])
@pytest.mark.parametrize("target", ["cache-teacher", "train-student"])
def test_a_misspelled_path_beside_other_weights_does_not_use_the_cache_at_hand(
    small: list[str],
    make: Make,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    misspelled: str,
    target: str,
) -> None:
    make_cache(load_teacher("digits-resnet20", small), tmp_path / "caches")
    (tmp_path / "weights").mkdir()
    meant = tmp_path / "weights" / "better-teacher.pt"
    save_atomically(build("resnet8", num_classes=10, in_channels=1, seed=5).state_dict(), meant)
    wrong = (
        tmp_path / "wieghts" / meant.name if misspelled == "folder" else meant.parent / misspelled
    )
    other = [*small[:1], f"teacher.weights={wrong}", *small[2:], "training=null"]
    assert make(target, other, *(["METHOD=kd"] if target == "train-student" else [])) == 2
    told = capsys.readouterr().err
    assert f"file {wrong} not found; {meant} exists, but the cache" in told
    assert f"fix: set teacher.weights={meant}" in told
    shutil.copy(tmp_path / "w.pt", meant)  # now those of the cache
    assert make(target, other, *(["METHOD=kd"] if target == "train-student" else [])) == 0


def test_with_a_cache_named_by_its_path_nothing_else_is_looked_for(
    small: list[str], make: Make, tmp_path: Path
) -> None:
    cache = make_cache(load_teacher("digits-resnet20", small), tmp_path / "elsewhere")
    (tmp_path / "w.pt").unlink()
    assert make("train-student", small, "METHOD=kd", f"CACHE={cache.path}") == 0
    assert not (tmp_path / "caches").exists()
    assert not (tmp_path / "w.pt").exists()


def test_where_the_cache_lacks_something_the_weights_are_asked_for(
    small: list[str], make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_cache(load_teacher("digits-resnet20", small), tmp_path / "caches")
    (tmp_path / "w.pt").unlink()
    for more in ("views.count=5", "taps.attention=float16", "views.seed=1"):
        assert make("cache-teacher", [*small, "training=null", more]) == 2
        assert f"teacher.weights: file {tmp_path / 'w.pt'} not found" in capsys.readouterr().err
    assert make("cache-teacher", [*small, "taps.attention=float16"]) == 0  # trained as it says
    assert (tmp_path / "w.pt").is_file()


def test_caches_of_several_weights_are_not_chosen_between(
    small: list[str], make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_teacher("digits-resnet20", small)
    first = make_cache(config, tmp_path / "caches")
    state = torch.load(tmp_path / "w.pt", weights_only=True)
    torch.save({**state, "fc.bias": state["fc.bias"] + 1}, tmp_path / "w.pt")
    make_cache(config, tmp_path / "caches")
    (tmp_path / "w.pt").unlink()
    assert make("cache-teacher", small) == 2
    assert "several caches fit" in capsys.readouterr().err
    assert make("train-student", small, "METHOD=kd", f"CACHE={first.path}") == 0


# ---- torchvision's weights


class Downloads:
    """torchvision's weights in a folder of this test's own, and no network."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import_torchvision()
        self.folder, self.count = folder / "checkpoints", 0
        self.folder.mkdir(parents=True)
        self.name = ""
        monkeypatch.setattr("torch.hub.get_dir", lambda: str(folder))
        monkeypatch.setattr("torch.hub.download_url_to_file", self.fail)
        monkeypatch.setattr("torchvision.models.get_weight", self.weights)

    def weights(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(url=f"https://download.pytorch.org/models/{self.name}")

    def fail(self, *args: object, **kwargs: object) -> None:
        self.count += 1
        raise OSError("no network")


def test_weights_that_torchvision_names_are_downloaded_by_a_pass_alone(
    small: list[str],
    make: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    downloads = Downloads(tmp_path / "hub", monkeypatch)
    downloads.name = f"resnet8-{file_sha256(tmp_path / 'w.pt')[:8]}.pth"
    (tmp_path / "w.pt").rename(downloads.folder / downloads.name)
    named = [*small, "teacher.weights=torchvision:Small_Weights.V1"]
    file = downloads.folder / downloads.name
    config = load_teacher("digits-resnet20", [*small, f"teacher.weights={file}"])
    make_cache(config, tmp_path / "caches")
    assert make("train-student", named, "METHOD=kd") == 0  # the file is there
    file.unlink()
    shutil.rmtree(tmp_path / "runs")
    assert make("train-student", named, "METHOD=kd") == 0
    assert downloads.count == 0
    downloads.name = "resnet8-01234567.pth"  # other weights by the same name
    capsys.readouterr()
    assert (
        train.cli(
            [
                "student",
                "digits-resnet8",
                "--caches",
                str(tmp_path / "caches"),
                *(f"teacher.{o}" for o in named),
            ]
        )
        == 2
    )
    assert "teacher.weights_sha256: expected '01234567', found" in capsys.readouterr().err
    assert downloads.count == 0
    assert make("cache-teacher", named) == 2
    assert "cannot be downloaded: no network" in capsys.readouterr().err
    assert downloads.count == 1
