"""A full or read-only disk gives one message in each command that writes."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from teach_once.configs.schema import TeacherConfig
from teach_once.report.command import cli as report
from teach_once.store.errors import CacheFull
from teach_once.store.move.convert import convert_cache
from teach_once.train.cli.commands import cli as train
from tests.support.caches.teacher_cache import make_cache
from tests.support.training.finished_run import STUDENT, Trained, train_both


@pytest.fixture(scope="module")
def trained(teacher_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return train_both(teacher_weights, tmp_path_factory.mktemp("trained"))


@pytest.fixture
def call(trained: Trained, tmp_path: Path) -> list[str]:
    """The arguments that name the runs, a copy of their own."""
    study = trained.copy(tmp_path / "runs")
    source = study.teacher.source
    assert source is not None
    places = ["--caches", str(study.cache.path.parent), "--runs", str(study.runs_dir)]
    teacher = [f"teacher.{each}" for each in source.overrides]
    return ["digits-resnet8", *places, "--device", "cpu", *teacher, *STUDENT]


@contextmanager
def full_disk(free_bytes: int = 20_000) -> Iterator[None]:
    """No file can grow larger: the closest to a full disk that needs no other file system."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (free_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def message(capsys: pytest.CaptureFixture[str]) -> str:
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert "Traceback" not in told
    assert told.count("error:") == told.count("fix: make room") == 1
    return told


def leftovers(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.name.endswith(".tmp")]


def test_a_student_stops_with_one_message_and_resumes_when_there_is_room(
    call: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, *rest = call
    student = ["student", name, "--method", "cd", *rest]
    with full_disk():
        assert train(student) == 2
    message(capsys)
    assert not leftovers(tmp_path)
    assert train(student) == 0
    assert "epoch   1/3" not in capsys.readouterr().out  # resumed


def test_an_export_leaves_nothing_cut_off(
    call: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, *rest = call
    export = ["export", name, str(tmp_path / "out"), "--method", "ce", *rest]
    with full_disk(100_000):
        assert train(export) == 2
    message(capsys)
    assert not (tmp_path / "out").exists()
    assert not leftovers(tmp_path)
    assert train(export) == 0


def test_a_teacher_leaves_no_weights_cut_off(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = tmp_path / "w.pt"
    settings = ["teacher.arch=resnet8", f"teacher.weights={weights}", "training.max_per_class=10"]
    teacher = ["teacher", "digits-resnet20", "--device", "cpu", *settings, "training.epochs=1"]
    with full_disk():
        assert train(teacher) == 2
    message(capsys)
    assert not weights.exists()
    assert not leftovers(tmp_path)
    (tmp_path / ".w.pt.12345.tmp").write_bytes(b"of a killed process")
    (tmp_path / ".other.pt.12345.tmp").write_bytes(b"perhaps still written")
    assert train(teacher) == 0
    assert [path.name for path in leftovers(tmp_path)] == [".other.pt.12345.tmp"]


def test_a_report_keeps_the_earlier_pages(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = trained.copy(tmp_path / "runs").folder
    assert report([str(folder)]) == 0
    before = (folder / "report.html").read_bytes()
    capsys.readouterr()
    with full_disk(100):
        assert report([str(folder)]) == 2
    message(capsys)
    assert (folder / "report.html").read_bytes() == before
    assert not leftovers(folder)


def test_a_folder_that_may_not_be_written_to_is_one_message(
    call: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    name, *rest = call
    export = ["export", name, "/sys/kernel/out", "--method", "ce", *rest]
    assert train(export) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: /sys/kernel/.out.new.")
    assert "fix: allow access, or choose another path" in told


def test_a_conversion_advises_to_run_it_again_and_no_pass_of_the_teacher(
    small_teacher: Callable[..., TeacherConfig], tmp_path: Path
) -> None:
    cache = make_cache(small_teacher(), tmp_path / "caches")
    with ExitStack() as disk, pytest.raises(CacheFull) as error:
        convert_cache(
            cache.path,
            tmp_path / "small",
            channel_means="uint8",
            on_block=lambda rows: disk.enter_context(full_disk(100)),
        )
    assert error.value.fix == "make room, then: run the same command again"
    assert convert_cache(cache.path, tmp_path / "small", channel_means="uint8").faults() == []
