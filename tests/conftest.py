"""Small real objects shared by many tests: a trained digits teacher and its caches."""

from __future__ import annotations

import fcntl
import functools
import gc
import io
import multiprocessing
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from PIL import Image
from rich.console import Console

from teach_once.configs.load import load_student, load_teacher
from teach_once.configs.schema import StudentConfig, TeacherConfig
from teach_once.runtime.command import user_code
from teach_once.runtime.command.options import Compute
from teach_once.train.recording.options import Recording
from teach_once.train.runs.study import Study, open_study
from teach_once.train.sessions.teacher import train_teacher
from tests.support import shortened
from tests.support.caches.random_cache import fill
from tests.support.caches.teacher_cache import CachesMadeOnce
from tests.support.programs.processes import (
    Forks,
    prepare_forks,
    start_fork_server,
    use_fork_server,
)
from tests.support.project import QUICK_ARGS, QUICK_RUN, copy_project, make
from tests.support.selection import ByGroup, arrange
from tests.support.training.written_run import write_finished_run

if TYPE_CHECKING:
    from xdist.remote import Producer
    from xdist.workermanage import WorkerController

    from tests.support.caches.object_store import Server

prepare_forks()

# Compiling the project and rewriting the tests' assertions anew, in every worker and every program
# that a test starts, would cost more than many of the tests. Bytecode of earlier calls is used.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# One thread: these networks are too small for more, and tests share the machine.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"
# `train.cli.options` sets it for a program, before torch is loaded: too late in a fork of one that
# has.
os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"
# As in an activated environment: the commands in messages begin with `python`.
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

# A busy machine is slow, which says nothing of the code.
# The same examples every time: a failure then belongs to the change that brought it.
settings.register_profile(
    "here", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("here")


# Modules that are loaded live on: nothing in them is worth a search, now or in a later collection.
gc.disable()


def pytest_configure(config: pytest.Config) -> None:
    if (given := getattr(config, "workerinput", None)) is not None:
        use_fork_server(given["fork_server"])


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: WorkerController) -> None:
    node.workerinput["fork_server"] = start_fork_server()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    arrange(items)


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


@pytest.hookimpl(optionalhook=True)  # without xdist there is no such hook
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> ByGroup:
    return ByGroup(config, log)


@pytest.fixture
def all_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """As programs that a test starts read the digits: see `shortened`."""
    monkeypatch.setenv(shortened.ALL_DIGITS, "1")


@pytest.fixture(autouse=True)
def forget_modules_of_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Forget modules that a test wrote: another test may write one of the same name."""
    count = len(sys.modules)
    yield
    written = str(tmp_path_factory.getbasetemp())
    for name in list(sys.modules)[count:]:
        if (getattr(sys.modules[name], "__file__", None) or "").startswith(written):
            del sys.modules[name]
    user_code._promised.clear()


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=200)


@pytest.fixture(scope="session")
def teacher_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A resnet8 trained for three epochs: right often, and wrong often enough for GKD to matter.

    All workers of xdist use the one that the first of them trains.
    """
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "teacher_weights"
    folder.mkdir(exist_ok=True)
    path = folder / "teacher.pt"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "is_trained").exists():
            config = load_teacher(
                "digits-resnet20",
                ["teacher.arch=resnet8", f"teacher.weights={path}", "training.epochs=3"],
            )
            train_teacher(config, Compute("cpu"), Recording(console=Console(file=io.StringIO())))
            (folder / "is_trained").touch()
    return path


@pytest.fixture(scope="session")
def small_teacher(teacher_weights: Path) -> Callable[..., TeacherConfig]:
    """A teacher config on 60 digits with three views; more overrides may follow."""

    def make(*overrides: str) -> TeacherConfig:
        return load_teacher(
            "digits-resnet20",
            [
                "teacher.arch=resnet8",
                f"teacher.weights={teacher_weights}",
                "dataset.max_per_class=6",
                "views.count=3",
                "taps.attention=null",
                "taps.hint=null",
                *overrides,
            ],
        )

    return make


@pytest.fixture(scope="session")
def student_overrides() -> list[str]:
    """They make digits-resnet8 a run of four epochs of four steps."""
    return [
        "training.epochs=4",
        "training.batch_size=16",
        "training.learning_rate=0.01",
        "training.schedule.milestones=[2]",
        "methods.cd+gkd+edt.0.start_epoch=2",
        "methods.cd+gkd+edt.1.start_epoch=2",
    ]


@pytest.fixture(scope="session")
def small_student(student_overrides: list[str]) -> Callable[..., StudentConfig]:
    """A student config of four epochs of four steps; more overrides may follow."""

    def make(*overrides: str) -> StudentConfig:
        return load_student("digits-resnet8", [*student_overrides, *overrides])

    return make


@pytest.fixture(scope="session")
def caches_made_once(tmp_path_factory: pytest.TempPathFactory) -> CachesMadeOnce:
    return CachesMadeOnce(tmp_path_factory.mktemp("caches_made_once"))


@pytest.fixture
def make_study(
    small_teacher: Callable[..., TeacherConfig],
    small_student: Callable[..., StudentConfig],
    caches_made_once: CachesMadeOnce,
    tmp_path: Path,
) -> Callable[..., Study]:
    """A study with its cache made; overrides for the teacher and for the student."""

    def make(teacher: Sequence[str] = (), student: Sequence[str] = ()) -> Study:
        config = small_teacher(*teacher)
        caches_made_once.copy_into(config, tmp_path / "caches")
        return open_study(
            small_student(*student),
            config,
            caches_dir=tmp_path / "caches",
            runs_dir=tmp_path / "runs",
        )

    return make


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of ten images of different sizes to train on, two to test with."""
    root, rng = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    for split, count in (("train", 10), ("test", 2)):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                height, width = rng.integers(12, 40, 2)
                image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
                Image.fromarray(image).save(root / split / name / f"{number}.png")
    return root


@pytest.fixture
def cached(
    small_teacher: Callable[..., TeacherConfig], caches_made_once: CachesMadeOnce, tmp_path: Path
) -> list[str]:
    """Arguments that point a digits-resnet8 run at a small cache and a temporary runs folder."""
    config = small_teacher("taps.attention=float16", "taps.hint={stage: stage2}")
    caches_made_once.copy_into(config, tmp_path / "caches")
    return [
        "--caches",
        str(tmp_path / "caches"),
        "--runs",
        str(tmp_path / "runs"),
        *QUICK_RUN,
        "teacher.teacher.arch=resnet8",
        f"teacher.teacher.weights={config.teacher.weights}",
        "teacher.dataset.max_per_class=6",
        "teacher.views.count=3",
    ]


@pytest.fixture
def write_run(tmp_path: Path) -> Callable[..., Path]:
    """Writes the files of a finished run of the student `small`."""
    return functools.partial(write_finished_run, tmp_path)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the project that shares this environment."""
    return copy_project(tmp_path / "checkout")


@pytest.fixture(scope="session")
def trained_checkout(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A copy of the project after its first `make train-student`, and what that printed."""
    project = copy_project(tmp_path_factory.mktemp("project") / "checkout")
    return project, make("train-student", QUICK_ARGS, cwd=project)


@pytest.fixture(scope="session")
def small_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of tests.support.caches.random_cache. To be changed, it is copied."""
    return fill(tmp_path_factory.mktemp("small_cache") / "t-e4812202")


@pytest.fixture
def cache_to_forge(small_cache: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return shutil.copytree(small_cache, tmp_path / "caches" / small_cache.name)


@pytest.fixture(scope="module")
def running_server() -> Iterator[Server]:
    """An object store on this machine; see `tests.support.caches.object_store`."""
    from tests.support.caches.object_store import running

    with running() as server:
        yield server


@pytest.fixture
def server(running_server: Server) -> Iterator[Server]:
    """The store with an empty bucket."""
    from tests.support.caches.object_store import emptied

    with emptied(running_server):
        yield running_server


@pytest.fixture
def forks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the code spawns processes, they are forks of one that has imported torch."""
    context_of = multiprocessing.get_context

    def forking(method: str | None = None) -> BaseContext:
        return Forks() if method == "spawn" else context_of(method)

    monkeypatch.setattr(multiprocessing, "get_context", forking)


@pytest.fixture
def spool(tmp_path: Path) -> Path:
    """Where a pass to a store keeps the records of unfinished blocks."""
    return tmp_path / "spool"
