"""python -m runtime.launch NPROC -m PROGRAM ...    run a program in NPROC processes of this machine

python -m runtime.launch 2 -m train student digits-resnet8 --method cd

Replaces `torchrun --standalone` without opening a port to other machines: the processes find each
other through a file in a private folder, and gloo and nccl listen on the loopback address only.
Signals are forwarded to every process. If one process fails or is killed, the others are stopped
and its exit status is returned. Restarts and several machines are not supported; use torchrun.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from teach_once.runtime.command.program import in_repository, program_text
from teach_once.runtime.errors import UserError
from teach_once.runtime.machine.resources import RENDEZVOUS

# Time for the other processes to end by themselves, then after a signal.
_GRACE_SECONDS, _SIGNAL_SECONDS, _POLL_SECONDS = 5.0, 30.0, 0.05
_SET_PARENT_DEATH_SIGNAL = 1  # option of prctl(2)
# The programs save and stop on SIGINT and SIGTERM, and here also when the terminal is closed.
_FORWARDED = {
    signal.SIGINT: signal.SIGINT,
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGHUP: signal.SIGTERM,
}


def launch(
    num_processes: int, command: Sequence[str], variables: Mapping[str, str] | None = None
) -> int:
    """Run a command in `num_processes` processes.

    Returns the exit status of the first process that fails: 0 if none fails, 128 + n if it is
    killed by signal n. variables: added to the environment.
    """
    variables = variables or {}
    folder = tempfile.mkdtemp(prefix="teach-once-ranks-")  # mode 0700
    processes: list[subprocess.Popen[bytes]] = []
    try:
        with _forwarding_signals(processes) as received:
            for rank in range(num_processes):
                if received:
                    break
                processes.append(_start(command, rank, num_processes, Path(folder), variables))
                for number, num_told in received:
                    if num_told <= rank:  # the signal came while this process was being started
                        processes[rank].send_signal(_FORWARDED[number])
            return _wait(processes) or (128 + received[0][0] if received else 0)
    finally:
        for process in processes:
            process.kill()
            process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _start(
    command: Sequence[str],
    rank: int,
    num_processes: int,
    folder: Path,
    variables: Mapping[str, str],
) -> subprocess.Popen[bytes]:
    environment = {
        **variables,
        **{"RANK": str(rank), "WORLD_SIZE": str(num_processes)},
        **{"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(num_processes)},
        **{"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"},
        RENDEZVOUS: str(folder / "store"),
    }
    parent = os.getpid()
    # In a new session, so that Ctrl-C reaches each process once, through this one.
    return subprocess.Popen(
        command,
        env={**os.environ, **environment},
        start_new_session=True,
        preexec_fn=lambda: _end_with(parent),
    )


def _end_with(parent: int) -> None:
    """Ask the kernel to send SIGTERM to this process when its parent ends, even by SIGKILL."""
    ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(128 + signal.SIGTERM)


@contextmanager
def _forwarding_signals(
    processes: Sequence[subprocess.Popen[bytes]],
) -> Iterator[list[tuple[signal.Signals, int]]]:
    """Forward signals to the processes; yields received signals with their number of recipients."""
    received: list[tuple[signal.Signals, int]] = []

    def forward(number: int, frame: FrameType | None) -> None:
        received.append((signal.Signals(number), len(processes)))
        for process in processes:
            process.send_signal(_FORWARDED[signal.Signals(number)])

    heard = [each for each in _FORWARDED if signal.getsignal(each) is not signal.SIG_IGN]
    before = {number: signal.signal(number, forward) for number in heard}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(processes: Sequence[subprocess.Popen[bytes]]) -> int:
    """Wait for all processes, stopping all after a failure; returns the first failure's status."""
    status, until, last = 0, float("inf"), signal.SIGTERM
    while True:
        running = [process for process in processes if process.poll() is None]
        if not status and (status := _first_failure(processes)):
            until = time.monotonic() + _GRACE_SECONDS
        if not running:
            return status
        if time.monotonic() > until:
            for process in running:
                process.send_signal(last)
            until, last = time.monotonic() + _SIGNAL_SECONDS, signal.SIGKILL
        time.sleep(_POLL_SECONDS)


def _first_failure(processes: Sequence[subprocess.Popen[bytes]]) -> int:
    """Return the exit status of a failed process, 0 if there is none; reports a killed process."""
    ended = [(process.returncode, rank) for rank, process in enumerate(processes)]
    code, rank = min(((code, rank) for code, rank in ended if code), default=(0, 0))
    if code >= 0:
        return code
    name = signal.Signals(-code).name
    print(f"rank {rank} of {len(processes)} was killed by {name}", file=sys.stderr)
    return 128 - code


def _command(arguments: Sequence[str]) -> tuple[int, list[str]]:
    """Parse the number of processes and the command. Raises UserError if they are invalid."""
    usage = f"{program_text('runtime.launch')} 2 -m train student digits-resnet8 --method cd"
    number, option, *words = *arguments, "", ""
    words = [*arguments[2:]]
    if not number.isdecimal() or not 1 <= int(number) <= 4096:
        raise UserError(
            f"the number of processes is {number!r}, expected an integer from 1 to 4096",
            fix=f"with make: NPROC=2; {usage}",
        )
    if option != "-m" or not words:
        raise UserError("missing program", fix=usage)
    installed = Path(sys.executable).with_name("teach-once")
    if in_repository() or not installed.exists():
        return int(number), [sys.executable, "-m", *words]
    return int(number), [str(installed), *words]


def cli(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] in (["-h"], ["--help"]):
        print(__doc__)
        return 0
    try:
        return launch(*_command(given))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(cli())
