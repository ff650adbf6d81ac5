"""A study on a Ray cluster: nodes die and runs resume, with the results of separate runs."""

from __future__ import annotations

import io
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from rich.console import Console

from teach_once.configs.load import load_student, load_teacher, split_overrides
from teach_once.runtime.command.options import Compute
from teach_once.runtime.command.ray import Cluster
from teach_once.train.cli.commands import cli
from teach_once.train.recording.options import Recording
from teach_once.train.runs.study import Run, Study, open_study
from teach_once.train.studies.ablation import run_ablation
from teach_once.train.studies.ray_study import RayTasks
from tests.support import slow_loss
from tests.support.caches.teacher_cache import make_cache
from tests.support.programs.ray_cluster import Nodes, cluster_of, started, wait_until
from tests.support.shortened import ALL_DIGITS
from tests.support.training.executor_contract import (
    FAILING_METHOD,
    check_each_run_ends_once_and_a_failed_one_stops_no_other,
)

EPOCHS, STEPS = 8, 4
LOSS = "{loss: 'tests.support.slow_loss:slow'}"
SEEDS, METHODS = (0, 1), ("a", "b")


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Nodes, Path]]:
    """With the folder that decides how slow the loss is."""
    folder = tmp_path_factory.mktemp("slow")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv(slow_loss.FOLDER, str(folder))
        environment.setenv("OMP_NUM_THREADS", "1")
        environment.setenv(ALL_DIGITS, "1")  # as Ray's workers read them
        with cluster_of(2) as nodes:
            yield nodes, folder


@pytest.fixture(scope="module")
def overrides(teacher_weights: Path) -> list[str]:
    return [
        f"training.epochs={EPOCHS}",
        "training.batch_size=16",
        "training.learning_rate=0.01",
        "training.schedule.milestones=[4]",
        f"methods={{a: [{{loss: ce}}, {LOSS}], b: [{{loss: kd}}, {LOSS}]}}",
        "teacher.teacher.arch=resnet8",
        f"teacher.teacher.weights={teacher_weights}",
        "teacher.dataset.max_per_class=6",
        "teacher.views.count=3",
        "teacher.taps.attention=null",
        "teacher.taps.hint=null",
    ]


@pytest.fixture(scope="module")
def alone(overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> Study:
    """The study with all its runs trained one after the other, in this process."""
    folder = tmp_path_factory.mktemp("alone")
    own, teachers = split_overrides(overrides)
    teacher = load_teacher("digits-resnet20", teachers)
    make_cache(teacher, folder / "caches")
    study = open_study(
        load_student("digits-resnet8", own),
        teacher,
        caches_dir=folder / "caches",
        runs_dir=folder / "runs",
    )
    assert (
        run_ablation(runs_of(study), Compute("cpu"), Recording(console=Console(file=io.StringIO())))
        == {}
    )
    return study


def runs_of(study: Study, methods: Sequence[str] = METHODS) -> list[Run]:
    return [study.run(method, seed) for method in methods for seed in SEEDS]


def command(alone: Study, runs: Path, nodes: Nodes, methods: str, *words: str) -> list[str]:
    call = ["ablation", "digits-resnet8", "--seeds", "0 1", "--methods", methods]
    call += ["--cache", str(alone.cache.path), "--runs", str(runs)]
    return [*call, "--cluster", nodes.address, "--device", "cpu", *words]


def epochs_done(runs: Path) -> list[int]:
    return [len(file.read_text().splitlines()) for file in runs.glob("*/*/metrics.jsonl")]


def two_runs_have(runs: Path, epochs: int) -> bool:
    return sum(done >= epochs for done in epochs_done(runs)) >= 2


def assert_same(runs: Path, alone: Study, methods: Sequence[str] = METHODS) -> None:
    """Bit for bit: every weight, and every figure of every epoch."""
    for run in runs_of(alone, methods):
        ours = runs / alone.config.name / run.folder.name
        assert (ours / "summary.json").is_file(), run
        found, expected = (
            torch.load(folder / "last.pt", weights_only=True) for folder in (ours, run.folder)
        )
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found), run


def test_nodes_die_in_the_middle_of_four_runs_and_every_result_is_that_of_the_run_alone(
    nodes: tuple[Nodes, Path], alone: Study, overrides: list[str], tmp_path: Path
) -> None:
    cluster, folder = nodes
    (folder / "seconds").write_text("0.1")
    driver = started("train", *command(alone, tmp_path, cluster, "a b", *overrides))
    wait_until(lambda: two_runs_have(tmp_path, 4), driver)
    cluster.remove()
    cluster.add()
    wait_until(lambda: len(epochs_done(tmp_path)) >= 3, driver)
    cluster.remove()
    (folder / "seconds").write_text("0")
    cluster.add()
    printed, errors = driver.communicate(timeout=300)
    assert driver.returncode == 0, errors
    assert "run   4/4" in printed
    assert "-m report " in printed  # the command that writes the report
    assert_same(tmp_path, alone)
    extra = len((folder / "steps").read_text()) - 4 * EPOCHS * STEPS
    assert extra < 4 * STEPS + 2 * STEPS  # one from its beginning alone would take so many
    assert set(epochs_done(tmp_path)) == {EPOCHS}


@pytest.mark.long
def test_a_signal_saves_every_run_and_the_same_command_resumes_them(
    nodes: tuple[Nodes, Path],
    alone: Study,
    overrides: list[str],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    cluster, folder = nodes
    (folder / "seconds").write_text("0.1")
    call = command(alone, tmp_path, cluster, "a", *overrides)
    driver = started("train", *call)
    wait_until(lambda: two_runs_have(tmp_path, 1), driver)
    driver.send_signal(signal.SIGTERM)
    _, errors = driver.communicate(timeout=300)
    assert driver.returncode == 128 + signal.SIGTERM, errors
    assert "stopped; the same command resumes every run" in errors
    done = epochs_done(tmp_path)
    assert len(done) == 2
    assert max(done) < EPOCHS
    (folder / "seconds").unlink()

    assert cli(command(alone, tmp_path, cluster, "a", *overrides)) == 0
    assert_same(tmp_path, alone, ["a"])

    assert cli([*command(alone, tmp_path, cluster, "a", *overrides), "--jobs", "2"]) == 2
    assert "are for one machine" in capfd.readouterr().err


def test_ray_tasks_with_a_run_that_fails_end_each_run_once_and_train_the_others(
    nodes: tuple[Nodes, Path], make_study: Callable[..., Study]
) -> None:
    study = make_study(student=[FAILING_METHOD])
    with Cluster(nodes[0].address, Console(quiet=True), cpus=1, gpus=0.0) as cluster:
        executor = RayTasks(Compute("cpu"), Recording(), cluster)
        check_each_run_ends_once_and_a_failed_one_stops_no_other(executor, study)
