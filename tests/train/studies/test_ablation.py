"""The runner: what is finished is skipped, what fails is reported, several processes agree."""

from __future__ import annotations

import copy
import io
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from teach_once.runtime.errors import Stopped
from teach_once.train.errors import TrainError
from teach_once.train.runs.study import Run, Study
from teach_once.train.studies.ablation import run_ablation
from tests.support import slow_loss

MakeStudy = Callable[..., Study]


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


def two_of(study: Study) -> list[Run]:
    return [study.run("ce", 0), study.run("kd", 0)]


NOTING_LOSS = """
import os
from pathlib import Path
from teach_once.runtime.machine.resources import Share
from teach_once.train.terms import Batch, loss_term

@loss_term(teacher_taps=["logits"])
def noting(batch: Batch):
    share = Share.of_this_process()
    Path(__file__).with_name(f"{os.getpid()}.note").write_text(f"{share.index} of {share.count}")
    return (batch.logits - batch.teacher["logits"]).square().mean()
"""


def test_several_jobs_give_what_one_gives_and_know_of_each_other(
    make_study: MakeStudy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "noting_loss.py").write_text(NOTING_LOSS)
    monkeypatch.syspath_prepend(str(tmp_path))
    first = make_study(student=["methods.own=[{loss: ce}, {loss: 'noting_loss:noting'}]"])

    def notes() -> list[str]:
        return sorted(path.read_text() for path in tmp_path.glob("*.note"))

    runs = [first.run(method, seed) for method in ("ce", "own") for seed in (0, 1)]
    assert run_ablation(runs, device="cpu", console=quiet()) == {}
    alone = [run.summary for run in runs]
    assert notes() == ["0 of 1"]
    next(tmp_path.glob("*.note")).unlink()
    for run in runs:
        (run.folder / "summary.json").unlink()
    assert run_ablation(runs, device="cpu", jobs=2, console=quiet()) == {}
    assert notes() in (["0 of 2", "1 of 2"], ["0 of 2"], ["1 of 2"])  # one may train all
    for ours, run in zip(alone, runs, strict=True):
        assert ours is not None
        assert run.summary is not None
        assert ours["last"] == pytest.approx(run.summary["last"], abs=1.0)


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_run_that_fails_stops_no_other_and_is_named(make_study: MakeStudy, jobs: int) -> None:
    study = make_study(student=["methods.bad=[{loss: ce, weight: 1e38}]"])
    console = quiet()
    bad, good = study.run("bad", 0), study.run("ce", 0)
    failures = run_ablation([bad, good], device="cpu", jobs=jobs, console=console)
    assert list(failures) == [bad]
    assert not bad.is_finished
    assert "Diverged: the loss became" in failures[bad]
    assert "Traceback" not in failures[bad]
    summary = good.summary
    assert summary is not None
    assert "bad          seed 0  FAILED: Diverged" in console.file.getvalue()
    assert list(run_ablation([bad, good], device="cpu", jobs=jobs, console=console)) == [bad]
    assert good.summary == summary
    assert "1 of 2 runs already finished" in console.file.getvalue()


def test_an_unexpected_failure_keeps_its_traceback(
    make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("teach_once.train.sessions.student.train_student", lambda *_, **__: 1 / 0)
    run = make_study().run("ce", 0)
    failures = run_ablation([run], device="cpu", console=quiet())
    assert failures[run].startswith("ZeroDivisionError: division by zero\nTraceback")


def test_a_method_that_cannot_work_stops_everything_before_it_starts(make_study: MakeStudy) -> None:
    study = make_study(student=["methods.at=[{loss: at}]"])
    with pytest.raises(TrainError, match=r"methods\.at needs the taps energy1"):
        run_ablation([study.run("ce", 0), study.run("at", 0)], device="cpu", console=quiet())
    assert not list(study.runs_dir.glob("*/*"))


def test_a_signal_is_passed_on_and_every_run_is_kept(make_study: MakeStudy) -> None:
    study = make_study(student=["training.epochs=2000", "training.schedule.milestones=[1999]"])

    def interrupt() -> None:
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline and len(list(study.folder.glob("*/checkpoint.pt"))) < 2:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(Stopped) as stopped:
        run_ablation(two_of(study), device="cpu", jobs=2, console=quiet())
    thread.join()
    assert stopped.value.exit_code == 143
    assert len(list(study.folder.glob("*/checkpoint.pt"))) == 2
    assert not list(study.folder.glob("*/summary.json"))


def test_ctrl_c_which_reaches_every_process_is_one_request_and_nobodys_death(
    make_study: MakeStudy,
) -> None:
    study = make_study(student=["training.epochs=2000", "training.schedule.milestones=[1999]"])
    alive: list[bool] = []

    def interrupt() -> None:
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline and len(list(study.folder.glob("*/checkpoint.pt"))) < 2:
            time.sleep(0.05)
        workers = multiprocessing.active_children()
        for worker in workers:
            os.kill(worker.pid or 0, signal.SIGINT)
        time.sleep(1.0)
        alive.extend(worker.is_alive() for worker in workers)
        os.kill(os.getpid(), signal.SIGINT)

    thread, console = threading.Thread(target=interrupt), quiet()
    thread.start()
    with pytest.raises(Stopped) as stopped:
        run_ablation(two_of(study), device="cpu", jobs=2, console=console)
    thread.join()
    assert alive == [True, True]
    assert stopped.value.exit_code == 130
    assert "FAILED" not in console.file.getvalue()
    assert len(list(study.folder.glob("*/checkpoint.pt"))) == 2


def test_the_first_to_save_its_checkpoint_cuts_no_other_short(
    make_study: MakeStudy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(slow_loss.FOLDER, str(tmp_path))
    (tmp_path / "seconds").write_text("2")
    slow = "methods.slow=[{loss: ce}, {loss: 'tests.support.slow_loss:slow'}]"
    study = make_study(
        student=["training.epochs=2000", "training.schedule.milestones=[1999]", slow]
    )
    runs = [study.run("ce", 0), study.run("slow", 0), study.run("kd", 0)]
    thread_errors: list[object] = []
    monkeypatch.setattr(threading, "excepthook", thread_errors.append)

    def interrupt() -> None:
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline and not (
            list(study.folder.glob("ce-*/checkpoint.pt")) and (tmp_path / "steps").is_file()
        ):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(Stopped):
        run_ablation(runs, device="cpu", jobs=2, console=quiet())
    thread.join()
    assert len(list(study.folder.glob("slow-*/checkpoint.pt"))) == 1
    assert not thread_errors


@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_is_killed_fails_its_runs_and_nothing_hangs(
    make_study: MakeStudy, victim: int
) -> None:
    study = make_study(student=["training.epochs=2000", "training.schedule.milestones=[1999]"])

    def kill_one() -> None:
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline and len(list(study.folder.glob("*/checkpoint.pt"))) < 2:
            time.sleep(0.05)
        workers = sorted(multiprocessing.active_children(), key=lambda worker: worker.pid or 0)
        workers[victim].kill()  # in the order of their starts

    thread = threading.Thread(target=kill_one)
    thread.start()
    failures = run_ablation(two_of(study), device="cpu", jobs=2, console=quiet())
    thread.join()
    assert len(failures) == 2
    assert all("died (out of memory?)" in failure for failure in failures.values())
    assert len(list(study.folder.glob("*/checkpoint.pt"))) == 2
    assert not multiprocessing.active_children()


def test_a_request_to_stop_survives_the_way_between_processes() -> None:
    again = copy.copy(Stopped(15, "stopped here"))  # made anew in the way that pipes do it
    assert (str(again), again.exit_code) == ("stopped here", 143)
