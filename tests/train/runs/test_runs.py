"""Existing runs: listed, compared, trained again, removed, reported."""

from __future__ import annotations

import io
import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import teach_once.train.sessions.loop
from teach_once.runtime.safe.locks import Job, WriterLock
from teach_once.train.cli.commands import cli
from teach_once.train.engine.epoch_result import EpochResult
from teach_once.train.recording.printing import EpochPrinter
from teach_once.train.runs.study import Study
from tests.support.training.printed_report import write_printed_report

Call = Callable[..., str]


@pytest.fixture
def call(make_study: Callable[..., Study], tmp_path: Path, capsys) -> Call:
    """Runs `python -m train COMMAND`, for digits-resnet8 and a small cache; returns the output.

    Of an ablation also that of the report, whose command it prints.
    """
    study = make_study()
    source = study.teacher.source
    assert source is not None
    common = ["digits-resnet8", "--caches", str(tmp_path / "caches"), "--device", "cpu"]
    common += [f"teacher.{each}" for each in source.overrides]
    common += ["training.epochs=2", "training.schedule.milestones=[1]"]
    common += ["methods={ce: [{loss: ce}], kd: [{loss: ce}, {loss: kd}]}"]

    def run(command: str, *arguments: str, status: int = 0) -> str:
        words = [] if command == "runs" else common
        assert cli([command, *words, "--runs", str(tmp_path / "runs"), *arguments]) == status
        told = capsys.readouterr()
        if "\nreport: " not in told.out:
            return str(told.out + told.err)
        assert write_printed_report(told.out) == 0
        report = capsys.readouterr()
        return str(told.out + told.err + report.out + report.err)

    return run


def folders(tmp_path: Path) -> list[Path]:
    return sorted(
        path for path in (tmp_path / "runs" / "digits-resnet8").iterdir() if path.is_dir()
    )


def interrupt(folder: Path) -> None:
    """Make a finished run one that was stopped after its first epoch."""
    (folder / "summary.json").unlink()
    first, *_ = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text(first)
    (folder / "checkpoint.pt").write_bytes(b"")


@pytest.mark.parametrize("command", ["student", "ablation"])
def test_redo_trains_a_finished_run_again(call: Call, tmp_path: Path, command: str) -> None:
    wanted = ["--method", "ce"] if command == "student" else ["--methods", "ce", "--seeds", "0"]
    call(command, *wanted)
    (folder,) = folders(tmp_path)
    (folder / "mine.txt").write_text("of the first run")
    assert "nothing to" in call(command, *wanted)
    assert (folder / "mine.txt").exists()
    assert "nothing to" not in call(command, *wanted, "--retrain")
    assert folders(tmp_path) == [folder]
    assert (folder / "summary.json").exists()
    assert not (folder / "mine.txt").exists()


def test_what_differs_from_the_last_run_is_named_inside_lists_too(call: Call) -> None:
    both = "methods={kd: [{loss: ce, weight: 0.1}, {loss: kd, weight: 0.9, temperature: 4.0}]}"
    call("student", "--method", "kd", both)
    told = call("student", "--method", "kd", both.replace("4.0", "2.0"))
    assert "differs from the last run of kd, seed 0:\n  terms.1.temperature is 2.0, was 4" in told
    told = call("student", "--method", "kd", "methods={kd: [{loss: ce, weight: 0.1}]}")
    assert "\n  terms.1.loss is not set, was 'kd'\n" in told


def stopped_after_the_first_epoch(
    call: Call, monkeypatch: pytest.MonkeyPatch, *arguments: str, run: int = 1
) -> str:
    """A command that a signal stops after the first epoch of its `run`th run."""
    begun = [0]
    print_epoch = EpochPrinter.__call__

    def stop(printer: EpochPrinter, result: EpochResult) -> None:
        print_epoch(printer, result)
        begun[0] += result.epoch == 1
        if (begun[0], result.epoch) == (run, 1):
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(EpochPrinter, "__call__", stop)
        return call(*arguments, status=128 + signal.SIGTERM)


def test_redo_keeps_the_finished_result_until_the_new_one_is_there(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    retrain = ["student", "--method", "ce", "--retrain"]
    call(*retrain[:3])
    (folder,) = folders(tmp_path)
    (folder / "mine.txt").write_text("of the first run")
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    stopped_after_the_first_epoch(call, monkeypatch, *retrain)
    assert {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()} == files
    finished, again = call("runs").splitlines()[1:]
    assert "  finished  " in finished
    assert "  repetition interrupted, 1 of 2 epochs  " in again
    assert "resuming after epoch 1 of 2" in call(*retrain)
    assert folders(tmp_path) == [folder]
    assert not (folder / "mine.txt").exists()
    assert (folder / "summary.json").exists()


def test_an_interrupted_redo_of_several_runs_trains_only_what_is_left(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    retrain = ["ablation", "--methods", "ce kd", "--seeds", "0", "--retrain"]
    call(*retrain[:-1])
    ce, kd = folders(tmp_path)
    for folder in (ce, kd):
        (folder / "mine.txt").write_text("of the first run")
    stopped_after_the_first_epoch(call, monkeypatch, *retrain, run=2)
    assert not (ce / "mine.txt").exists()
    (ce / "mine.txt").write_text("of the second run")
    told = call(*retrain)
    assert "1 of 2 runs already finished" in told
    assert (ce / "mine.txt").exists()
    assert not (kd / "mine.txt").exists()
    assert folders(tmp_path) == [ce, kd]


def test_a_repetition_that_was_killed_before_it_took_its_place_takes_it_later(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call("student", "--method", "ce")
    (folder,) = folders(tmp_path)
    (folder / "mine.txt").write_text("of the first run")

    def killed(_: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("teach_once.train.sessions.student.take_place", killed)
        call("student", "--method", "ce", "--retrain", status=130)
    assert len(folders(tmp_path)) == 2
    told = call("student", "--method", "ce")
    assert "epoch " not in told.replace("last epoch", "").replace("best epoch", "")
    assert folders(tmp_path) == [folder]
    assert not (folder / "mine.txt").exists()


def test_a_finished_repetition_without_its_place_is_not_removed(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call("student", "--method", "ce")
    (folder,) = folders(tmp_path)
    rename = Path.rename

    def killed_after_one(path: Path, target: Path) -> None:
        rename(path, target)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", killed_after_one)
        call("student", "--method", "ce", "--retrain", status=130)
    assert not folder.exists()
    (again,) = (path for path in folders(tmp_path) if path.name.endswith(".retrain"))
    assert (
        f"{again.name}  finished repetition, replaces the result when the run is trained"
        in call("runs")
    )
    assert "nothing deleted" in call("runs", "--remove", "--superseded", "--yes")
    told = call("student", "--method", "ce")
    assert "epoch 1" not in told.replace("best epoch (1", "")
    assert folders(tmp_path) == [folder]


def test_a_redo_that_is_refused_for_one_run_marks_no_other(call: Call, tmp_path: Path) -> None:
    call("ablation", "--methods", "ce kd", "--seeds", "0")
    ce, kd = folders(tmp_path)
    retrain = ["ablation", "--methods", "ce kd", "--seeds", "0", "--retrain"]
    lock = WriterLock(kd, Job())
    assert "being written by process" in call(*retrain, status=2)
    lock.release()
    assert folders(tmp_path) == [ce, kd]
    kd.with_name(f"{kd.name}.retrain").write_text("in the way")
    call(*retrain, status=2)
    assert folders(tmp_path) == [ce, kd]


def test_a_signal_during_the_last_test_ends_the_study_after_that_run(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate = teach_once.train.sessions.loop.evaluate_batches
    tested: list[int] = []

    def signalled(*arguments: Any) -> Any:
        tested.append(1)
        if len(tested) == 2:  # of two epochs the last
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*arguments)

    wanted = ["ablation", "--methods", "ce kd", "--seeds", "0"]
    with monkeypatch.context() as patched:
        patched.setattr("teach_once.train.sessions.loop.evaluate_batches", signalled)
        told = call(*wanted, status=128 + signal.SIGTERM)
    assert "stopped after the current step" in told
    (ce,) = folders(tmp_path)
    assert (ce / "summary.json").exists()
    assert "1 of 2 runs already finished" in call(*wanted)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets torch's number of threads for the rest of the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_the_number_of_threads_is_recorded_and_told(
    call: Call,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    threads: Callable[[int], None],
) -> None:
    monkeypatch.setattr("teach_once.runtime.machine.devices.usable_cores", lambda: 2)
    threads(1)
    assert "on cpu with 1 thread\n" in call("student", "--method", "ce")
    (first,) = folders(tmp_path)
    assert json.loads((first / "summary.json").read_text())["threads"] == 1
    assert "threads" not in call("runs")
    threads(2)
    assert "on cpu with 2 threads\n" in call("student", "--method", "ce", "--seed", "1")
    one, two = call("runs").splitlines()[1:]
    assert one.endswith("  threads=1")
    assert two.endswith("  threads=2")
    stopped_after_the_first_epoch(call, monkeypatch, "student", "--method", "kd")
    threads(1)
    told = call("student", "--method", "kd")
    assert "started with 2 threads, resumed with 1: the last bits may differ from those" in told


def test_redo_deletes_nothing_that_could_not_be_trained_again(call: Call, tmp_path: Path) -> None:
    call("student", "--method", "kd")
    (folder,) = folders(tmp_path)
    lock = WriterLock(folder, Job())
    assert "being written by process" in call("student", "--method", "kd", "--retrain", status=2)
    lock.release()
    call("student", "--method", "kd", "--retrain", "--device", "no-such-device", status=2)
    assert (folder / "summary.json").exists()


def test_the_list_says_the_state_of_each_run_and_what_tells_it_from_others(
    call: Call, tmp_path: Path
) -> None:
    assert "no runs found in" in call("runs")
    call("student", "--method", "ce")
    (first,) = folders(tmp_path)
    call("student", "--method", "ce", "training.epochs=3", "training.weight_decay=0.1")
    (second,) = set(folders(tmp_path)) - {first}
    call("student", "--method", "kd")
    (third,) = set(folders(tmp_path)) - {first, second}
    error = json.loads((first / "summary.json").read_text())["last"]["top1_error"]
    interrupt(third)
    header, *lines = call("runs").splitlines()
    assert header.split()[:2] == ["run", "state"]
    ce, other_ce, kd = lines
    assert f"digits-resnet8/{first.name}  finished" in ce
    assert f" {error:.2f} " in ce
    assert " MB " in ce
    assert ce.endswith(" s  training.epochs=2, training.weight_decay=0.0005")
    assert "training.epochs=3, training.weight_decay=0.1" in other_ce
    assert "interrupted, 1 of 2 epochs" in kd
    assert kd.endswith("training.epochs=2, training.weight_decay=0.0005")  # no other kd has others
    lock = WriterLock(third, Job())
    assert "training now" in call("runs", "digits-resnet8")
    lock.release()
    assert "no runs found in" in call("runs", "another")


def test_removing_asks_and_takes_finished_runs_only_if_told_to(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call("student", "--method", "ce")
    (superseded,) = folders(tmp_path)
    call("student", "--method", "ce", "training.weight_decay=0.1")
    call("student", "--method", "ce", "--seed", "1")
    call("student", "--method", "kd")
    (unfinished,) = (path for path in folders(tmp_path) if path.name.startswith("kd"))
    interrupt(unfinished)
    before = folders(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO("n\n"))
    told = call("runs", "--remove")
    assert "delete these 1 of 4 runs" in told
    assert str(superseded) not in told
    assert "fix: use --remove --superseded" in call("runs", "--superseded", status=2)
    more = ["--remove", "--superseded"]
    for answer in ("n\n", "\n", ""):
        monkeypatch.setattr("sys.stdin", io.StringIO(answer))
        told = call("runs", *more, status=0 if answer else 1)
        assert "delete these 2 of 4 runs" in told
        error = r"top-1 error [\d.]+ %"
        errors = rf"finished with {error}, superseded by ce-seed0-\w+ with {error}"
        assert re.search(f"{superseded}: {errors}; training.weight_decay=0.0005\n", told)
        assert f"{unfinished}: interrupted, 1 of 2 epochs" in told
        assert folders(tmp_path) == before
    lock = WriterLock(unfinished, Job())
    assert "deleted 1 of 4 runs" in call("runs", *more, "--yes")
    lock.release()
    assert folders(tmp_path) == [path for path in before if path != superseded]
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    assert "deleted 1 of 3 runs" in call("runs", "--remove")
    assert "nothing deleted" in call("runs", "--remove")
    assert len(folders(tmp_path)) == 2


def test_a_report_holds_all_runs_of_its_settings_and_says_what_was_asked_for(
    call: Call, tmp_path: Path
) -> None:
    own = ["methods.own=[{loss: kd}]"]
    folder = tmp_path / "runs" / "digits-resnet8"

    def rows() -> list[list[str]]:
        return [line.split(",") for line in (folder / "ablation.csv").read_text().splitlines()[1:]]

    call("ablation", "--methods", "own", "--seeds", "3", *own)
    call("ablation", "--methods", "ce kd", "--seeds", "0 1")
    whole = rows()
    assert [(method, seed) for method, _, seed, *_ in whole] == [
        *(("ce", "0"), ("ce", "1"), ("kd", "0"), ("kd", "1"), ("own", "3"))
    ]
    call("ablation", "--methods", "kd", "--seeds", "0", "methods.kd.1.weight=7")  # another kd
    for method in ("kd", "own"):  # other settings
        more = ["--methods", method, "--seeds", "0"]
        call("ablation", *more, "training.weight_decay=0.1", *own)
    told = call("ablation", "--methods", "kd", "--seeds", "1")
    assert rows() == whole
    assert re.search(r"^ce +2 ", told, re.M)
    for file in ("ablation.md", "report.html"):
        text = (folder / file).read_text()
        assert "All finished runs with these settings; requested now: kd; seeds 1." in text


def test_an_ablation_ends_with_the_report_wherever_it_runs_and_with_its_exit_status(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "report.py").write_text("raise SystemExit('not the project')")
    monkeypatch.chdir(tmp_path)
    wanted = ["ablation", "--methods", "ce", "--seeds", "0"]
    told = call(*wanted)
    folder = tmp_path / "runs" / "digits-resnet8"
    assert f"written to {folder}/report.html, ablation.md, .csv and .png" in told
    (run,) = folders(tmp_path)
    summary = json.loads((run / "summary.json").read_text())
    del summary["best"]
    (run / "summary.json").write_text(json.dumps(summary))
    assert f"ce, seed 0 failed: BadFile: {run}/summary.json lacks best" in call(*wanted, status=1)
    told = call("ablation", "--methods", "ce", "--seeds", "0 1", status=1)
    assert re.search(r"^ce +1 ", told, re.M)
    assert f"left out: {run}/summary.json lacks best\n  fix: rm -r {run}" in told
    assert f"{run.name}  unreadable" in call("runs", status=1)
