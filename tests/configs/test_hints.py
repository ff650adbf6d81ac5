"""Hints that commands print, and settings without an effect."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

import teach_once.precompute.command
import teach_once.train.cli.commands
from teach_once.configs.load import available, load_teacher, to_yaml
from teach_once.configs.schema import TeacherConfig
from teach_once.nets.networks.archs import stem_hint
from teach_once.nets.networks.zoo import build
from teach_once.nets.weights.files import save_atomically
from teach_once.train.runs.study import Study
from teach_once.train.sessions.student import train_student
from tests.support.caches.teacher_cache import make_cache, setup_of
from tests.support.datasets.image_folders import write_image_folder

MOMENTS = "normalization: {mean: [0.5, 0.5, 0.5], std: [0.25, 0.25, 0.25]}"


def told_by_pass(config: TeacherConfig, folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    folder.mkdir(exist_ok=True)
    file = folder / "mine.yaml"
    file.write_text(to_yaml(config))
    capsys.readouterr()
    assert teach_once.precompute.command.cli([str(file), "--caches", str(folder / "caches")]) == 0
    return capsys.readouterr().out


def test_a_teacher_far_from_its_published_error_is_noticed_after_the_pass(
    small_teacher: Callable[..., TeacherConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    told = told_by_pass(small_teacher(), tmp_path, capsys)
    (measured,) = map(float, re.findall(r"test (?:top-1 )?error +([\d.]+) %", told))
    assert "WARNING" not in told
    for expected, warns in ((measured + 4.9, False), (measured + 5.1, True), (0.0, measured > 5)):
        config = small_teacher(f"teacher.expected_error={expected:.2f}")
        for _ in ("the pass", "nothing to do"):
            told = told_by_pass(config, tmp_path, capsys)
            assert ("WARNING" in told) == warns
    far = small_teacher("teacher.expected_error=90.0")
    told = told_by_pass(far, tmp_path, capsys)
    assert f"sets teacher.expected_error: 90.00 %, but {measured:.2f} % was measured" in told
    for cause in ("dataset.normalization", "the weights' classes are in another order"):
        assert cause not in told  # neither makes a teacher better than expected
    assert "the weights were trained on these test images" in told
    monkeypatch.setattr("teach_once.precompute.pending._FAR_PERCENT", 0.0)
    told = told_by_pass(small_teacher("teacher.expected_error=0.0"), tmp_path, capsys)
    assert "dataset.normalization differs from the teacher's training" in told
    assert "the weights' classes are in another order" in told
    assert "trained on these test images" not in told
    monkeypatch.undo()
    recalibrated = small_teacher("teacher.expected_error=90.0", "teacher.bn=recalibrated")
    assert "WARNING" not in told_by_pass(recalibrated, tmp_path, capsys)


def test_the_published_error_is_no_part_of_an_identity(
    small_teacher: Callable[..., TeacherConfig], tmp_path: Path
) -> None:
    plain, named = small_teacher(), small_teacher("teacher.expected_error=3.0")
    assert setup_of(plain, tmp_path).identity == setup_of(named, tmp_path).identity


def test_published_errors_are_in_the_files_that_have_one() -> None:
    found = {name: load_teacher(name).teacher.expected_error for name in available("teacher")}
    assert {name: error for name, error in found.items() if error is not None} == {
        "imagenet-resnet34": 26.73,
        "imagenet-mixup-resnet34": 26.73,
        "cifar100-resnet152": 19.09,
        "cifar100-resnet56": 27.66,
        "cifar100-mixup-resnet56": 27.66,
        "cifar100-resnet32x4": 20.58,
    }


@pytest.mark.parametrize(
    ("arch", "stem", "size", "is_slow"),
    [
        ("resnet18", "cifar", 64, True),
        ("resnet18", "cifar", 63, False),
        ("resnet18", "imagenet", 224, False),
        ("resnet20", "cifar", 64, False),
        ("vgg11_bn", "imagenet", 64, False),
    ],
)
def test_a_stem_that_is_slow_on_large_images_is_hinted_at(
    arch: str, stem: str, size: int, is_slow: bool
) -> None:
    hint = stem_hint(arch, stem, (size, size, 3), "student.stem")
    assert bool(hint) == is_slow
    if is_slow:
        assert f"keeps all of {size}x{size} pixels" in hint
        assert "student.stem: imagenet" in hint


def test_plan_pass_and_training_hint_at_a_slow_stem(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_image_folder(tmp_path / "data", per_class=2, size=64)
    weights = tmp_path / "w.pt"
    save_atomically(build("resnet18", num_classes=2).state_dict(), weights)
    (tmp_path / "t.yaml").write_text(
        f"dataset: {{type: imagefolder, root: {data}, {MOMENTS}}}\n"
        f"views: {{augment: {{type: center-crop}}, count: 1}}\n"
        f"teacher: {{arch: resnet18, weights: {weights}}}\n"
        f"taps: {{logits: float32, channel_means: float32}}\n"
    )
    (tmp_path / "s.yaml").write_text(
        f"teacher: {tmp_path / 't.yaml'}\nstudent: {{arch: resnet18}}\n"
        "training: {epochs: 1, batch_size: 4, learning_rate: 0.01, schedule: {type: onecycle}}\n"
        "methods: {ce: [{loss: ce}]}\n"
    )
    caches = ["--caches", str(tmp_path / "caches")]
    student = [str(tmp_path / "s.yaml"), "--method", "ce", "--runs", str(tmp_path / "runs")]
    calls = [
        (
            teach_once.train.cli.commands.cli,
            ["plan", *student, *caches, "--no-trial"],
            ("teacher", "student"),
        ),
        (teach_once.precompute.command.cli, [str(tmp_path / "t.yaml"), *caches], ("teacher",)),
        (teach_once.train.cli.commands.cli, ["student", *student, *caches], ("student",)),
    ]
    for program, arguments, keys in calls:
        assert program(arguments) == 0
        told = capsys.readouterr().out
        assert re.findall(r"hint: resnet18 with (\w+)\.stem: cifar", told) == list(keys)
        assert "top-5" not in told  # of two classes


def test_an_epoch_says_that_the_classifier_is_idle(make_study: Callable[..., Study]) -> None:
    study = make_study()
    for method, idle in (("cd+gkd+edt", [1]), ("cd+gkd", [])):
        console = Console(file=io.StringIO(), width=200)
        train_student(study.run(method, 0), device="cpu", console=console)
        lines = re.findall(r"^epoch +(\d+)/4 .*$", console.file.getvalue(), re.MULTILINE)
        assert lines == ["1", "2", "3", "4"]
        told = re.findall(
            r"^epoch +(\d+)/4 .*  classifier idle until epoch 2$",
            console.file.getvalue(),
            re.MULTILINE,
        )
        assert [int(epoch) for epoch in told] == idle


def test_a_student_without_a_classifier_is_announced_in_each_epoch(
    make_study: Callable[..., Study],
) -> None:
    console = Console(file=io.StringIO(), width=200)
    study = make_study(student=["methods.means=[{loss: cd}]"])
    train_student(study.run("means", 0), device="cpu", console=console)
    assert len(re.findall(r"  no classifier$", console.file.getvalue(), re.MULTILINE)) == 4


def test_a_limit_that_keeps_every_sample_makes_no_other_cache(
    small_teacher: Callable[..., TeacherConfig], tmp_path: Path
) -> None:
    whole = setup_of(small_teacher("dataset.max_per_class=null"), tmp_path)
    assert setup_of(small_teacher("dataset.max_per_class=1000"), tmp_path).path == whole.path
    cut = setup_of(small_teacher("dataset.max_per_class=6"), tmp_path)
    assert cut.path != whole.path
    assert cut.identity["dataset"]["max_per_class"] == 6


def test_a_stem_where_there_is_none_makes_no_other_cache_and_no_other_run(
    small_teacher: Callable[..., TeacherConfig], make_study: Callable[..., Study], tmp_path: Path
) -> None:
    config = small_teacher()
    make_cache(config, tmp_path / "caches")
    study = make_study(["teacher.stem=imagenet"], ["student.stem=imagenet"])
    assert len(list((tmp_path / "caches").iterdir())) == 1
    assert study.run("ce", 0).folder == make_study().run("ce", 0).folder
    other = "teacher.arch=resnet18"
    paths = [setup_of(small_teacher(other, f"teacher.stem={stem}"), tmp_path).path
             for stem in ("cifar", "imagenet")]  # fmt: skip
    assert paths[0] != paths[1]
