"""Several processes on this machine as one command: exit status, signals and ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from teach_once.runtime import launch as launcher
from teach_once.runtime.launch import cli, launch
from teach_once.runtime.machine.resources import RENDEZVOUS
from tests.support.project import ROOT

# Each rank notes its process and environment, and each signal; it waits until both have begun.
BEGIN = """
import json, os, pathlib, signal, sys, time
rank, folder = os.environ["RANK"], pathlib.Path(sys.argv[1])
def note(number, frame):
    (folder / f"signal-{rank}-{number}").touch()
    sys.exit(128 + number)
for each in (signal.SIGINT, signal.SIGTERM):
    signal.signal(each, note)
(folder / f"new-{rank}").write_text(json.dumps({**os.environ, "pid": os.getpid()}))
(folder / f"new-{rank}").rename(folder / f"rank-{rank}")
while len(list(folder.glob("rank-*"))) < 2:
    time.sleep(0.01)
"""
WAIT = "time.sleep(60)"


def command(folder: Path, then: str) -> list[str]:
    return [sys.executable, "-IS", "-c", BEGIN + then, str(folder)]


def ranks_in(folder: Path) -> list[dict[str, str]]:
    return [json.loads(each.read_text()) for each in sorted(folder.glob("rank-*"))]


def signals_in(folder: Path) -> set[str]:
    return {each.name for each in folder.glob("signal-*")}


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT is heard: a shell starts its background jobs with that signal ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "_GRACE_SECONDS", 0.0)


def test_launch_where_all_ranks_end_well_returns_zero_and_leaves_no_folder(tmp_path: Path) -> None:
    assert launch(2, command(tmp_path, "")) == 0
    found = ranks_in(tmp_path)
    assert [(each["RANK"], each["LOCAL_RANK"]) for each in found] == [("0", "0"), ("1", "1")]
    assert {(each["WORLD_SIZE"], each["LOCAL_WORLD_SIZE"]) for each in found} == {("2", "2")}
    (folder,) = {Path(each[RENDEZVOUS]).parent for each in found}
    assert not folder.exists()


def test_launch_has_gloo_and_nccl_listen_on_the_loopback_address_whatever_the_user_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    assert launch(2, command(tmp_path, "")) == 0
    for each in ranks_in(tmp_path):
        assert (each["GLOO_SOCKET_IFNAME"], each["NCCL_SOCKET_IFNAME"]) == ("lo", "lo")


@pytest.mark.usefixtures("impatient")
def test_launch_where_a_rank_fails_stops_the_others_and_returns_its_status(tmp_path: Path) -> None:
    assert launch(2, command(tmp_path, f"sys.exit(3) if rank == '1' else {WAIT}")) == 3
    assert signals_in(tmp_path) == {f"signal-0-{signal.SIGTERM:d}"}


@pytest.mark.usefixtures("impatient")
def test_launch_where_a_rank_is_killed_says_so_and_returns_128_and_the_signal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    killed = f"os.kill(os.getpid(), signal.SIGKILL) if rank == '1' else {WAIT}"
    assert launch(2, command(tmp_path, killed)) == 128 + signal.SIGKILL
    assert capsys.readouterr().err == "rank 1 of 2 was killed by SIGKILL\n"
    assert signals_in(tmp_path) == {f"signal-0-{signal.SIGTERM:d}"}


@pytest.mark.usefixtures("impatient")
def test_launch_where_a_rank_ignores_its_signals_kills_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launcher, "_SIGNAL_SECONDS", 0.0)
    deaf = f"signal.signal(signal.SIGTERM, signal.SIG_IGN); {WAIT}"
    assert launch(2, command(tmp_path, f"if rank == '1': sys.exit(2)\n{deaf}")) == 2


@pytest.mark.usefixtures("interruptible")
def test_launch_sends_a_signal_to_every_rank_once(tmp_path: Path) -> None:
    to_all = f"if rank == '0': os.kill(os.getppid(), signal.SIGINT)\n{WAIT}"
    assert launch(2, command(tmp_path, to_all)) == 128 + signal.SIGINT
    assert signals_in(tmp_path) == {f"signal-{rank}-{signal.SIGINT:d}" for rank in (0, 1)}


@pytest.mark.usefixtures("interruptible")
def test_launch_sends_a_signal_that_comes_while_ranks_are_started_to_each_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = launcher._start

    def started(*arguments: object) -> subprocess.Popen[bytes]:
        process = start(*arguments)
        if len(list(tmp_path.glob("started-*"))) == 1:  # the second one, not known to `launch` yet
            wait_until(lambda: len(ranks_in(tmp_path)) == 2)
            os.kill(os.getpid(), signal.SIGINT)
        (tmp_path / f"started-{process.pid}").touch()
        return process

    monkeypatch.setattr(launcher, "_start", started)
    assert launch(2, command(tmp_path, WAIT)) == 128 + signal.SIGINT
    assert signals_in(tmp_path) == {f"signal-{rank}-{signal.SIGINT:d}" for rank in (0, 1)}


def test_ranks_whose_launcher_is_killed_are_stopped(tmp_path: Path) -> None:
    started = f"launch(2, {command(tmp_path, WAIT)!r})"
    program = f"from teach_once.runtime.launch import launch; {started}"
    started = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT)
    wait_until(lambda: len(ranks_in(tmp_path)) == 2)
    started.kill()
    started.wait()
    both = {f"signal-{rank}-{signal.SIGTERM:d}" for rank in (0, 1)}
    wait_until(lambda: signals_in(tmp_path) == both)
    os.rmdir(Path(ranks_in(tmp_path)[0][RENDEZVOUS]).parent)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["two", "-m", "train"], "the number of processes is 'two'"),
        (["0", "-m", "train"], "the number of processes is '0'"),
        ([], "the number of processes is ''"),
        (["2"], "missing program"),
        (["2", "train"], "missing program"),
        (["2", "-m"], "missing program"),
    ],
)
def test_launch_without_a_number_or_program_is_refused_with_a_command(
    arguments: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli(arguments) == 2
    message = capsys.readouterr().err
    assert problem in message
    assert "runtime.launch 2 -m train student" in message
