"""The ablation's table, CSV and picture, from summaries with known numbers."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from PIL import Image

from train.report import csv_table, markdown_table, rows_of, write_report

TEACHER = {"test_top1_error": 5.0, "test_top5_error": 1.0, "train_agreement": 0.99}


def summary(method: str, seed: int, top1: float) -> dict:
    return {
        "method": method,
        "seed": seed,
        "last": {"top1_error": top1, "top5_error": top1 / 10},
        "best": {"epoch": 3, "chosen_on": "test", "top1_error": top1 - 1, "top5_error": top1 / 10},
        "seconds": 2.0 + seed,
        "cache": "t-12345678",
        "cache_sha256": "12345678ff",
        "teacher": TEACHER,
        "device": "cpu",
        "versions": {"torch": "2"},
    }


RUNS = [summary("ce", 0, 10.0), summary("ce", 1, 14.0), summary("kd", 0, 8.0)]


def test_rows_hold_mean_and_sample_deviation_in_the_order_of_the_methods() -> None:
    ce, kd = rows_of(RUNS)
    assert (ce.method, ce.num_seeds, kd.method) == ("ce", 2, "kd")
    assert ce.cells["last_top1"].mean == pytest.approx(12.0)
    assert ce.cells["last_top1"].std == pytest.approx(8**0.5)
    assert kd.cells["last_top1"].std is None


def test_the_table_reads_as_written_here() -> None:
    lines = markdown_table(rows_of(RUNS), TEACHER).splitlines()
    assert lines[2] == "| teacher |  | 5.00 | 1.00 |  |  |  |"
    assert lines[3] == (
        "| ce | 2 | 12.00 ± 2.83 | 1.20 ± 0.28 | 11.00 ± 2.83 | 1.20 ± 0.28 | 2.50 ± 0.71 |"
    )
    assert lines[4] == "| kd | 1 | 8.00 | 0.80 | 7.00 | 0.80 | 2.00 |"


def test_the_csv_has_a_line_per_run() -> None:
    assert csv_table(RUNS).splitlines()[1] == "ce,0,10.0,1.0,9.0,1.0,3,2.0,t-12345678"
    assert len(csv_table(RUNS).splitlines()) == 4


def test_the_report_is_three_files_and_the_picture_is_one(tmp_path: Path) -> None:
    table = write_report(tmp_path, "Title", "python -m train ablation x", RUNS)
    text = (tmp_path / "ablation.md").read_text()
    assert table in text
    assert "`python -m train ablation x`" in text
    assert "12345678ff" in text
    with Image.open(io.BytesIO((tmp_path / "ablation.png").read_bytes())) as picture:
        assert picture.width > 400
        assert len(picture.convert("RGB").getcolors(2**20) or []) > 20  # something is drawn
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "ablation.csv",
        "ablation.md",
        "ablation.png",
    ]
