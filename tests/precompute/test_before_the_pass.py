"""Mistakes that can be detected before the teacher runs are reported before it runs."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import teach_once.precompute.command
from teach_once.configs.schema import StudentConfig, TeacherConfig
from teach_once.nets.networks.archs import ArchError
from teach_once.nets.networks.layout import size_like
from teach_once.nets.networks.zoo import build
from teach_once.nets.teacher.taps import TapError
from teach_once.nets.weights.files import save_atomically
from teach_once.train.cli.commands import cli
from teach_once.train.method.connectors import StageMismatch
from teach_once.train.runs.check_methods import check_without_cache
from teach_once.train.runs.study import Study, open_study
from teach_once.train.sessions.student import train_student
from tests.support.caches.teacher_cache import make_cache
from tests.support.datasets.image_folders import write_image_folder
from tests.support.project import ROOT

OWN = "python:tests.support.own_network"
MakeStudy = Callable[..., Study]


@pytest.fixture
def nothing_there(tmp_path: Path) -> list[str]:
    """Arguments of a study whose teacher has not even been trained."""
    caches, runs = str(tmp_path / "caches"), str(tmp_path / "runs")
    weights = f"teacher.teacher.weights={tmp_path / 'gone.pt'}"
    return ["--caches", caches, "--runs", runs, "--device", "cpu", weights]


def test_the_plan_refuses_a_batch_that_is_too_small_for_all_processes(
    nothing_there: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    plan = ["plan", "digits-resnet8", *nothing_there, "teacher.dataset.max_per_class=6"]
    assert cli([*plan, "--ranks", "5", "training.batch_size=8"]) == 2
    error = capsys.readouterr().err
    assert "has a batch without a sample for each of 5 processes" in error
    assert "training.batch_size=9, or use fewer processes" in error
    assert cli([*plan, "--ranks", "4", "training.batch_size=8"]) == 0
    assert "60 samples x 40 epochs through resnet8, by 4 processes" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("mistake", "told"),
    [
        (["--seeds", "a"], 'expected whole numbers, as in "0 1 2"'),
        (["--seeds", "²"], 'expected whole numbers, as in "0 1 2"'),
        (["--seeds", "18446744073709551616"], "is too large"),
        (["--placement", "foo"], "'foo' is not one of"),
        (["--methods", "kdd"], "unknown method 'kdd'"),
        (["--device", "cuda:77"], "device 'cuda:77' is not available"),
        (["--device", "gpu"], "device 'gpu' is unknown"),
        (["student.stages=[layer1, layer2, layer9]"], "student.stages: the network has no module"),
        (["student.stages=[layer1]"], "the student has 1 stages and the cache 3"),
        (["student.arch=vgg11_bn"], "exists only with stem: imagenet"),
        ([f"student.arch={OWN}:nothing"], "cannot be loaded"),
        ([f"student.arch={OWN}:without_arguments"], "cannot be built"),
        ([f"student.arch={OWN}:wide_kernel"], "cannot process images of 8x8"),
        (["student.connector=none"], "student.connector is none"),
        (
            ["--methods", "at", "teacher.taps.attention=null"],
            "methods.at needs the taps attention1",
        ),
        (["methods.ce.0.start_epoch=41"], "this term would never be active"),
        (["teacher.taps.stages=[layer1, layer9]"], "taps.stages: the network has no module"),
        (["teacher.taps.stages=[layer1, fc]", "teacher.taps.hint=null", "--methods", "ce"],
         "taps.stages: the output of the module 'fc' is of shape (10,) for an image, not a map"),
        (["methods.own=[{loss: 'tests.support.own_losses:sharper', options: {sharpnes: 2}}]"],
         "methods.own.0: the loss 'tests.support.own_losses:sharper' has no option 'sharpnes'; "
         "did you mean 'sharpness'?"),
        (["methods.own=[{loss: 'tests.support.own_losses:needs_margin'}]"],
         "methods.own.0: the loss 'tests.support.own_losses:needs_margin' has no default for"),
        (["teacher.taps.hint.stage=stage4"], "taps.hint.stage: stage4 is not one of"),
        ([f"teacher.teacher.arch={OWN}:wide_kernel",
          "teacher.taps.stages=[body]", "teacher.taps.hint=null", "--methods", "ce"],
         "teacher.arch: "),
    ],
)  # fmt: skip
def test_check_finds_it_without_weights_or_cache(
    nothing_there: list[str], mistake: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if mistake[0].startswith("student.connector"):
        mistake = [*mistake, "student.arch=resnet8x4"]
    assert cli(["check", "digits-resnet8", *nothing_there, *mistake]) == 2
    error = capsys.readouterr().err
    assert told in " ".join(error.replace("│", " ").split())
    assert "Traceback" not in error


def test_a_teacher_whose_taps_cannot_be_read_is_not_trained_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call = ["teacher", "digits-resnet20", f"teacher.weights={tmp_path / 'w.pt'}"]
    assert cli([*call, "training.epochs=1", "taps.stages=[layer1, layer9]"]) == 2
    assert "taps.hint.stage" not in (told := capsys.readouterr().err)
    assert "taps.stages: the network has no module 'layer9'" in told
    assert not list(tmp_path.iterdir())


def test_a_study_without_mistakes_passes(
    nothing_there: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli(["check", "digits-resnet8", *nothing_there, "--methods", "ce kd"]) == 0
    assert capsys.readouterr().out == (
        "digits-resnet8 is valid: ce, kd with seed 0\n"
        "checked: device, images, networks, taps and losses; the cache does not exist yet\n"
    )


def test_plan_finds_it_too(nothing_there: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    call = ["plan", "digits-resnet8", "--no-trial", *nothing_there]
    assert cli([*call, "student.stages=[layer1, layer9, layer2]"]) == 2
    assert "student.stages: the network has no module 'layer9'" in capsys.readouterr().err


def test_logits_alone_ask_for_no_stages(make_study: MakeStudy) -> None:
    own = f"student.arch={OWN}:make"
    study = make_study(student=[own])
    assert train_student(study.run("kd", 0), device="cpu")["epochs"] == 4
    with pytest.raises(TapError, match=r"list its modules in student\.stages"):
        train_student(study.run("cd", 0), device="cpu")
    check_without_cache(study.config, study.teacher, ["ce", "kd"])


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["make", "-n", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    ("given", "named"),
    [("EPOCHS=3", "EPOCHS"), ("student=digits-resnet8", "student"), ("ARG=a=1 b=2", "ARG")],
)
def test_make_refuses_variables_that_it_does_not_know(given: str, named: str) -> None:
    result = make("cache-teacher", given)
    assert result.returncode == 2
    assert f"unknown variable {named}: make help-all lists all" in result.stderr


def test_make_takes_every_variable_that_it_shows() -> None:
    spaced = ["ARGS=a.b=1 c=[1,2]", "TEACHER=my photos.yaml"]
    result = make("cache-teacher", *spaced, "WORKERS=2", "CACHES=/a b", "FULL_CHECK=1")
    assert result.returncode == 0, result.stderr
    assert "cache-teacher 'my photos.yaml' --caches '/a b'" in result.stdout
    assert "--args='a.b=1 c=[1,2]'" in result.stdout


@pytest.mark.parametrize(
    ("given", "option"),
    [
        ("SHARED_LOADING=1", "--shared-loading"),
        ("SHARED_LOADING=0", "--no-shared-loading"),
        ("SHARED_LOADING=", ""),
    ],
)
def test_make_says_whether_runs_share_a_reading(given: str, option: str) -> None:
    command = next(
        line
        for line in make("ablation", given).stdout.splitlines()
        if "teach_once ablation" in line
    )
    assert "".join(word for word in command.split() if word.endswith("shared-loading")) == option


@pytest.mark.parametrize("target", ["train-student", "ablation"])
def test_make_checks_before_it_builds(target: str) -> None:
    jobs = ["JOBS=0", "SEEDS=a"] if target == "ablation" else []
    shown = make(target, "PLACEMENT=foo", *jobs, "DEVICE=cuda", "WORKERS=3").stdout
    for option in ("--placement 'foo'", "--device 'cuda'", "--workers '3'"):
        assert option in shown
    if target == "ablation":
        assert "--jobs '0'" in shown
        assert "--seeds 'a'" in shown


def test_blocks_of_any_other_size_than_a_power_of_two_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call = ["digits-resnet20", "--caches", str(tmp_path), "--block-rows", "1000"]
    assert teach_once.precompute.command.cli(call) == 2
    assert "--block-rows 1000 is not a power of two; use 512 or 1024" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("student", "positions", "expected"),
    [
        ((7, 7), 49, (7, 7)),
        ((4, 4), 64, (8, 8)),
        ((7, 11), 25 * 41, (25, 41)),
        ((6, 10), 15, (3, 5)),
        ((13, 21), 77, (7, 11)),
        ((7, 7), 12, None),
        ((2, 3), 11, None),
    ],
)
def test_the_size_of_a_teachers_map_follows_from_its_positions(
    student: tuple[int, int], positions: int, expected: tuple[int, int] | None
) -> None:
    assert size_like(*student, positions) == expected


def test_attention_maps_need_not_be_square(
    tmp_path: Path,
    small_teacher: Callable[..., TeacherConfig],
    small_student: Callable[..., StudentConfig],
) -> None:
    """A student whose maps are of other sizes than its teacher's learns from images of 12x20."""
    data = write_image_folder(tmp_path / "data", size=(12, 20))
    weights = tmp_path / "weights.pt"
    save_atomically(build("resnet8", num_classes=2).state_dict(), weights)
    teacher = small_teacher(
        f"dataset={{type: imagefolder, root: {data}, "
        "normalization: {mean: [0.5, 0.5, 0.5], std: [0.25, 0.25, 0.25]}}",
        f"teacher.weights={weights}",
        "taps.attention=float32",
        "views.count=2",
    )
    make_cache(teacher, tmp_path / "caches", block_rows=2)

    def study(*stages: str) -> Study:
        config = small_student("student.arch=resnet8", f"student.stages=[{','.join(stages)}]")
        return open_study(
            config, teacher, caches_dir=tmp_path / "caches", runs_dir=tmp_path / "runs"
        )

    smaller = study("layer2", "layer3", "layer3")
    summary = train_student(smaller.run("at", 0), device="cpu")
    assert summary["epochs"] == 4
    with pytest.raises(StageMismatch, match=r"at: stage1 is 1x1 in the student and has 240 pos"):
        train_student(study("avgpool", "layer2", "layer3").run("at", 0), device="cpu")


def test_a_student_that_fits_no_image_says_so(make_study: MakeStudy) -> None:
    study = make_study(student=[f"student.arch={OWN}:wide_kernel"])
    with pytest.raises(ArchError, match=r"student\.arch: the network cannot process images of 8x8"):
        train_student(study.run("ce", 0), device="cpu")


@pytest.mark.parametrize("command", ["check", "plan", "student"])
@pytest.mark.parametrize(
    ("settings", "fix"),
    [
        (["num_views=12"], "fix: set num_views=9\n"),  # there are no more views than these
        (["teacher.views.count=4", "num_views=6"], "views.count=6"),
    ],
)
def test_more_views_than_the_cache_will_hold_are_refused_with_a_fix_that_works(
    nothing_there: list[str],
    settings: list[str],
    fix: str,
    command: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    call = [
        command,
        "digits-resnet8",
        *nothing_there,
        *(["--no-trial"] if command == "plan" else []),
    ]
    assert cli([*call, *settings]) == 2
    told = capsys.readouterr().err
    assert f"{settings[-1].replace('=', ' is ')}, but" in told
    assert fix in told
    if command != "student" and "num_views=9" in fix:
        assert cli([*call, *settings, told.rpartition("fix: set ")[2].strip()]) == 0


def test_a_cache_that_holds_more_views_than_its_file_asks_for_serves_them(
    small_teacher: Callable[..., TeacherConfig],
    small_student: Callable[..., StudentConfig],
    tmp_path: Path,
) -> None:
    make_cache(small_teacher(), tmp_path / "caches")
    folders = {"caches_dir": tmp_path / "caches", "runs_dir": tmp_path / "runs"}
    study = open_study(small_student("num_views=3"), small_teacher("views.count=2"), **folders)
    assert study.run("kd", 0).num_views == 3
