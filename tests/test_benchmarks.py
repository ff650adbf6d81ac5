"""The benchmarks run, at a small size, and what they write reads as it should."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import dtypes, read, views
from benchmarks.harness import Timing, interleaved, write_section
from tests.conftest import make_cache


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


def test_reading_is_measured_and_misses_are_marked(tmp_path: Path) -> None:
    arguments = [
        "--slab-mb",
        "4",
        "--rounds",
        "2",
        "--docs",
        str(tmp_path / "b.md"),
        "--json",
        str(tmp_path / "b.json"),
    ]
    assert read.main(arguments) == 0
    found = json.loads((tmp_path / "b.json").read_text())
    assert {row["what"] for row in found} == {"slab", "256 rows", "check"}
    assert all(row["per_second"] > 0 for row in found)
    text = (tmp_path / "b.md").read_text()
    assert "| read_view (checksums verified) |" in text
    slow = [{**row, "per_second": 1.0 if "read_view" in row["method"] else 1e9} for row in found]
    assert "✗ missed" in read.report(slow)


def test_the_number_of_views_is_studied(
    small_teacher: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_teacher()
    monkeypatch.chdir(tmp_path)
    make_cache(config, tmp_path / "caches")
    arguments = [
        "digits-resnet8",
        "--views",
        "1 3",
        "--seeds",
        "0 1",
        "--docs",
        str(tmp_path / "r.md"),
        "--method",
        "cd",
        "training.epochs=2",
        "teacher.teacher.arch=resnet8",
        "teacher.dataset.limit=6",
        f"teacher.teacher.weights={config.teacher.weights}",
        "teacher.views.count=3",
    ]
    assert views.main(arguments) == 0
    text = (tmp_path / "r.md").read_text()
    assert "## Number of views: digits-resnet8, cd" in text
    assert "| 3 | 2 |" in text
    assert (tmp_path / "views-digits-resnet8.png").stat().st_size > 1000


def test_dtypes_are_measured_on_real_records(
    small_teacher: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = small_teacher().teacher.weights
    arguments = [
        "digits-resnet20",
        "teacher.arch=resnet8",
        f"teacher.weights={weights}",
        "dataset.limit=6",
        "--docs",
        str(tmp_path / "b.md"),
        "--json",
        str(tmp_path / "b.json"),
        "--device",
        "cpu",
    ]
    assert dtypes.main(arguments) == 0
    rows = {r["dtype"]: r for r in json.loads((tmp_path / "b.json").read_text())["dtypes"]}
    assert rows["float32"]["kl_of_logits"] == pytest.approx(0, abs=1e-7)
    assert rows["float32"]["largest_error_of_means"] == 0
    assert 0 < rows["float16"]["mean_error_of_means"] < rows["uint8"]["mean_error_of_means"] < 0.1
    assert rows["float16"]["bytes_per_record"] == 245
