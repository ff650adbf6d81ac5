"""A teacher pass on a Ray cluster gives the cache of a single process, even if processes die."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from teach_once.configs.load import load_teacher
from teach_once.nets.networks.zoo import build
from teach_once.nets.weights.files import save_atomically
from teach_once.precompute.command import cli
from teach_once.precompute.verify import cli as verify
from teach_once.runtime.machine.urls import path_or_url
from teach_once.store import TeacherCache
from teach_once.store.read.evaluation import evaluation_names, open_evaluation
from tests.support import slow_teacher
from tests.support.caches.object_store import Server, emptied, running
from tests.support.caches.teacher_cache import make_cache
from tests.support.datasets.photograph_study import PLAIN, configs_of
from tests.support.programs.ray_cluster import Nodes, cluster_of, journal_lines, started, wait_until
from tests.support.shortened import ALL_DIGITS

NUM_BLOCKS = 30


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What decides how the slow teacher behaves."""
    folder = tmp_path_factory.mktemp("slow")
    slow_teacher.save_weights(folder / "teacher.pt")
    return folder


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """An object store, which the nodes' environment leads to."""
    with running() as server, emptied(server):
        yield server


@pytest.fixture(scope="module")
def nodes(folder: Path, server: Server) -> Iterator[Nodes]:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv(slow_teacher.FOLDER, str(folder))
        environment.setenv("OMP_NUM_THREADS", "1")
        environment.setenv(ALL_DIGITS, "1")  # as Ray's workers read them
        with cluster_of(2) as nodes:
            yield nodes


@pytest.fixture(autouse=True)
def two_nodes(nodes: Nodes) -> None:
    nodes.restore()


@pytest.fixture(scope="module")
def alone(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> TeacherCache:
    """The same cache, made by one process."""
    config = load_teacher("digits-resnet20", slow_teacher.overrides_of(folder / "teacher.pt"))
    return make_cache(config, tmp_path_factory.mktemp("alone"), batch_size=16, block_rows=16)


def command(folder: Path, caches: Path, nodes: Nodes, *more: str) -> list[str]:
    words = ["digits-resnet20", "--caches", str(caches), "--cluster", nodes.address]
    words += ["--block-rows", "16", "--batch-size", "16", *more]
    return [*words, *slow_teacher.overrides_of(folder / "teacher.pt")]


def assert_same(caches: Path, alone: TeacherCache) -> None:
    """As one process makes it, every block committed once, and nothing left lying about."""
    (path,) = caches.glob("digits-*")
    cache = TeacherCache.open(path)
    assert cache.faults() == []
    assert cache.identity == alone.identity
    for view in range(3):
        ours, theirs = cache.read_view(view), alone.read_view(view)
        assert ours.keys() == theirs.keys()
        for tap, values in theirs.items():
            np.testing.assert_allclose(ours[tap], values, rtol=1e-5, atol=1e-6)
    lines = [json.loads(line) for line in journal_lines(caches)]
    blocks = [(line["view"], line["block"]) for line in lines]
    assert len(blocks) == len(set(blocks)) == NUM_BLOCKS
    assert not list(path.rglob("*.tmp"))
    assert not list(path.rglob("*.spool"))
    (name,) = evaluation_names(path)
    tested, theirs = (open_evaluation(each.path, each.identity, name) for each in (cache, alone))
    assert tested.faults() == []
    assert np.array_equal(tested.labels, theirs.labels)
    for figure in ("test_top1_error", "train_agreement"):
        assert cache.measured[figure] == pytest.approx(alone.measured[figure])


def test_nodes_may_die_without_warning_and_others_join(
    nodes: Nodes, folder: Path, tmp_path: Path, alone: TeacherCache
) -> None:
    (folder / "seconds").write_text("0.4")
    driver = started("precompute", *command(folder, tmp_path, nodes))
    wait_until(lambda: len(journal_lines(tmp_path)) >= 3, driver)
    nodes.remove()
    nodes.add()
    wait_until(lambda: len(journal_lines(tmp_path)) >= 8, driver)
    nodes.remove()
    (folder / "seconds").unlink()
    printed, errors = driver.communicate(timeout=300)
    assert driver.returncode == 0, errors
    assert "cluster, 2 workers of 1 CPU each" in printed
    assert "480 images in" in printed
    assert_same(tmp_path, alone)
    words = [word for word in command(folder, tmp_path, nodes) if "=" in word]
    assert verify(["digits-resnet20", "--caches", str(tmp_path), "--device", "cpu", *words]) == 0


@pytest.mark.long
def test_the_driver_may_be_stopped_or_killed_and_continues_from_what_is_committed(
    nodes: Nodes, folder: Path, tmp_path: Path, alone: TeacherCache
) -> None:
    (folder / "seconds").write_text("0.2")
    call = ["precompute", *command(folder, tmp_path, nodes)]
    stopped = started(*call)
    wait_until(lambda: len(journal_lines(tmp_path)) >= 2, stopped)
    stopped.send_signal(signal.SIGTERM)
    _, errors = stopped.communicate(timeout=300)
    assert stopped.returncode == 128 + signal.SIGTERM
    done = len(journal_lines(tmp_path))
    said = f"stopped after {done} of {NUM_BLOCKS} blocks, which are saved; the same command resumes"
    assert said in errors
    assert done < NUM_BLOCKS

    killed = started(*call)
    wait_until(lambda: len(journal_lines(tmp_path)) >= done + 2, killed)
    killed.kill()
    killed.communicate()
    done = len(journal_lines(tmp_path))
    assert done < NUM_BLOCKS

    (folder / "seconds").unlink()
    finished = started(*call)
    printed, errors = finished.communicate(timeout=300)
    assert finished.returncode == 0, errors
    assert f"to do    {16 * (NUM_BLOCKS - done):,} of" in printed
    assert_same(tmp_path, alone)


@pytest.mark.long
def test_nodes_commit_to_an_object_store_by_themselves(
    nodes: Nodes, server: Server, folder: Path, tmp_path: Path, alone: TeacherCache
) -> None:
    (folder / "seconds").write_text("0.4")
    call = command(folder, Path("s3://bucket/caches"), nodes, "--spool", str(tmp_path))
    call[call.index("--caches") + 1] = "s3://bucket/caches"
    driver = started("precompute", *call)
    wait_until(lambda: len(_lines(server)) >= 3, driver)
    nodes.remove()
    nodes.add()
    wait_until(lambda: len(_lines(server)) >= 6, driver)
    driver.kill()
    driver.communicate()
    (folder / "seconds").unlink()
    finished = started("precompute", *call)
    _, errors = finished.communicate(timeout=300)
    assert finished.returncode == 0, errors
    assert len(_lines(server)) == NUM_BLOCKS
    (path,) = {"/".join(key.split("/")[:2]) for key in server.all_keys() if "teacher.zarr" in key}
    cache = TeacherCache.open(path_or_url(f"s3://bucket/{path}"))
    assert cache.faults() == []
    for view in range(3):
        ours, theirs = cache.read_view(view), alone.read_view(view)
        for tap, values in theirs.items():
            np.testing.assert_allclose(ours[tap], values, rtol=1e-5, atol=1e-6)
    assert cache.measured["train_agreement"] == pytest.approx(alone.measured["train_agreement"])
    (path_here,) = tmp_path.glob("bucket/caches/*")
    assert not list(path_here.rglob("*.spool"))


def _lines(server: Server) -> list[str]:
    """The lines that single blocks of the training views have in the bucket."""
    lines = [key for key in server.all_keys() if re.search(r"/journal/\d+/\d+/", key)]
    return [key for key in lines if "/evaluation/" not in key]


@pytest.mark.long
def test_an_error_of_the_program_stops_the_pass_and_is_not_tried_again(
    nodes: Nodes,
    folder: Path,
    tmp_path: Path,
    alone: TeacherCache,
    capfd: pytest.CaptureFixture[str],
) -> None:
    (folder / "seconds").write_text("0.2")
    call = command(folder, tmp_path, nodes)
    driver = started("precompute", *call)
    wait_until(lambda: len(journal_lines(tmp_path)) >= 2, driver)
    (folder / "poison").write_text("")
    _, errors = driver.communicate(timeout=300)
    attempts = (folder / "poison").read_text()
    (folder / "poison").unlink()
    (folder / "seconds").unlink()
    assert driver.returncode == 2
    assert "error: the teacher's output nan of tap logits, view " in errors
    assert "does not fit float32" in errors
    assert "Traceback" not in errors
    assert 1 <= len(attempts) <= 4  # of the tasks that two workers had begun
    assert 0 < len(journal_lines(tmp_path)) < NUM_BLOCKS
    assert cli(call) == 0
    assert "is complete" in capfd.readouterr().out
    assert_same(tmp_path, alone)


@pytest.mark.long
def test_images_that_are_decoded_give_the_same_cache_too(
    nodes: Nodes, photographs: Path, tmp_path: Path
) -> None:
    save_atomically(build("resnet8", num_classes=2, seed=1).state_dict(), tmp_path / "teacher.pt")
    _, teacher = configs_of(photographs, tmp_path / "teacher.pt", PLAIN)
    whole = make_cache(teacher, tmp_path / "whole", batch_size=8, block_rows=8)
    file = tmp_path / "photographs.yaml"
    data = json.dumps({"type": "imagefolder", "root": str(photographs), "normalization": NORM})
    file.write_text(
        f"dataset: {data}\nviews: {json.dumps({'augment': PLAIN, 'seed': 0, 'count': 3})}\n"
        f"teacher: {{arch: resnet8, weights: {tmp_path / 'teacher.pt'}}}\n"
        "taps: {logits: float32, channel_means: float32}\n"
    )
    words = [str(file), "--caches", str(tmp_path / "caches"), "--cluster", nodes.address]
    assert cli([*words, "--block-rows", "8", "--workers", "0"]) == 0
    (path,) = (tmp_path / "caches").glob("photographs-*")
    cache = TeacherCache.open(path)
    assert cache.faults() == []
    for view in range(3):
        ours, theirs = cache.read_view(view), whole.read_view(view)
        for tap in ours:
            np.testing.assert_allclose(ours[tap], theirs[tap], rtol=1e-4, atol=1e-5)
    assert not list(path.rglob("*.spool"))


NORM = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}


def test_a_plan_says_the_hours_of_all_workers_and_what_does_not_fit_is_refused(
    nodes: Nodes, folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (folder / "seconds").write_text("1")  # 16 images/s a worker, less what a busy machine takes
    assert cli(command(folder, tmp_path, nodes, "--plan")) == 0
    (folder / "seconds").unlink()
    planned = capfd.readouterr().out
    assert "images/s on 2 workers" in planned
    rate = float(planned.split(" images/s on 2 workers")[0].split()[-1].replace(",", ""))
    assert 16 < rate <= 32
    assert not list(tmp_path.glob("digits-*"))
    assert cli(command(folder, tmp_path, nodes, "--gpus-per-worker", "1")) == 2
    assert "no node of the cluster has 1 CPU and 1 GPU" in capfd.readouterr().err
    assert cli(command(folder, tmp_path, nodes, "--world-size", "2", "--job", "a")) == 2
    assert "--cluster excludes" in capfd.readouterr().err


def test_without_ray_the_error_names_what_installs_it(
    folder: Path,
    nodes: Nodes,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    assert cli(command(folder, tmp_path, nodes)) == 2
    assert "Ray is not installed\n  fix: make env-cluster" in capfd.readouterr().err
