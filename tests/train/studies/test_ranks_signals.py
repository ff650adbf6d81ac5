"""Multi-process runs that are stopped, killed, rejected and resumed, as under torchrun."""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from teach_once.runtime.machine.resources import RENDEZVOUS
from teach_once.train.cli.commands import cli
from tests.support import slow_loss
from tests.support.programs.processes import Started, start
from tests.support.project import ROOT
from tests.support.training.rank_training import SECONDS, run_ranks
from tests.support.training.training_runs import without_times

LOSS = "{loss: 'tests.support.slow_loss:slow'}"
# Four epochs of four steps; a learning rate that does not amplify rounding.
STUDENT = [
    *("training.epochs=4", "training.batch_size=16", "training.learning_rate=1e-3"),
    f"methods.slow=[{{loss: ce}}, {LOSS}]",
]
NUM_STEPS = 4 * 4


# A run goes from processes that are forks of one that reads fewer digits to others, and back.
pytestmark = pytest.mark.usefixtures("all_digits")


@pytest.fixture
def command(cached: list[str]) -> list[str]:
    """Trains a student whose steps take as long as a file says."""
    arguments = ["student", "digits-resnet8", "--method", "slow", "--device", "cpu", *cached]
    return ["-m", "train", *arguments, *STUDENT]


@pytest.fixture
def steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that gets a character per step and rank; its folder says how long steps take."""
    monkeypatch.setenv(slow_loss.FOLDER, str(tmp_path))
    (tmp_path / "seconds").write_text("0.15")
    return tmp_path / "steps"


def torchrun(world: int, command: Sequence[str], *options: str) -> subprocess.Popen[str]:
    run = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}", *options]
    return started([*run, *command])


def launched(world: int, command: Sequence[str]) -> subprocess.Popen[str]:
    """As `make train-student NPROC=world` starts it."""
    return started(["-m", "runtime.launch", str(world), *command])


def started(command: Sequence[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def output_of(process: subprocess.Popen[str] | Started) -> str:
    """All that it prints until it ends; the launcher ends its ranks where they hang."""
    try:
        return process.communicate(timeout=SECONDS)[0]
    except subprocess.TimeoutExpired:
        process.terminate()
        process.communicate()
        raise


def wait_for(steps: Path, number: int, process: subprocess.Popen[str] | Started) -> None:
    """Until so many steps were taken, counted on each rank."""
    deadline = time.monotonic() + SECONDS
    while not steps.exists() or steps.stat().st_size < number:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def rank_pids(launcher: subprocess.Popen[str]) -> list[int]:
    """The processes that the launcher has started, in the order of their ranks."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    ranks = {int(environment_of(pid)["RANK"]): pid for pid in map(int, children)}
    return [ranks[rank] for rank in sorted(ranks)]


def environment_of(pid: int) -> dict[str, str]:
    pairs = Path(f"/proc/{pid}/environ").read_text().split("\0")
    return {name: value for name, _, value in (each.partition("=") for each in pairs)}


def listening_addresses(pids: Sequence[int]) -> set[str]:
    """Where these processes accept TCP connections, as /proc/net writes addresses."""
    sockets = set()
    for pid in pids:
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                sockets.add(os.readlink(descriptor))
    tables = [Path(f"/proc/net/tcp{version}").read_text() for version in ("", "6")]
    lines = [line.split() for table in tables for line in table.splitlines()]
    listening = [line for line in lines if line[3] == "0A"]
    return {line[1].split(":")[0] for line in listening if f"socket:[{line[9]}]" in sockets}


LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}


def folder_of(cached: list[str]) -> Path:
    (folder,) = Path(cached[cached.index("--runs") + 1]).glob("digits-resnet8/slow-seed0-*")
    return folder


@pytest.fixture
def uninterrupted(command: list[str], tmp_path: Path) -> list[dict[str, object]]:
    """The metrics of the run that nobody stopped, trained by one process."""
    runs = tmp_path / "elsewhere"
    assert cli([*command[2:], "--runs", str(runs)]) == 0
    (folder,) = runs.glob("digits-resnet8/slow-seed0-*")
    return without_times(folder)


def assert_as(found: list[dict[str, object]], expected: list[dict[str, object]]) -> None:
    assert len(found) == len(expected) == 4
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for key, value in one.items():
            if key == "test":  # of percentages, an image or two may change sides
                assert value.keys() == other[key].keys()
                for name, each in value.items():
                    how = {"rel": 1e-4} if name == "teacher_kl" else {"abs": 0.3}
                    assert each == pytest.approx(other[key][name], **how)
            elif key == "losses" or isinstance(value, float):
                assert value == pytest.approx(other[key], rel=1e-4)
            else:
                assert value == other[key]


def test_a_signal_or_kill_of_any_rank_stops_all_and_any_number_of_ranks_resumes(
    command: list[str], cached: list[str], uninterrupted: list[dict[str, object]], steps: Path
) -> None:
    two = launched(2, command)
    wait_for(steps, 2 * 2, two)
    pids = rank_pids(two)
    assert LOOPBACK >= listening_addresses([two.pid, *pids]) > set()
    meeting = Path(environment_of(pids[0])[RENDEZVOUS])
    assert stat.S_IMODE(meeting.parent.stat().st_mode) == 0o700
    os.kill(pids[1], signal.SIGTERM)
    output = output_of(two)
    assert two.returncode == 128 + signal.SIGTERM, output
    assert output.count("stopped in epoch 1 after step") == 1, output
    assert "Traceback" not in output
    assert not meeting.parent.exists()
    state = torch.load(folder_of(cached) / "checkpoint.pt", weights_only=True)
    assert state["epoch"] == 0
    taken = state["partial"]["step"]
    assert steps.stat().st_size == 2 * taken  # both ranks stopped after the same step

    one = start(*command[1:], merged=True)
    wait_for(steps, 2 * taken + 4, one)
    one.send_signal(signal.SIGTERM)
    output = output_of(one)
    assert one.returncode == 128 + signal.SIGTERM, output

    two = launched(2, command)
    wait_for(steps, steps.stat().st_size + 4, two)
    os.kill(rank_pids(two)[1], signal.SIGKILL)
    output = output_of(two)
    assert two.returncode == 128 + signal.SIGKILL, output
    assert "rank 1 of 2 was killed by SIGKILL" in output
    assert "rank 0 of 2 lost another process of this run" in output
    assert "Traceback" not in output

    (steps.parent / "seconds").write_text("0")
    outcomes = run_ranks(2, command)
    assert [code for code, _ in outcomes] == [0, 0], outcomes
    assert_as(without_times(folder_of(cached)), uninterrupted)
    assert not (folder_of(cached) / "checkpoint.pt").exists()


@pytest.mark.long
def test_a_killed_rank_is_started_again_by_torchrun_and_the_run_is_resumed(
    command: list[str], cached: list[str], uninterrupted: list[dict[str, object]], steps: Path
) -> None:
    two = torchrun(2, [*command, "--checkpoint-minutes", "0"], "--max-restarts=1")
    wait_for(steps, 2 * 6, two)
    os.kill(rank_pids(two)[1], signal.SIGKILL)
    (steps.parent / "seconds").write_text("0")
    output = output_of(two)
    assert two.returncode == 0, output
    assert "resuming after epoch 1 of 4" in output
    assert steps.stat().st_size < 2 * (NUM_STEPS + 6), "the run began again"
    assert_as(without_times(folder_of(cached)), uninterrupted)


def test_an_error_of_all_ranks_is_said_once(command: list[str]) -> None:
    outcomes = run_ranks(2, [*command, "training.batch_size=59"])
    assert [code for code, _ in outcomes] == [2, 2]
    output = "".join(text for _, text in outcomes)
    assert output.count("error:") == 1, output
    assert "has a batch without a sample for each of 2 processes" in output
    assert "fix: set training.batch_size=60, or use fewer processes" in output


def test_an_error_of_one_rank_ends_the_others_and_is_said_once(
    command: list[str], tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    runs.write_text("a file where rank 0 wants its folder")
    outcomes = run_ranks(2, command)
    assert [code for code, _ in outcomes] == [2, 2]
    output = "".join(text for _, text in outcomes)
    assert output.count("error:") == 1, output
    assert str(runs) in output


def test_an_ablation_is_not_trained_by_every_process_of_a_launcher(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "x",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    assert cli(["ablation", "digits-resnet8", *command[command.index("--caches") :]]) == 2
    assert "started in several processes" in capsys.readouterr().err
