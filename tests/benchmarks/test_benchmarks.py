"""Small runs of the benchmarks, and the pages that they write."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as suite
from benchmarks.harness import Timing, Verdict, interleaved, write_section
from benchmarks.synthetic import studies
from benchmarks.targets import ranks, read
from tests.support.project import ROOT


def test_rounds_are_interleaved_and_the_warm_up_does_not_count() -> None:
    calls: list[str] = []
    rows = {name: lambda name=name: calls.append(name) for name in "ab"}
    timings = interleaved(rows, rounds=2)
    assert calls == ["a", "b", "a", "b", "a", "b"]
    assert len(timings["a"].seconds) == 2
    assert Timing((1.0, 2.0, 3.0, 4.0, 5.0)).median == 3.0


def test_a_section_is_replaced_and_the_others_stay(tmp_path: Path) -> None:
    file = tmp_path / "b.md"
    write_section(file, "One", "first")
    write_section(file, "Two", "second")
    write_section(file, "One", "third")
    assert file.read_text() == "# Benchmarks\n\n## One\n\nthird\n\n## Two\n\nsecond\n"


def test_read_at_a_small_size_measures_every_row_and_target(tmp_path: Path) -> None:
    files = ["--docs", str(tmp_path / "b.md"), "--json", str(tmp_path / "b.json")]
    assert suite.main(["read", "--slab-mb", "4", "--rounds", "2", *files]) == 0
    found = json.loads((tmp_path / "b.json").read_text())
    assert len(found) == 3 * len(read.RECORD_BYTES)
    assert all(row["value"] > 0 for row in found)
    text = (tmp_path / "b.md").read_text()
    for method in (read.OURS, read.ZARR, read.RESIDENT, read.MAPPED, "store check", "cat"):
        assert len(re.findall(rf"^\| {re.escape(method)} \| [\d.,]+ ±", text, re.MULTILINE)) == 1


def test_read_below_both_rates_misses_its_target() -> None:
    second = Timing((1.0, 1.0))
    slab = {read.OURS: second, read.ZARR: Timing((1.5, 1.5))}
    timings = {
        "slab": {"4 KB records": slab},
        "256 rows": {"4 KB records": {read.RESIDENT: second}},
        "check": {"4 KB records": {"cat": second, "store check": Timing((2.0, 2.0))}},
    }
    slow, rows, check = read.verdicts_of("4 KB records", timings, gigabytes=2.9)
    assert [each.mark for each in (slow, rows, check)] == ["✗ missed"] * 3
    fast, *_ = read.verdicts_of("4 KB records", timings, gigabytes=3.1)
    assert fast.mark == "✓"


def test_dtypes_are_measured_on_real_records(
    small_teacher: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = small_teacher().teacher.weights
    arguments = [
        "digits-resnet20",
        "teacher.arch=resnet8",
        f"teacher.weights={weights}",
        "dataset.max_per_class=6",
        "--docs",
        str(tmp_path / "b.md"),
        "--json",
        str(tmp_path / "b.json"),
        "--device",
        "cpu",
    ]
    assert suite.main(["dtypes", *arguments]) == 0
    rows = json.loads((tmp_path / "b.json").read_text())
    assert rows["float32"]["KL of logits (nats)"] == pytest.approx(0, abs=1e-7)
    assert rows["float32"]["largest rel. error of means"] == 0
    means = [rows[dtype]["mean rel. error of means"] for dtype in ("float16", "uint8")]
    assert 0 < means[0] < means[1] < 0.1
    assert rows["float16"]["bytes per record"] == 245


@pytest.mark.long
def test_one_reading_for_five_methods_is_measured_beside_five_readings(tmp_path: Path) -> None:
    files = ["--docs", str(tmp_path / "b.md"), "--json", str(tmp_path / "b.json")]
    threads = torch.get_num_threads()
    assert (
        suite.main(["shared_loading", "--images", "12", "--rounds", "1", "--device", "cpu", *files])
        == 0
    )
    assert torch.get_num_threads() == threads
    found = {row["what"]: row["value"] for row in json.loads((tmp_path / "b.json").read_text())}
    assert len(found) == 2 * 3
    assert min(found.values()) > 0
    assert "| five methods jointly |" in (tmp_path / "b.md").read_text()


@pytest.mark.long
def test_a_view_through_a_mirror_is_measured_beside_get_and_a_folder(tmp_path: Path) -> None:
    files = ["--docs", str(tmp_path / "b.md"), "--json", str(tmp_path / "b.json")]
    small = ["--slab-mb", "2", "--rounds", "1", "--network-mb", "20"]
    assert suite.main(["objects", *small, *files]) == 0
    found = {row["what"]: row["value"] for row in json.loads((tmp_path / "b.json").read_text())}
    assert len(found) == 5
    assert min(found.values()) > 0
    get = next(
        line for line in (tmp_path / "b.md").read_text().splitlines() if line.startswith("| GET")
    )
    assert float(get.split("|")[3].split(" ±")[0]) <= 21  # the server keeps to its rate


def run_here(command: list[str]) -> None:
    """What `run_program` starts, without a process and its imports for each."""
    assert command[1:3] == ["-m", "benchmarks"]
    assert suite.main(command[3:]) == 0


@pytest.mark.parametrize("starts_processes", [False, pytest.param(True, marks=pytest.mark.long)])
def test_every_target_is_measured_and_ends_in_one_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, starts_processes: bool
) -> None:
    docs = tmp_path / "b.md"
    # `start` calls make, which needs the environment that make has made.
    has_environment = starts_processes and (ROOT / ".venv" / "installed.txt").is_file()
    programs = "steps teacher_pass ablation" + (" start" if has_environment else "")
    if not starts_processes:
        monkeypatch.setattr(suite, "run_program", run_here)
        small = dataclasses.replace(studies.SHAPES["digits"], num_train=128)
        monkeypatch.setitem(studies.SHAPES, "digits", small)
    arguments = ["--quick", "--device", "cpu", "--only", programs]
    assert suite.main([*arguments, "--docs", str(docs), "--results", str(tmp_path)]) == 0
    text = docs.read_text()
    for title in ("A training step", "The teacher pass", "An ablation of five methods"):
        assert f"## {title}" in text
    table = text.split("## All targets")[1]
    for what in (
        "cached ÷ in memory",
        "live ÷ cached",
        "pass ÷ bare loop",
        "waiting for teacher outputs",
    ):
        assert what in table
    assert "digits: expanding truncated logits ÷ cached" in table
    assert "≤ 1.02" in table
    assert not has_environment or "to the first step" in table


def test_a_verdict_without_a_target_has_no_mark_and_a_missed_one_is_marked() -> None:
    assert Verdict("speed", 2.0).mark == ""
    assert Verdict("speed", 2.0, at_least=3).mark == "✗ missed"
    assert Verdict("speed", 4.0, at_least=3).mark == "✓"
    assert Timing((1.0, 2.0, 4.0)).ratio_to(Timing((1.0, 1.0, 1.0))) == 2.0


def test_the_profile_names_the_operators_of_a_step(capsys: pytest.CaptureFixture[str]) -> None:
    assert suite.main(["profile", "--shape", "digits", "--steps", "2", "--device", "cpu"]) == 0
    table = capsys.readouterr().out
    assert "convolution" in table
    assert "2 steps of digits, cd+gkd" in table
    assert "Self CPU time total" in table


@pytest.mark.long
def test_one_student_on_several_processes_is_measured(tmp_path: Path) -> None:
    files = ["--docs", str(tmp_path / "b.md"), "--json", str(tmp_path / "b.json")]
    small = ["--shapes", "digits", "--rounds", "1", "--steps", "1", "--slab-mb", "16"]
    assert suite.main(["ranks", "--device", "cpu", *small, *files]) == 0
    text = (tmp_path / "b.md").read_text()
    assert all(f"| {label} |" in text for label in ranks.ROWS.values())
    assert "A view of 16 MB of logits" in text
    alone, together = re.findall(r"^\| [12] \| (.+) \| (.+) \| ([\d.]+) \|$", text, re.MULTILINE)
    assert alone[1] == "16"
    assert 1.5 < float(alone[2]) < 3  # two views, and the rest of the process
    assert len(together[0].split(",")) == 2
