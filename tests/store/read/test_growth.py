"""Reading a cache while it grows, and after interrupted or abandoned growth."""

from __future__ import annotations

import io
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

import teach_once.store.command as store_main
from teach_once.configs.schema import TeacherConfig
from teach_once.precompute.command import cli as precompute
from teach_once.precompute.compute.teacher_pass import PassOptions
from teach_once.precompute.run_pass import fill_cache
from teach_once.store import CacheError, CacheIncomplete, CacheWriter, TeacherCache
from teach_once.store.command import cli as trim
from teach_once.train.cli.commands import cli as train
from tests.support.caches.damage import flip
from tests.support.caches.teacher_cache import CPU, make_cache, setup_of
from tests.support.programs.pass_commands import arguments_of
from tests.support.training.printed_report import write_printed_report

Make = Callable[..., TeacherConfig]
ATTENTION = "taps.attention=float16"


class Interrupted(Exception):
    """Stands for a signal that nobody can catch."""


@pytest.fixture
def interrupted(
    small_teacher: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Path]:
    """Runs a pass that dies after some blocks, or (None) after the last, before its end."""

    def run(*overrides: str, after: int | None) -> Path:
        left = [after]
        write_block = CacheWriter.write_block

        def dying(writer: CacheWriter, *block: object) -> None:
            if left[0] == 0:
                raise Interrupted
            left[0] = None if left[0] is None else left[0] - 1
            write_block(writer, *block)

        def die(*_: object) -> None:
            raise Interrupted

        setup = setup_of(small_teacher(*overrides), tmp_path / "caches")
        options, console = PassOptions(CPU, 64, 16), Console(file=io.StringIO())
        with monkeypatch.context() as patched:
            patched.setattr(CacheWriter, "write_block", dying)
            patched.setattr(CacheWriter, "finish", die)
            with pytest.raises(Interrupted):
                fill_cache(setup, options, console)
        return setup.path

    return run


@pytest.fixture
def of_student(small_teacher: Make, tmp_path: Path) -> list[str]:
    """Arguments of a short run on the small teacher's cache."""
    return [
        "digits-resnet8",
        *("--caches", str(tmp_path / "caches"), "--runs", str(tmp_path / "runs")),
        *("--device", "cpu", "training.epochs=2", "training.schedule.milestones=[1]"),
        "teacher.teacher.arch=resnet8",
        f"teacher.teacher.weights={small_teacher().teacher.weights}",
        "teacher.dataset.max_per_class=6",
        "teacher.views.count=3",
    ]


def test_growth_keeps_what_was_measured(
    small_teacher: Make, tmp_path: Path, interrupted: Callable[..., Path]
) -> None:
    before = make_cache(small_teacher(), tmp_path / "caches").measured
    opened = TeacherCache.open(interrupted("views.count=5", after=2), num_views=3)
    assert opened.measured == before
    assert before["views"] == 3
    grown = make_cache(small_teacher("views.count=5"), tmp_path / "caches")
    assert grown.measured["views"] == 5
    assert grown.measured["train_agreement"] != before["train_agreement"]


def test_a_report_of_runs_that_were_trained_before_the_pass_had_ended(
    of_student: list[str],
    small_teacher: Make,
    tmp_path: Path,
    interrupted: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    interrupted(after=None)  # every block is there, and nothing measured
    call = ["ablation", *of_student, "--methods", "ce kd", "--seeds", "0"]
    assert train(call) == 0, capsys.readouterr().err
    assert write_printed_report(capsys.readouterr().out) == 0
    report = tmp_path / "runs" / "digits-resnet8" / "ablation.md"
    assert "| kd |" in report.read_text()
    assert "| teacher |" not in report.read_text()
    assert precompute(arguments_of(small_teacher(), tmp_path / "caches")) == 0
    assert "to do    0 of" in capsys.readouterr().out
    assert train(call) == 0  # nothing to train, and the errors come from the cache
    assert write_printed_report(capsys.readouterr().out) == 0
    assert "| teacher |" in report.read_text()


def test_a_tap_whose_growth_was_interrupted_stops_only_methods_that_read_it(
    of_student: list[str],
    small_teacher: Make,
    tmp_path: Path,
    interrupted: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    make_cache(small_teacher(), tmp_path / "caches")
    path = interrupted(ATTENTION, after=2)
    for method in ("ce", "kd"):
        assert train(["student", *of_student, "--method", method]) == 0, capsys.readouterr().err
    assert train(["student", *of_student, "--method", "at"]) == 2
    told = capsys.readouterr().err
    assert (
        "2 of 12 blocks are committed; the first missing block is tap attention1, view 0, block 2"
        in told
    )
    assert "fix: make cache-teacher" in told
    assert "views.count=3 taps.attention=float16" in told
    assert f"python -m store trim {path} --drop-taps attention1,attention2,attention3" in told
    assert train(["plan", *of_student[:5], *of_student[7:], "--method", "kd"]) == 0
    assert (
        "to extend by attention1, attention2, attention3, hint: 180 of 180 images"
        in capsys.readouterr().out
    )
    assert precompute(arguments_of(small_teacher(), tmp_path / "caches")) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert precompute(arguments_of(small_teacher(), tmp_path / "caches", ATTENTION)) == 0


def test_opening_refuses_only_where_a_tap_asked_for_is_not_whole(
    small_teacher: Make, tmp_path: Path, interrupted: Callable[..., Path]
) -> None:
    make_cache(small_teacher(), tmp_path / "caches")
    path = interrupted(ATTENTION, after=2)
    opened = TeacherCache.open(path, taps=["logits"])
    assert list(opened.taps) == ["logits", "stage1", "stage2", "stage3", "correct"]
    assert list(opened.read_view(0)) == list(opened.taps)
    for ask in (
        lambda: TeacherCache.open(path),
        lambda: TeacherCache.open(path, taps=["attention2"]),
        lambda: opened.read_view(0, ["attention2"]),
    ):
        with pytest.raises(CacheIncomplete, match=r"not finished.*tap attention"):
            ask()
    with pytest.raises(KeyError, match="no tap 'attention9'"):
        TeacherCache.open(path, taps=["attention9"])


def test_views_whose_growth_was_given_up_are_not_asked_for_and_can_be_dropped(
    of_student: list[str],
    small_teacher: Make,
    tmp_path: Path,
    interrupted: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    make_cache(small_teacher(), tmp_path / "caches")
    path = interrupted("views.count=9", after=6)  # of 24: one view more is whole, one begun
    call = arguments_of(small_teacher(), tmp_path / "caches")
    assert precompute(call) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert train(["student", *of_student, "--method", "kd"]) == 0, capsys.readouterr().err
    with pytest.raises(CacheIncomplete) as caught:
        TeacherCache.open(path)
    assert "ARGS=views.count=9" in str(caught.value)
    trim = str(caught.value).split("to keep only the complete part: ")[1].splitlines()[0]
    assert trim == f"python -m store trim {path} --views 4"
    assert store_main.cli(shlex.split(trim)[3:]) == 0
    assert TeacherCache.open(path).num_views == 4
    assert precompute(call) == 0
    assert "nothing to do" in capsys.readouterr().out.splitlines()[-1]


def test_a_pass_for_fewer_views_than_were_meant_ends_after_them(
    small_teacher: Make,
    tmp_path: Path,
    interrupted: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = interrupted("views.count=9", after=2)
    assert precompute(arguments_of(small_teacher(), tmp_path / "caches")) == 0
    assert "to do    148 of" in capsys.readouterr().out  # three views of 60 but for 32
    assert TeacherCache.open(path, num_views=3).measured["views"] == 3


@pytest.mark.parametrize("full_check", [False, True])
def test_a_large_unfinished_cache_is_resumed_without_reading_what_is_there(
    small_teacher: Make,
    tmp_path: Path,
    interrupted: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    full_check: bool,
) -> None:
    path = interrupted(after=5)
    flip(path / "teacher.zarr" / "stage1" / "c.0.1.0", 7)
    monkeypatch.setattr("teach_once.precompute.pending.CHECKED_BYTES", 1000)
    more = ["--full-check"] if full_check else []
    assert precompute(arguments_of(small_teacher(), tmp_path / "caches", *more)) == 0
    faults = TeacherCache.open(path).faults()
    assert [(fault.tap, fault.view, fault.block) for fault in faults] == (
        [] if full_check else [("stage1", 0, 1)]
    )


def test_a_large_cache_that_lacks_a_chunk_is_not_called_complete(
    small_teacher: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = make_cache(small_teacher(), tmp_path / "caches").path
    (path / "teacher.zarr" / "stage1" / "c.0.1.0").unlink()
    monkeypatch.setattr("teach_once.precompute.pending.CHECKED_BYTES", 1000)
    assert precompute(arguments_of(small_teacher(), tmp_path / "caches")) == 0
    assert "tap stage1, view 0, block 1, chunk missing" in capsys.readouterr().out
    assert TeacherCache.open(path).faults() == []


def test_asking_for_more_views_than_are_complete_is_refused(
    small_teacher: Make, tmp_path: Path, interrupted: Callable[..., Path]
) -> None:
    path = interrupted("views.count=9", after=14)
    assert TeacherCache.open(path, num_views=3).num_views == 3
    with pytest.raises(CacheError, match="14 of 16 blocks are committed"):
        TeacherCache.open(path, num_views=4)


def test_a_plan_counts_only_the_images_that_the_cache_lacks(
    of_student: list[str],
    small_teacher: Make,
    tmp_path: Path,
    interrupted: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    def cache_line(*overrides: str) -> str:
        call = ["plan", *of_student, "--method", "ce", "--no-trial"]
        call += ["teacher.taps.hint=null", *overrides]
        assert train(call) == 0, capsys.readouterr().err
        (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("cache")]
        return line

    without_attention = "teacher.taps.attention=null"
    path = make_cache(small_teacher(ATTENTION), tmp_path / "caches").path
    assert cache_line() == f"cache    found: {path}"
    assert "to extend by 1 view: 60 of 240 images" in cache_line("teacher.views.count=4")
    assert trim(["trim", str(path), "--drop-taps", "attention"]) == 0
    capsys.readouterr()
    assert cache_line(without_attention) == f"cache    found: {path}"
    assert "to extend by attention1, attention2, attention3: 180 of 180 images" in cache_line()
    interrupted("views.count=4", after=1)  # a block of 16 samples
    assert "to finish: 44 of 240 images" in cache_line(without_attention, "teacher.views.count=4")
