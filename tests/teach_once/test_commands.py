"""The commands that build whatever is missing first, in one process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from teach_once.__main__ import COMMANDS, _put_last, main
from teach_once.precompute.command import cli as precompute
from teach_once.train.cli.commands import cli as train
from tests.support.project import ROOT

SMALL = [
    "teacher.training.epochs=1",
    "teacher.training.max_per_class=10",
    "teacher.training.batch_size=20",
]


def missing(cached: list[str], tmp_path: Path, name: str) -> list[str]:
    """The words of `cached`, for a teacher without weights and a cache."""
    weights = f"teacher.teacher.weights={tmp_path / name}.pt"
    words = [weights if "teacher.weights=" in word else word for word in cached]
    caches = words.index("--caches") + 1
    words[caches] = str(tmp_path / f"{name}-caches")
    words[words.index("--runs") + 1] = str(tmp_path / f"{name}-runs")
    return [*words, *SMALL, "--device", "cpu"]


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = folder.glob("*/*/last.pt")
    return dict(torch.load(file, weights_only=True))


def test_train_student_without_weights_and_cache_ends_with_the_bits_of_single_programs(
    cached: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["digits-resnet8", "--method", "cd+gkd", *missing(cached, tmp_path, "one")]
    assert main(["train-student", *words, "--train-teacher"]) == 0
    printed = capsys.readouterr().out
    order = [
        "teacher  to train",
        "cache    to build",
        "training the teacher",
        "is complete.",
        "cd+gkd, seed 0, from",
        "last epoch",
    ]
    assert sorted(order, key=printed.index) == order
    assert main(["train-student", *words]) == 0
    again = capsys.readouterr().out.splitlines()
    assert [line.count("nothing to do") for line in again] == [1, 1, 1]

    words = ["digits-resnet8", *missing(cached, tmp_path, "two")]
    changes = [word for word in words if word.startswith("teacher.")]
    place = ["--caches", str(tmp_path / "two-caches"), "--device", "cpu"]
    of_student = ["digits-resnet8", "--of-student", *place, *changes]
    assert train(["teacher", *of_student, "--train-teacher"]) == 0
    assert precompute(of_student) == 0
    assert train(["student", *words, "--method", "cd+gkd"]) == 0
    ours, theirs = weights_in(tmp_path / "one-runs"), weights_in(tmp_path / "two-runs")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_train_student_with_fill_cache_equals_the_pass_followed_by_training(
    cached: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*cached, "teacher.training=null", "--device", "cpu"]
    place, runs = words.index("--caches") + 1, words.index("--runs") + 1
    for name, more in (("passed", []), ("filled", ["--fill-cache"])):
        words[place], words[runs] = str(tmp_path / name), str(tmp_path / f"{name}-runs")
        call = ["train-student", "digits-resnet8", "--method", "cd+gkd", *words, *more]
        assert main(call) == 0
        printed = capsys.readouterr().out
        assert ("is complete" in printed) != ("computed in the loop and added" in printed)
    ours, theirs = weights_in(tmp_path / "filled-runs"), weights_in(tmp_path / "passed-runs")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    caches = [next((tmp_path / name).iterdir()) for name in ("filled", "passed")]
    chunks = [sorted(cache.glob("teacher.zarr/**/*")) for cache in caches]
    assert len(chunks[0]) > 20
    for our, their in zip(*chunks, strict=True):
        assert our.name == their.name
        assert our.is_dir() or our.read_bytes() == their.read_bytes()
    assert main(call) == 0
    again = capsys.readouterr().out.splitlines()
    assert [line.count("nothing to do") for line in again] == [1, 1, 1]


@pytest.mark.parametrize(
    "option",
    [
        ["--nproc", "2"],
        ["--cache", "there"],
        ["--cluster", "auto"],
        ["--caches", "s3://bucket/caches"],
    ],
)
def test_fill_cache_excludes_what_it_cannot_fill(
    option: list[str], cached: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    call = ["train-student", "digits-resnet8", "--method", "kd", *cached, "--fill-cache", *option]
    assert main(call) == 2
    printed = capsys.readouterr().err
    assert f"it excludes {option[0]}" in printed
    assert "fix: omit --fill-cache" in printed


def test_ablation_trains_every_method_and_writes_the_report_in_the_same_process(
    cached: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call = ["ablation", "digits-resnet8", "--seeds", "0", "--methods", "ce kd", *cached]
    call.append("teacher.training=null")  # its weights come from elsewhere
    assert main(call) == 0
    printed = capsys.readouterr().out
    for row in ("teacher", "ce", "kd"):
        assert f"\n{row} " in printed
    folder = tmp_path / "runs" / "digits-resnet8"
    files = {path.name for path in folder.iterdir() if path.is_file()}
    assert files == {"ablation.md", "ablation.csv", "ablation.png", "report.html"}
    page = (folder / "report.html").read_text()
    assert "-m teach_once ablation digits-resnet8 --seeds 0" in page
    assert "train student digits-resnet8 --method METHOD --seed SEED" in page
    assert main(call) == 0
    assert "all 2 runs are finished: nothing to train." in capsys.readouterr().out


def test_ablation_with_a_failed_run_reports_the_others_and_exits_with_1(
    cached: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = "methods.bad=[{loss: ce, weight: 1e38}]"
    call = ["ablation", "digits-resnet8", "--seeds", "0", "--methods", "ce bad", *cached, bad]
    call.append("teacher.training=null")
    assert main(call) == 1
    printed = capsys.readouterr()
    assert "\nce " in printed.out
    assert "bad, seed 0 failed: Diverged" in printed.err


def test_a_command_with_a_cache_given_runs_no_teacher(
    cached: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (cache,) = (tmp_path / "caches").iterdir()
    gone = cache.rename(tmp_path / "moved")
    call = ["train-student", "digits-resnet8", "--method", "kd", *cached, "--cache", str(gone)]
    assert main(call) == 0
    printed = capsys.readouterr().out
    assert "kd, seed 0: " in printed
    assert "is complete" not in printed


def test_a_mistake_is_found_before_the_teacher_is_trained(
    cached: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = missing(cached, tmp_path, "none")
    assert main(["ablation", "digits-resnet8", "--methods", "ce nonsense", *words]) == 2
    assert "unknown method 'nonsense'" in capsys.readouterr().err
    assert main(["train-student", "digits-resnet8", "--method", "nonsense", *words]) == 2
    assert not list(tmp_path.glob("none*"))


@pytest.mark.parametrize("mistake", [["--jobs", "0"], ["--workers", "-1"], ["--nproc", "0"]])
def test_a_value_out_of_range_is_refused_before_any_work(
    mistake: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["ablation", "digits-resnet8", *mistake, "--caches", str(tmp_path / "c")]) == 2
    assert f"invalid value for '{mistake[0]}'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_rank_of_a_launcher_is_refused_with_the_option_that_starts_ranks(
    cached: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("TEACH_ONCE_RENDEZVOUS", "x")):
        monkeypatch.setenv(name, value)
    assert main(["train-student", "digits-resnet8", "--method", "ce", *cached]) == 2
    assert "--nproc" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (["", "/lib"], ["/lib", "/own"]),  # python -m
        (["/own", "/lib"], ["/lib", "/own"]),
        (["/bin", "/lib"], ["/bin", "/lib", "/own"]),  # the installed command
        (["/bin", "/own", "/lib"], ["/bin", "/own", "/lib"]),  # PYTHONPATH
    ],
)
def test_put_last_of_the_current_folder_hides_no_other_module(
    before: list[str], after: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", before)
    _put_last("/own")
    assert sys.path == after


def test_every_command_of_the_table_has_help_and_loads_no_torch() -> None:
    code = "import sys; from teach_once.__main__ import main; status = main(sys.argv[1:])\n"
    code += "sys.exit(status or 'torch' in sys.modules)"
    for words in ([], *([name, "--help"] for name in COMMANDS)):
        ran = subprocess.run(
            [sys.executable, "-c", code, *words],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        assert ran.returncode == 0, ran.stderr
        if words:
            assert f"Usage: teach-once {words[0]}" in " ".join(ran.stdout.split())
