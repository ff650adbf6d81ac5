"""Every command in an error message works as printed."""

from __future__ import annotations

import html
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

import teach_once.commands
import teach_once.precompute.command
import teach_once.precompute.verify
import teach_once.store.command
import teach_once.train.cli.commands
from teach_once.configs.commands import cache_command, student_command
from teach_once.configs.load import load_student, load_teacher, split_overrides, to_yaml
from teach_once.configs.schema import TeacherConfig
from teach_once.runtime.command.make_args import with_words
from tests.support.caches.teacher_cache import make_cache
from tests.support.project import ROOT

PROGRAMS: dict[str, Callable[[list[str]], int]] = {
    "teach_once": teach_once.commands.cli,
    "train": teach_once.train.cli.commands.cli,
    "precompute": teach_once.precompute.command.cli,
    "precompute.verify": teach_once.precompute.verify.cli,
    "store": teach_once.store.command.cli,
}


def printed_command(error: str) -> str:
    """What stands behind `fix:`, from the first word that is a program on."""
    (fix,) = re.findall(r"^  fix: (.*)$", error, re.MULTILINE)
    found = re.search(r"(?:^|: )((?:make|python|teach-once|rm) .*)$", fix)
    assert found is not None, fix
    return found[1]


def run_as_printed(command: str) -> None:
    """Run by the shell and make, but programs of the project in this process, which is faster."""
    words = shlex.split(command)
    if "&&" in words:
        for part in command.split(" && "):
            run_as_printed(part)
    elif words[0] == "make":
        for line in recipe(command):
            run_as_printed(line)
    elif words[:2] == ["python", "-m"]:
        assert PROGRAMS[words[2]](words[3:]) == 0, command
    elif words[0] == "teach-once":
        assert PROGRAMS[words[1]](words[2:]) == 0, command
    else:
        subprocess.run(command, shell=True, check=True)


def recipe(command: str) -> list[str]:
    """The commands that make would run, found by make itself."""
    shown = subprocess.run(
        f"{command} -n --no-print-directory",
        shell=True,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    lines = shown.replace("\\\n", " ").splitlines()
    found = [re.match(r"\.venv/bin/python +-m (.*)", line) for line in lines]
    return [f"python -m {match[1]}" for match in found if match is not None]


@pytest.fixture
def files(small_teacher: Callable[..., TeacherConfig], tmp_path: Path) -> Path:
    """A teacher's and a student's file in a folder whose name has a space."""
    folder = tmp_path / "my files"
    folder.mkdir()
    weights = folder / "weights.pt"
    shutil.copy(small_teacher().teacher.weights, weights)  # without how they were trained
    teacher = folder / "my teacher.yaml"
    teacher.write_text(to_yaml(small_teacher(f"teacher.weights={weights}")))
    student = yaml.safe_load(to_yaml(load_student("digits-resnet8")))
    student["teacher"] = str(teacher)
    student["training"] |= {"epochs": 2, "schedule": {"type": "onecycle"}}
    (folder / "student.yaml").write_text(yaml.safe_dump(student))
    return folder


@pytest.fixture
def call(files: Path, tmp_path: Path) -> list[str]:
    """Arguments of a run of that student with overrides of both files."""
    words = [str(files / "student.yaml"), "--caches", str(tmp_path / "my caches")]
    words += ["--runs", str(tmp_path / "runs"), "teacher.views.count=2"]
    return [
        *words,
        "teacher.views.seed=7",
        "training.batch_size=16",
        "teacher.dataset.max_per_class=5",
    ]


def told(call: list[str], capsys: pytest.CaptureFixture[str], status: int = 2) -> str:
    capsys.readouterr()
    assert teach_once.train.cli.commands.cli(call) == status
    return capsys.readouterr().err


def test_a_missing_cache(call: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    run = ["student", *call, "--method", "kd"]
    run_as_printed(printed_command(told(run, capsys)))
    assert teach_once.train.cli.commands.cli(run) == 0


def test_a_cache_that_differs_is_unfinished_or_is_damaged(
    call: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["student", *call, "--method", "kd"]
    run_as_printed(printed_command(told(run, capsys)))
    other = [*run, "teacher.views.seed=8"]
    error = told(other, capsys)
    assert "views.seed: expected 8, found 7" in error
    run_as_printed(printed_command(error))
    assert teach_once.train.cli.commands.cli(other) == 0
    first, second = sorted((tmp_path / "my caches").iterdir())
    shutil.rmtree(second)
    (journal,) = (first / "journal").iterdir()
    kept = journal.read_text()
    journal.write_text(kept.splitlines(keepends=True)[0])
    for broken in (kept.splitlines(keepends=True)[0], "nonsense"):
        journal.write_text(broken)
        seed = yaml.safe_load((first / "manifest.json").read_text())["identity"]["views"]["seed"]
        same = [*run, f"teacher.views.seed={seed}", f"training.learning_rate=0.0{len(broken)}"]
        run_as_printed(printed_command(told(same, capsys)))
        assert teach_once.train.cli.commands.cli(same) == 0


def test_a_chunk_that_is_found_damaged_while_a_student_trains(
    call: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["student", *call, "--method", "kd"]
    run_as_printed(printed_command(told(run, capsys)))
    chunk = next((tmp_path / "my caches").glob("*/teacher.zarr/logits/c.1.*"))
    damage(chunk)
    command = printed_command(told(run, capsys))
    assert command.endswith("FULL_CHECK=1")  # a large cache is not read whole without
    run_as_printed(command)
    assert teach_once.train.cli.commands.cli(run) == 0


def test_a_damaged_hdf5_file(
    call: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["student", *call, "--method", "kd"]
    run_as_printed(printed_command(told(run, capsys)))
    (cache,), file = (tmp_path / "my caches").iterdir(), tmp_path / "one file.h5"
    assert teach_once.store.command.cli(["export", str(cache), str(file)]) == 0
    content = next(cache.glob("teacher.zarr/logits/c.0.*")).read_bytes()[:64]
    whole = bytearray(file.read_bytes())
    whole[whole.index(content) + 3] ^= 1
    file.write_bytes(whole)
    of_file = [*run, "--cache", str(file)]
    command = printed_command(told(of_file, capsys))
    run_as_printed(command.replace("CACHE", shlex.quote(str(cache))))
    assert teach_once.train.cli.commands.cli(of_file) == 0


def damage(chunk: Path) -> None:
    content = bytearray(chunk.read_bytes())
    content[len(content) // 2] ^= 1
    chunk.write_bytes(content)


def test_a_damaged_manifest(call: list[str], tmp_path: Path) -> None:
    config = load_teacher(load_student(call[0]).teacher, split_overrides(call[5:])[1])
    (tmp_path / "my caches").mkdir()
    cache = make_cache(config, tmp_path / "my caches")
    manifest = cache.path / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:-40])
    assert teach_once.train.cli.commands.cli(["student", *call, "--method", "kd"]) == 2
    run_as_printed(cache_command(config, caches_dir=tmp_path / "my caches"))
    assert teach_once.train.cli.commands.cli(["student", *call, "--method", "kd"]) == 0


def test_views_that_a_cache_was_not_planned_for(
    call: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["student", *call, "--method", "kd"]
    run_as_printed(printed_command(told(run, capsys)))
    more = [*run, "num_views=4"]
    run_as_printed(printed_command(told(more, capsys)))
    assert teach_once.train.cli.commands.cli(more) == 0


@pytest.mark.parametrize("first", ["check", "ablation"])
def test_taps_that_are_not_there(
    call: list[str], first: str, capsys: pytest.CaptureFixture[str]
) -> None:
    methods = ["--methods", "at fitnets"]
    if first == "ablation":
        run_as_printed(printed_command(told(["student", *call, "--method", "kd"], capsys)))
    run_as_printed(printed_command(told([first, *call, *methods], capsys)))
    assert teach_once.train.cli.commands.cli(["ablation", *call, *methods, "--seeds", "0"]) == 0


def test_weights_that_are_not_there(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(files / "my teacher.yaml"), "--caches", str(tmp_path / "caches")]
    words += [f"teacher.weights={tmp_path}/new weights.pt", "training.epochs=1"]
    assert teach_once.precompute.command.cli(words) == 2
    run_as_printed(printed_command(capsys.readouterr().err))
    assert teach_once.precompute.command.cli(words) == 0


def test_weights_that_were_trained_otherwise(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["teacher", str(files / "my teacher.yaml"), f"teacher.weights={tmp_path}/w.pt"]
    words += ["training.epochs=1", "training.max_per_class=2"]
    assert teach_once.train.cli.commands.cli(words) == 0
    otherwise = [*words, "training.learning_rate=0.02"]
    run_as_printed(printed_command(told(otherwise, capsys)))
    assert teach_once.train.cli.commands.cli(otherwise) == 0


def test_an_export_of_a_run_that_is_not_finished(
    call: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_as_printed(printed_command(told(["student", *call, "--method", "ce"], capsys)))
    export = ["export", call[0], str(tmp_path / "out"), *call[1:], "--method", "ce"]
    command = printed_command(told(export, capsys))
    assert command.startswith("make train-student STUDENT=")
    run_as_printed(command)
    assert teach_once.train.cli.commands.cli(export) == 0


def test_an_export_of_weights_that_were_changed(
    call: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["student", *call, "--method", "ce"]
    run_as_printed(printed_command(told(run, capsys)))
    assert teach_once.train.cli.commands.cli(run) == 0
    (best,) = (tmp_path / "runs").glob("student/*/best.pt")
    best.write_bytes(best.read_bytes() + b"changed")
    export = ["export", call[0], str(tmp_path / "out"), *call[1:], "--method", "ce"]
    run_as_printed(printed_command(told(export, capsys)))
    assert teach_once.train.cli.commands.cli(export) == 0


def test_a_dataset_that_has_changed(call: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    run = ["student", *call, "--method", "kd"]
    run_as_printed(printed_command(told(run, capsys)))
    smaller = [*run, "teacher.dataset.max_per_class=4"]
    run_as_printed(printed_command(told(smaller, capsys)))
    assert teach_once.train.cli.commands.cli(smaller) == 0


def test_a_checkpoint_that_cannot_be_read(
    call: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["student", *call, "--method", "ce"]
    run_as_printed(printed_command(told(run, capsys)))
    assert teach_once.train.cli.commands.cli(run) == 0
    (folder,) = (tmp_path / "runs" / "student").iterdir()
    (folder / "summary.json").unlink()
    (folder / "checkpoint.pt").write_bytes(b"damaged")
    run_as_printed(printed_command(told(run, capsys)))
    assert teach_once.train.cli.commands.cli(run) == 0


def test_an_unsound_cache(
    tmp_path: Path,
    files: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A cache knows the name of its teacher's file, not the overrides that it was made with."""
    folder = tmp_path / "configs" / "teacher"
    folder.mkdir(parents=True)
    shutil.copy(files / "my teacher.yaml", folder / "digits-resnet20.yaml")
    monkeypatch.setattr("teach_once.configs.load.CONFIG_DIR", tmp_path / "configs")
    cache = make_cache(load_teacher("digits-resnet20"), tmp_path / "caches")
    chunk = next(cache.path.glob("teacher.zarr/stage1/c.*"))
    chunk.write_bytes(b"\0" * chunk.stat().st_size)
    assert teach_once.store.command.cli(["check", str(cache.path)]) == 1
    run_as_printed(printed_command(capsys.readouterr().out))
    assert teach_once.store.command.cli(["check", str(cache.path)]) == 0


def test_the_reports_commands_repeat_the_words_of_the_user(
    call: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_as_printed(printed_command(told(["student", *call, "--method", "ce"], capsys)))
    assert teach_once.commands.cli(["ablation", *call, "--methods", "ce", "--seeds", "0"]) == 0
    page = (tmp_path / "runs" / "student" / "report.html").read_text()
    commands = [html.unescape(found) for found in re.findall(r"<pre>(.*?)</pre>", page)]
    (cache,) = [command for command in commands if "cache-teacher" in command]
    (run,) = [command for command in commands if "METHOD" in command]
    capsys.readouterr()
    run_as_printed(cache)
    assert "nothing to do" in capsys.readouterr().out
    run_as_printed(run.replace("METHOD", "ce").replace("SEED", "0"))
    assert "is finished: nothing to do" in capsys.readouterr().out


@pytest.mark.parametrize(
    "override",
    [
        "training.schedule={type: onecycle, warmup_fraction: 0.25}",
        "views.evaluation={type: center-crop, crop_px: 8}",
        "teacher.weights=it's here.pt",
        "teacher.weights=$HOME/#1.pt",
        'teacher.weights="two  spaces.pt"',
    ],
)
def test_overrides_come_through_the_shell_and_make_as_they_were(override: str) -> None:
    config = load_teacher("digits-resnet20", [override])
    command = cache_command(config)
    lines = recipe(command) if command.startswith("make") else [command]
    for line in lines:
        last = with_words(shlex.split(line)[-1:])
        assert load_teacher("digits-resnet20", last) == config


def test_a_students_command_carries_the_overrides_of_both_files() -> None:
    student = load_student("digits-resnet8", ["training.batch_size=8"])
    teacher = load_teacher("digits-resnet20", ["views.count=2"])
    assert student_command(student, teacher, "cd+gkd", 3) == (
        "make train-student STUDENT=digits-resnet8 METHOD=cd+gkd SEED=3 "
        'ARGS="training.batch_size=8 teacher.views.count=2"'
    )
