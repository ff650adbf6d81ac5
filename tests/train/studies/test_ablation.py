"""Ablations: finished runs are skipped, failures are reported, several processes agree."""

from __future__ import annotations

import contextlib
import copy
import io
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rich.console import Console

from teach_once.runtime.command.options import Compute
from teach_once.runtime.errors import Stopped
from teach_once.train.errors import TrainError
from teach_once.train.recording.options import Recording
from teach_once.train.runs.study import Run, Study
from teach_once.train.studies.ablation import run_ablation

MakeStudy = Callable[..., Study]


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


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


@pytest.mark.usefixtures("all_digits")
def test_several_jobs_give_what_one_gives_and_know_of_each_other(
    make_study: MakeStudy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "noting_loss.py").write_text(NOTING_LOSS)
    monkeypatch.syspath_prepend(str(tmp_path))
    first = make_study(student=["methods.own=[{loss: ce}, {loss: 'noting_loss:noting'}]"])

    def notes() -> list[str]:
        return sorted(path.read_text() for path in tmp_path.glob("*.note"))

    runs = [first.run(method, seed) for method in ("ce", "own") for seed in (0, 1)]
    assert run_ablation(runs, Compute("cpu"), Recording(console=quiet())) == {}
    alone = [run.summary for run in runs]
    assert notes() == ["0 of 1"]
    next(tmp_path.glob("*.note")).unlink()
    for run in runs:
        (run.folder / "summary.json").unlink()
    assert run_ablation(runs, Compute("cpu"), Recording(console=quiet()), jobs=2) == {}
    assert notes() in (["0 of 2", "1 of 2"], ["0 of 2"], ["1 of 2"])  # one may train all
    for ours, run in zip(alone, runs, strict=True):
        assert ours is not None
        assert run.summary is not None
        assert ours["last"] == pytest.approx(run.summary["last"], abs=1.0)


def test_a_run_that_fails_stops_no_other_and_is_named(make_study: MakeStudy) -> None:
    study = make_study(student=["methods.bad=[{loss: ce, weight: 1e38}]"])
    console = quiet()
    bad, good = study.run("bad", 0), study.run("ce", 0)
    failures = run_ablation([bad, good], Compute("cpu"), Recording(console=console))
    assert list(failures) == [bad]
    assert not bad.is_finished
    assert "Diverged: the loss became" in failures[bad]
    assert "Traceback" not in failures[bad]
    summary = good.summary
    assert summary is not None
    assert "bad          seed 0  FAILED: Diverged" in console.file.getvalue()
    assert list(run_ablation([bad, good], Compute("cpu"), Recording(console=console))) == [bad]
    assert good.summary == summary
    assert "1 of 2 runs already finished" in console.file.getvalue()


def test_an_unexpected_failure_keeps_its_traceback(
    make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("teach_once.train.sessions.student.train_run", lambda *_, **__: 1 / 0)
    run = make_study().run("ce", 0)
    failures = run_ablation([run], Compute("cpu"), Recording(console=quiet()))
    assert failures[run].startswith("ZeroDivisionError: division by zero\nTraceback")


def test_a_method_that_cannot_work_stops_everything_before_it_starts(make_study: MakeStudy) -> None:
    study = make_study(student=["methods.at=[{loss: at}]"])
    with pytest.raises(TrainError, match=r"methods\.at needs the taps attention1"):
        run_ablation(
            [study.run("ce", 0), study.run("at", 0)], Compute("cpu"), Recording(console=quiet())
        )
    assert not list(study.runs_dir.glob("*/*"))


PACED_LOSSES = """
import time
from pathlib import Path
from teach_once.train.terms import Batch, loss_term

def pause(name: str, seconds: float) -> None:
    with Path(__file__).with_name(name).open("a") as steps:
        steps.write("x")
    time.sleep(seconds)

@loss_term(teacher_taps=["logits"])
def paced(batch: Batch):
    pause("paced", 0.1)
    return (batch.logits - batch.teacher["logits"]).square().mean()

@loss_term(teacher_taps=["logits"])
def slow(batch: Batch):
    pause("slow", 2)
    return (batch.logits - batch.teacher["logits"]).square().mean()
"""


@pytest.fixture
def paced(
    forks: None, make_study: MakeStudy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Study:
    """Its methods take minutes, most of them asleep: a run that nobody stops is an error."""
    (tmp_path / "paced_losses.py").write_text(PACED_LOSSES)
    monkeypatch.syspath_prepend(str(tmp_path))
    terms = {"one": "paced", "two": "paced", "slow": "slow"}
    return make_study(
        student=[
            *("training.epochs=300", "training.schedule.milestones=[299]"),
            *(f"methods.{name}=[{{loss: 'paced_losses:{loss}'}}]" for name, loss in terms.items()),
        ]
    )


def two_of(study: Study) -> list[Run]:
    return [study.run("one", 0), study.run("two", 0)]


def checkpoints(study: Study, runs: str = "*") -> list[Path]:
    return list(study.folder.glob(f"{runs}/checkpoint.pt"))


@contextlib.contextmanager
def doing(act: Callable[[], None], when: Callable[[], bool]) -> Iterator[None]:
    """Call `act` once `when` is true, beside what is done within; raise its error at the end."""
    errors: list[BaseException] = []
    has_ended = threading.Event()

    def wait_and_act() -> None:
        try:
            while not when():
                assert not has_ended.wait(0.05), "it ended before its time"
            act()
        except BaseException as error:
            errors.append(error)
            if not has_ended.is_set():
                os.kill(os.getpid(), signal.SIGTERM)  # rather than train to the end

    thread = threading.Thread(target=wait_and_act)
    thread.start()
    try:
        yield
    finally:
        has_ended.set()
        thread.join()
    if errors:
        raise errors[0]


def stop_this_process() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def pids_of_workers() -> list[int]:
    """In the order of their starts."""
    return sorted(worker.pid or 0 for worker in multiprocessing.active_children())


def test_a_signal_is_passed_on_and_every_run_is_kept(paced: Study) -> None:
    with (
        doing(stop_this_process, when=lambda: len(checkpoints(paced)) == 2),
        pytest.raises(Stopped) as stopped,
    ):
        run_ablation(two_of(paced), Compute("cpu"), Recording(console=quiet()), jobs=2)
    assert stopped.value.exit_code == 143
    assert not multiprocessing.active_children()
    assert len(checkpoints(paced)) == 2
    assert not list(paced.folder.glob("*/summary.json"))


def test_ctrl_c_which_reaches_every_process_is_one_request_and_nobodys_death(paced: Study) -> None:
    console = quiet()
    alive: list[bool] = []

    def interrupt() -> None:
        pids = pids_of_workers()
        for pid in pids:
            os.kill(pid, signal.SIGINT)
        time.sleep(1.0)
        alive.extend(Path(f"/proc/{pid}").exists() for pid in pids)
        os.kill(os.getpid(), signal.SIGINT)

    with (
        doing(interrupt, when=lambda: len(checkpoints(paced)) == 2),
        pytest.raises(Stopped) as stopped,
    ):
        run_ablation(two_of(paced), Compute("cpu"), Recording(console=console), jobs=2)
    assert alive == [True, True]
    assert stopped.value.exit_code == 130
    assert "FAILED" not in console.file.getvalue()
    assert len(checkpoints(paced)) == 2


def test_the_first_to_save_its_checkpoint_cuts_no_other_short(
    paced: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [paced.run(method, 0) for method in ("one", "slow", "two")]
    thread_errors: list[object] = []
    monkeypatch.setattr(threading, "excepthook", thread_errors.append)

    def is_time() -> bool:
        return bool(checkpoints(paced, "one-*")) and (tmp_path / "slow").is_file()

    with doing(stop_this_process, when=is_time), pytest.raises(Stopped):
        run_ablation(runs, Compute("cpu"), Recording(console=quiet()), jobs=2)
    assert len(checkpoints(paced, "slow-*")) == 1
    assert not thread_errors


@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_is_killed_fails_its_runs_and_nothing_hangs(
    paced: Study, victim: int
) -> None:
    def kill_one() -> None:
        os.kill(pids_of_workers()[victim], signal.SIGKILL)

    with doing(kill_one, when=lambda: len(checkpoints(paced)) == 2):
        failures = run_ablation(two_of(paced), Compute("cpu"), Recording(console=quiet()), jobs=2)
    assert len(failures) == 2
    assert all("died (out of memory?)" in failure for failure in failures.values())
    assert len(checkpoints(paced)) == 2
    assert not multiprocessing.active_children()


def test_a_request_to_stop_survives_the_way_between_processes() -> None:
    again = copy.copy(Stopped(15, "stopped here"))  # made anew in the way that pipes do it
    assert (str(again), again.exit_code) == ("stopped here", 143)
