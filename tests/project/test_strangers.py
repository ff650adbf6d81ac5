"""Files from strangers: no traceback, signal, hang or exhaustion, nothing touched outside, no lie.

The programs of tests/support do the work, each in a process of its own; by hand they run longer:
`python -m tests.support.attacks.strangers --cases 20000`, `flipped_bits`, `killed_commands`.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.attacks.strangers.cases import Case, run_case
from tests.support.attacks.strangers.changes.change import Change
from tests.support.attacks.strangers.changes.documents import Document
from tests.support.attacks.strangers.commands import Command
from tests.support.attacks.strangers.sandbox import Outcome
from tests.support.attacks.strangers.world import make_world
from tests.support.programs.processes import run


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("strangers") / "template")


def by_hand(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A program of tests/support, as one runs it by hand."""
    return run(f"tests.support.attacks.{program}", *arguments)


def test_changed_files_break_no_promise(world: Path) -> None:
    done = by_hand("strangers", "--cases", "24", "--world", str(world))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "24 cases" in done.stdout


@pytest.mark.long
def test_many_changed_files_break_no_promise(world: Path) -> None:
    done = by_hand("strangers", "--cases", "3000", "--seed", "1", "--world", str(world))
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.long
def test_many_flipped_bits_of_any_file_are_noticed_or_harmless(world: Path) -> None:
    done = by_hand("flipped_bits", "--most", "200", "--seed", "1", "--world", str(world))
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.long
def test_commands_killed_often_leave_nothing_half_written(world: Path) -> None:
    done = by_hand("killed_commands", "--kills", "15", "--seed", "1", "--world", str(world))
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_flipped_bit_of_any_file_is_noticed_or_harmless(world: Path) -> None:
    done = by_hand("flipped_bits", "--most", "12", "--world", str(world))
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_killed_command_leaves_nothing_half_written_under_its_name(world: Path) -> None:
    done = by_hand("killed_commands", "--kills", "1", "--world", str(world))
    assert done.returncode == 0, done.stdout + done.stderr


# ---- the judge can find each of these


def crash() -> int:
    raise ValueError("a crash")


def kill_itself() -> int:
    os.kill(os.getpid(), signal.SIGSEGV)
    return 0


def spin() -> int:
    while True:
        pass


def take_memory() -> int:
    return len(bytearray(2**31))


def color() -> int:
    print("\x1b[31mred")
    return 0


def write_beside() -> int:
    Path("../outside/victim").write_text("changed")
    return 0


def write_elsewhere() -> int:
    Path("PWNED").touch()
    return 0


def tell_a_secret() -> int:
    print(Path("../outside/victim").read_text())
    return 0


def fail_without_a_word() -> int:
    return 2


@pytest.mark.parametrize(
    ("work", "fault"),
    [
        (crash, "traceback: ValueError: a crash"),
        (kill_itself, "ended by SIGSEGV"),
        (spin, "ended by SIG(KILL|XCPU)|no end after"),  # on a busy machine
        (take_memory, "MemoryError"),
        (color, "escape sequence"),
        (write_beside, "touches 'victim' outside"),
        (write_elsewhere, "changes 'PWNED'"),
        (tell_a_secret, "content of a foreign file"),
        (fail_without_a_word, "without an error message"),
    ],
)
def test_the_judge_finds_a_command_that(
    work: Callable[[], int], fault: str, world: Path, tmp_path: Path
) -> None:
    command = Command("bad", lambda arguments: work(), ())
    document = Document("none", "t.yaml", lambda file: (), ("bad",))
    case = Case(document, Change("none", "none", lambda path: None), command)
    verdict = run_case(case, world, tmp_path / "case", Outcome(0, 0, "", 0.0, 0))
    assert re.search(fault, "; ".join(verdict.faults)), verdict
