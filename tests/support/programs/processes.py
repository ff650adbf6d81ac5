"""Run programs of the project in processes that need not import torch each time.

They are forks of one process that has imported all that programs need (Python's forkserver). They
have an interface like `subprocess.Popen`, can be signaled and killed, and end as `python -m` would.
Tests of the start of Python or of imports use `sys.executable` instead.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Mapping
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

from tests.support.project import ROOT, make

# No `__main__`: runpy warns about an already imported one.
PRELOADED = [
    *(
        "torch._dynamo",  # imported by the first step of any optimizer
        "teach_once.nets.networks.timm_models",
        "teach_once.precompute.run_pass",
        "teach_once.precompute.ray_driver",
        "precompute.verify",
    ),
    *(
        "teach_once.train.sessions.student",
        "teach_once.train.sessions.teacher",
        "teach_once.train.sessions.joint",
        "teach_once.train.sessions.trial",
        "teach_once.train.studies.ray_study",
    ),
    *(
        "teach_once.train.recording.export",
        "teach_once.report.write",
        "teach_once.views.pixels.streaming",
        "torch.distributed",
    ),
    *(
        "tests.support.programs.killed_pass",
        "tests.support.training.gloo",
        "tests.support.slow_loss",
        "tests.support.shortened",
    ),
]


def prepare_forks() -> None:
    """Make Python's forkserver import these modules once, before its first fork.

    It silently skips modules that it cannot import. It starts in the current folder, which a test
    may have changed, so it is started in the project's folder.
    """
    multiprocessing.set_forkserver_preload(PRELOADED)
    server = forkserver._forkserver  # type: ignore[attr-defined]
    ensure_running = server.ensure_running

    def ensure_running_at_root() -> None:
        with contextlib.chdir(ROOT):
            ensure_running()

    server.ensure_running = ensure_running_at_root


def start_fork_server() -> str:
    """Start the server that all workers of xdist use; return its address."""
    server = forkserver._forkserver  # type: ignore[attr-defined]
    server.ensure_running()
    return str(server._forkserver_address)


def use_fork_server(address: str) -> None:
    """Have this process's forks made by the server of another one, which outlives it."""
    server = forkserver._forkserver  # type: ignore[attr-defined]
    server._forkserver_address = address
    server._forkserver_alive_fd = os.open(os.devnull, os.O_WRONLY)  # its owner keeps it alive
    server.ensure_running = resource_tracker.ensure_running


class _ForkHere(ForkServerProcess):
    """A fork with this process's environment, instead of the server's older one."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._environment = dict(os.environ)

    def run(self) -> None:
        os.environ.clear()
        os.environ.update(self._environment)
        super().run()


class Forks(ForkServerContext):
    """A replacement of `multiprocessing.get_context("spawn")` without seconds of imports."""

    Process = _ForkHere


class Started:
    """A running program. Its output goes to files, so that it never waits for a reader."""

    def __init__(
        self,
        module: str,
        words: tuple[str, ...],
        *,
        cwd: Path = ROOT,
        env: Mapping[str, str] | None = None,
        merged: bool = False,
    ) -> None:
        folder = Path(tempfile.mkdtemp(prefix="program-"))
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        self._files = folder / "out", folder / ("out" if merged else "err")
        environment = dict(os.environ if env is None else env)
        self._process = multiprocessing.get_context("forkserver").Process(
            target=_run, args=(module, words, str(cwd), environment, *map(str, self._files))
        )
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("a program", timeout or 0)
        return self._process.exitcode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for the end and return (stdout, stderr)."""
        self.wait(timeout)
        out, err = self._files
        return out.read_text(), "" if err == out else err.read_text()

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def start(
    module: str,
    *words: str,
    cwd: Path = ROOT,
    env: Mapping[str, str] | None = None,
    merged: bool = False,
) -> Started:
    """Start `python -m module words`. merged: redirect stderr to stdout.

    module: or a file, as in `python file.py words`.
    """
    return Started(module, words, cwd=cwd, env=env, merged=merged)


def run(
    module: str, *words: str, cwd: Path = ROOT, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `python -m module words` to its end."""
    process = start(module, *words, cwd=cwd, env=env)
    out, err = process.communicate()
    assert process.returncode is not None
    return subprocess.CompletedProcess([module, *words], process.returncode, out, err)


def make_in_forks(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run the programs that `make` with these arguments would start, each as a fork.

    Ends with the first that fails. Tests of make itself, or of a shell, call `project.make`.
    """
    shown = make("-n", *arguments, cwd=cwd)
    assert shown.returncode == 0, shown.stderr
    lines = shown.stdout.replace("\\\n", " ").splitlines()
    calls = [shlex.split(line) for line in lines if line.startswith(".venv/bin/python -m ")]
    assert calls, shown.stdout
    out = err = ""
    for _, _, module, *words in calls:
        ended = run(module, *words, cwd=cwd)
        out, err = out + ended.stdout, err + ended.stderr
        if ended.returncode:
            break
    return subprocess.CompletedProcess(["make", *arguments], ended.returncode, out, err)


def _run(
    module: str, words: tuple[str, ...], cwd: str, environment: dict[str, str], out: str, err: str
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    for number, file in ((1, out), (2, err)):
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, number)
        os.close(descriptor)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = [module, *words]
    sys.path.insert(0, cwd)
    multiprocessing.set_start_method("fork", force=True)  # as in a process that is not a fork
    if module.endswith(".py"):
        runpy.run_path(module, run_name="__main__")
    else:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
