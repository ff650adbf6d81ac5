"""python -m train as users call it."""

from __future__ import annotations

import errno
import inspect
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import CodeType

import pytest
import torch

from teach_once.configs.load import load_student
from teach_once.precompute.command import cli as precompute
from teach_once.store.move.hdf5 import export_cache
from teach_once.train.cli.commands import cli
from tests.support.programs.pass_commands import arguments_of
from tests.support.programs.processes import run, start
from tests.support.project import ROOT
from tests.support.training.printed_report import write_printed_report
from tests.support.training.training_runs import without_times
from tests.support.training.written_run import write_finished_run

PACKAGES = {"runtime", "train", "views", "teach_once"}


def test_an_ablation_trains_every_method_and_repeats_nothing(
    cached: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call = ["ablation", "digits-resnet8", *cached]
    assert cli([*call, "--seeds", "0"]) == 0
    printed = capsys.readouterr().out
    methods = list(load_student("digits-resnet8").methods)
    for method in methods:
        assert re.search(rf"^{re.escape(method)} +\d+\.\d\d\b", printed, re.M), method
    call += ["--seeds", "0 1", "--methods", "ce kd"]
    assert cli(call) == 0
    printed = capsys.readouterr().out
    assert "2 of 4 runs" in printed
    for method in ("ce", "kd"):  # mean and standard deviation
        assert re.search(rf"^{method} +\d+\.\d\d +\d+\.\d\d$", printed, re.M)
    folder = tmp_path / "runs" / "digits-resnet8"
    assert len(list(folder.glob("*-seed*"))) == len(methods) + 2
    assert cli(call) == 0
    assert "all 4 runs are finished: nothing to train." in capsys.readouterr().out


def test_an_ablation_prints_the_command_that_writes_its_report(
    cached: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli(["ablation", "digits-resnet8", "--seeds", "0", "--methods", "ce", *cached]) == 0
    assert write_printed_report(capsys.readouterr().out) == 0
    assert "\nce " in capsys.readouterr().out
    assert (tmp_path / "runs" / "digits-resnet8" / "report.html").is_file()


def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bits(
    cached: list[str], tmp_path: Path
) -> None:
    call = ["train", "student", "digits-resnet8", "--method", "cd+gkd+edt"]
    call += ["--checkpoint-minutes", "0", "--device", "cpu", *cached]
    call += ["training.epochs=6", "training.batch_size=4"]
    steps_of, kills = tmp_path / "runs" / "digits-resnet8", 0
    for epochs in (1, 3):  # and somewhere within the next one
        process = start(*call)
        while process.poll() is None and num_epochs(steps_of) < epochs:
            time.sleep(0.01)
        kills += process.poll() is None
        process.kill()
        process.wait()
    assert kills >= 1
    assert run(*call).returncode == 0
    (killed,) = steps_of.iterdir()
    resumed = torch.load(killed / "last.pt", weights_only=True)
    metrics = without_times(killed)
    shutil.rmtree(killed)
    assert run(*call).returncode == 0
    whole = torch.load(killed / "last.pt", weights_only=True)
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    assert metrics == without_times(killed)


def num_epochs(runs: Path) -> int:
    return sum(len(file.read_text().splitlines()) for file in runs.glob("*/metrics.jsonl"))


def test_student_command_reaches_a_step_in_eight_frames_and_two_generators(
    cached: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Reached(Exception):
        pass

    calls: list[CodeType] = []

    def stop_here(*arguments: object) -> None:
        frame = inspect.currentframe()
        while frame := frame and frame.f_back:
            path = Path(frame.f_code.co_filename).resolve()
            if path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] in PACKAGES:
                calls.append(frame.f_code)
        raise Reached

    monkeypatch.setattr("teach_once.train.engine.step.train_step", stop_here)
    with pytest.raises(Reached):
        cli(["student", "digits-resnet8", "--method", "ce", *cached])
    names = [code.co_name for code in calls]
    assert names[0] == "epoch_steps"
    assert len(calls) + 1 <= 8, names  # and train_step itself
    assert sum(bool(code.co_flags & inspect.CO_GENERATOR) for code in calls) <= 2, names


def test_an_ablation_never_loads_the_teacher(
    cached: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the teacher was loaded")

    monkeypatch.setattr("teach_once.train.sessions.student.load_teacher_network", refuse)
    assert cli(["ablation", "digits-resnet8", "--seeds", "0", "--methods", "kd cd", *cached]) == 0
    with pytest.raises(AssertionError, match="the teacher was loaded"):
        cli(["student", "digits-resnet8", "--method", "kd", "--live-teacher", *cached])


def test_student_of_a_live_teacher_is_not_offered_for_export(
    cached: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli(["student", "digits-resnet8", "--method", "kd", "--live-teacher", *cached]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("  next: ")
    assert " runs digits-resnet8" in last
    assert " export " not in last


def test_a_student_is_trained_once_and_its_result_printed_again(
    cached: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    call = ["student", "digits-resnet8", "--method", "cd+gkd", "--seed", "1", *cached]
    assert cli(call) == 0
    first = capsys.readouterr().out
    epoch = next(line for line in first.splitlines() if line.startswith("epoch   3/3"))
    total, terms = re.findall(r"loss +([\d.]+) = ce (.*)  test top-1 error", epoch)[0]
    ce, gkd, cd = (float(term.split()[-1]) for term in terms.split(" + "))
    assert ce + gkd + cd == pytest.approx(float(total), rel=0.01)
    *_, head, last, best, teacher, export, compare = first.splitlines()
    assert head.startswith("cd+gkd, seed 1: ")
    assert [line.split()[0] for line in (last, best, teacher)] == ["last", "best", "teacher:"]
    assert cli(call) == 0
    (second,) = capsys.readouterr().out.splitlines()
    error = re.findall(r"test top-1 error ([\d.]+) %", last)[0]
    assert (
        f"is finished: nothing to do. Last epoch: test top-1 error {error} % (best epoch: "
        in second
    )
    exporting, comparing = (shlex.split(line.partition(": ")[2])[3:] for line in (export, compare))
    assert exporting[:3] == ["export", "digits-resnet8", "exported/digits-resnet8"]
    assert exporting[3:7] == ["--method", "cd+gkd", "--seed", "1"]
    assert set(cached) <= set(exporting)
    assert cli(comparing) == 0
    assert re.search(rf" finished +top-1 error {error} % ", capsys.readouterr().out)


def test_a_student_trains_the_same_from_the_exported_file(
    cached: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call = ["student", "digits-resnet8", "--method", "cd+gkd", *cached]
    assert cli(call) == 0
    from_folder = capsys.readouterr().out.splitlines()
    (folder,) = (tmp_path / "caches").iterdir()
    export_cache(folder, tmp_path / "cache.h5")
    moved = ["--cache", str(tmp_path / "cache.h5"), "--runs", str(tmp_path / "runs2")]
    assert cli([*call, *moved]) == 0
    from_file = capsys.readouterr().out.splitlines()
    errors = [
        [line.split("images/s")[0][:60] for line in text if line.startswith("epoch")]
        for text in (from_folder, from_file)
    ]
    assert errors[0] == errors[1]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_training_that_is_stopped_says_so_and_goes_on(
    cached: list[str], tmp_path: Path, number: int, status: int
) -> None:
    call = ["train", "student", "digits-resnet8", "--method", "ce", *cached]
    process = start(*call, "training.epochs=300")
    while not list(tmp_path.glob("runs/*/*/checkpoint.pt")):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    _, told = process.communicate(timeout=300)
    assert process.returncode == status
    assert "the same command resumes there" in told
    assert "Traceback" not in told
    (checkpoint,) = tmp_path.glob("runs/*/*/checkpoint.pt")
    assert torch.load(checkpoint, weights_only=True)["epoch"] >= 1


def test_the_plan_says_what_is_there_and_what_is_missing(
    cached: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli(["plan", "digits-resnet8", *cached]) == 0
    told = capsys.readouterr().out
    assert "teacher  found" in told
    assert "cache    found" in told
    assert "student  to train: 60 samples x 3 epochs through resnet8" in told
    assert re.search(r"\ntime     about \d+ s without tests at [\d,]+ images/s on cpu\n", told)
    assert re.search(r"\nmemory   at most about [\d.]+ .B of RAM \([\d.]+ .B free\)\n", told)
    assert not list(tmp_path.glob("runs/*"))
    assert cli(["plan", "digits-resnet8", "--no-trial", *cached]) == 0
    told = capsys.readouterr().out
    assert "\ntime " not in told
    assert "\nmemory " not in told
    assert (
        cli(
            [
                "plan",
                "digits-resnet8",
                *cached,
                "--caches",
                "nowhere",
                "teacher.teacher.weights=gone.pt",
            ]
        )
        == 0
    )
    told = capsys.readouterr().out
    assert "teacher  to train: all training images x 20 epochs" in told
    assert "cache    to build: 60 samples x 3 views = 180 images" in told


@pytest.mark.parametrize(("rates", "is_told"), [([100.0, 300.0], True), ([300.0, 290.0], False)])
def test_a_plan_says_where_bfloat16_is_slower_than_float32(
    cached: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    rates: list[float],
    is_told: bool,
) -> None:
    left = list(rates)
    monkeypatch.setattr("teach_once.train.sessions.trial.measured_rate", lambda _: left.pop(0))
    call = ["plan", "digits-resnet8", "--method", "ce", "--device", "cpu", *cached]
    assert cli([*call, "training.precision=bfloat16"]) == 0
    told = capsys.readouterr().out
    hint = "hint: training.precision: bfloat16 is slower than float32 on this CPU: 100 against 300"
    assert (hint in told) == is_told
    assert f"without tests at {rates[0]:,.0f} images/s on cpu" in told
    assert not left
    left[:] = [500.0]  # one trial
    assert cli([*call, "training.precision=float32"]) == 0
    assert "hint" not in capsys.readouterr().out


def test_runs_of_a_file_instead_of_a_folder_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "runs").write_text("")
    assert cli(["runs", "--runs", str(tmp_path / "runs")]) == 2
    assert "runs is a file, expected a folder of runs\n  fix: use --runs" in capsys.readouterr().err
    assert cli(["runs", "--runs", str(tmp_path / "none")]) == 0


@pytest.mark.parametrize("closed", ["runs", "runs/small"])
def test_runs_of_a_folder_that_cannot_be_read_name_it_and_fail(
    closed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_finished_run(tmp_path / "runs", "ce", 0, 9.0)
    call = ["runs", "--runs", str(tmp_path / "runs")]
    assert cli(call) == 0
    capsys.readouterr()
    listed = Path.iterdir

    def refused(folder: Path) -> Iterator[Path]:
        if folder == tmp_path / closed:  # root may read it whatever its mode
            raise PermissionError(errno.EACCES, "Permission denied", str(folder))
        return listed(folder)

    monkeypatch.setattr(Path, "iterdir", refused)
    assert cli(call) == 2
    fix = f"chmod u+rwx {tmp_path / closed}"
    assert capsys.readouterr().err == (
        f"error: {tmp_path / closed} cannot be read: Permission denied\n  fix: {fix}\n"
    )


def test_runs_with_a_file_that_cannot_be_read_are_listed_and_fail(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_finished_run(tmp_path / "runs", "ce", 0, 9.0)
    damaged = write_finished_run(tmp_path / "runs", "kd", 0, 8.0)
    (damaged / "run.json").unlink()
    (damaged / "run.json").mkdir()
    assert cli(["runs", "--runs", str(tmp_path / "runs")]) == 1
    told = capsys.readouterr().out
    assert re.search(f"{damaged.name} +unreadable", told)
    assert "finished" in told
    assert f"{damaged}/run.json" in told


COMMAND_AND_ITS_PEAK = """
import sys
from teach_once.runtime.command.cost import peak_memory
from teach_once.train.cli.commands import cli
assert cli(sys.argv[1:]) == 0
print("peak", peak_memory())
"""


def test_a_run_stays_within_the_memory_that_its_plan_names(cached: list[str]) -> None:
    def told(command: str) -> str:
        run = [command, "digits-resnet8", "--method", "fitnets", *cached, "student.arch=resnet110"]
        run += ["training.epochs=1", "training.schedule={type: onecycle}"]
        return subprocess.run(
            [sys.executable, "-c", COMMAND_AND_ITS_PEAK, *run],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout

    (planned,) = re.findall(r"at most about ([\d.]+) MB of RAM", told("plan"))
    (peak,) = re.findall(r"peak (\d+)", told("student"))
    assert 0.7 * float(planned) < int(peak) / 1e6 <= float(planned)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (
            ["student", "digits-resnet8", "--method", "kdd"],
            "configs student digits-resnet8\n",
        ),
        (["student", "digits-resnet8", "student.arch=resnet7"], "unknown arch 'resnet7'"),
        (["student", "digits-resnet8", "training.epochs=0"], "training.epochs"),
        (["student", "digits-resnet8", "--caches", "nowhere"], "make cache-teacher TEACHER="),
        (["student", "digits-resnet8", "teacher.views.seed=9"], "views.seed: expected 9, found 0"),
        (["student", "digits-resnet8", "num_views=5"], 'views.count=5"'),
        (["ablation", "digits-resnet8", "--seeds", "zero"], 'as in "0 1 2"'),
        (["ablation", "digits-resnet8", "--methods", "ce nonsense"], "unknown method 'nonsense'"),
        (
            ["teacher", "digits-resnet20", "training=null", "teacher.weights=gone.pt"],
            "has no training block",
        ),
    ],
)
def test_bad_input_is_an_error_with_its_remedy(
    cached: list[str], arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    common = [] if arguments[0] == "teacher" else cached
    # What the case says comes last, so that it wins over what is common.
    assert cli([*arguments[:2], *common, *arguments[2:]]) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("program", ["student", "precompute"])
def test_an_unknown_device_is_refused_even_where_nothing_is_to_do(
    cached: list[str], program: str, small_teacher, tmp_path: Path, capsys
) -> None:
    if program == "student":
        call = ["student", "digits-resnet8", "--method", "ce", *cached]
        assert cli(call) == 0
        assert cli([*call, "--device", "gpu"]) == 2
    else:
        call = arguments_of(small_teacher(), tmp_path / "caches")
        assert precompute(call) == 0
        assert precompute([*call, "--device", "gpu"]) == 2
    told = capsys.readouterr().err
    assert "device 'gpu' is unknown: expected auto, cpu, cuda" in told
