"""The ablation's table, CSV and picture, from summaries with known numbers."""

from __future__ import annotations

import html
import io
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from PIL import Image
from scipy import stats

from train.page import _by_epoch, ledger
from train.report import Commands, csv_table, markdown_table, rows_of, write_report
from train.run import train_student
from train.study import Study

TEACHER = {
    "test_top1_error": 5.0,
    "test_top5_error": 1.0,
    "train_agreement": 0.99,
    "images_per_second": 50.0,
}


def summary(method: str, seed: int, top1: float) -> dict:
    return {
        "method": method,
        "seed": seed,
        "last": {"top1_error": top1, "top5_error": top1 / 10},
        "best": {"epoch": 3, "chosen_on": "test", "top1_error": top1 - 1, "top5_error": top1 / 10},
        "seconds": 2.0 + seed,
        "model": "resnet8",
        "num_samples": 100,
        "epochs": 30,
        "is_taught": method != "ce",
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


def test_differences_are_paired_by_seed_with_the_p_of_a_t_test() -> None:
    runs = [summary("ce", seed, top1) for seed, top1 in ((0, 10.0), (1, 14.0), (2, 11.0))]
    runs += [summary("kd", seed, top1) for seed, top1 in ((2, 9.0), (0, 7.0), (1, 12.0))]
    runs += [summary("cd", 1, 6.0)]
    ce, kd, cd = rows_of(runs)
    assert ce.to_alone is None
    assert ce.to_kd is None
    assert kd.to_alone is not None
    assert kd.to_alone.mean == pytest.approx(-7 / 3)
    expected = stats.ttest_rel([7.0, 12.0, 9.0], [10.0, 14.0, 11.0]).pvalue
    assert kd.to_alone.p == pytest.approx(expected)
    assert str(cd.to_kd) == "-6.00"  # of one seed there is no p


def test_the_table_reads_as_written_here() -> None:
    lines = markdown_table(rows_of(RUNS), TEACHER).splitlines()
    assert lines[2] == "| teacher |  |  | 5.00 | 1.00 |  |  |  |  |  |"
    assert lines[3] == (
        "| ce | resnet8 | 2 | 12.00 ± 2.83 | 1.20 ± 0.28 | 11.00 ± 2.83 | 1.20 ± 0.28 | "
        "2.50 ± 0.71 |  |  |"
    )
    assert lines[4] == ("| kd | resnet8 | 1 | 8.00 | 0.80 | 7.00 | 0.80 | 2.00 | -2.00 |  |")


def test_the_csv_has_a_line_per_run() -> None:
    lines = csv_table(RUNS).splitlines()
    assert lines[0].startswith("method,model,seed,last_top1,last_top5,best_top1")
    assert lines[1] == "ce,resnet8,0,10.0,1.0,9.0,1.0,3,2.0,t-12345678"
    assert len(lines) == 4


def test_top_5_is_left_out_where_there_are_no_more_than_five_classes() -> None:
    few = [{**run, "num_classes": 5} for run in RUNS]
    header, _, teacher, first, _ = markdown_table(rows_of(few), TEACHER).splitlines()
    assert "top-5" not in header
    assert teacher == "| teacher |  |  | 5.00 |  |  |  |  |"
    assert first == "| ce | resnet8 | 2 | 12.00 ± 2.83 | 11.00 ± 2.83 | 2.50 ± 0.71 |  |  |"
    assert csv_table(few).splitlines()[:2] == [
        "method,model,seed,last_top1,best_top1,best_epoch,seconds,cache",
        "ce,resnet8,0,10.0,9.0,3,2.0,t-12345678",
    ]
    assert "top-5" in markdown_table(rows_of([{**run, "num_classes": 6} for run in RUNS]), TEACHER)


def test_axes_of_epochs_tick_at_whole_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    line = {"top1_error": 5.0, "train_seconds": 1.0, "wait_seconds": 0.0}
    curves = {("ce", 0): [{**line, "epoch": epoch} for epoch in (1, 2, 3)]}
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    _by_epoch(rows_of(RUNS[:1]), curves)
    ((axes,),) = (figure.axes for figure in drawn)
    assert len(axes.get_xticks()) >= 3
    assert all(tick == round(tick) for tick in axes.get_xticks())


def test_the_ledger_counts_the_images_that_a_live_teacher_would_have_seen() -> None:
    found = ledger(RUNS, num_views=4)  # 100 samples, one taught run of 30 epochs
    assert found["teacher passes run"] == "1, over 4 views: 400 images"
    assert "1 (one in each taught run): 3,000 images, 2,600 more" in found["teacher passes saved"]
    assert found["seconds saved"].startswith("52 net, at the 50 images/s measured")
    assert found["paid back after"] == "0.1 taught runs"


@pytest.fixture
def report(make_study: Callable[..., Study]) -> Path:
    """The report of a real, small ablation with an angle bracket in its command."""
    study = make_study()
    for method, seed in (("ce", 0), ("ce", 1), ("cd", 0), ("cd", 1)):
        train_student(study, method, seed)
    commands = Commands("make ablation <here>", "python -m train student", "make cache-teacher")
    table = write_report(study, commands, "ce cd; seeds 0 1")
    assert table in (study.folder / "ablation.md").read_text()
    return study.folder


def test_the_report_is_four_files_and_the_picture_is_one(report: Path) -> None:
    names = {path.name for path in report.iterdir() if path.is_file()}
    assert names == {"report.html", "ablation.csv", "ablation.md", "ablation.png"}
    with Image.open(io.BytesIO((report / "ablation.png").read_bytes())) as picture:
        assert picture.width > 400
        assert len(picture.convert("RGB").getcolors(2**20) or []) > 20  # something is drawn


def test_the_page_holds_everything_and_asks_for_nothing(report: Path) -> None:
    text = (report / "report.html").read_text()
    assert "make ablation &lt;here&gt;" in text
    for heading in ("Learning curves", "What the teacher cost", "Where it comes from", "Commands"):
        assert f"<h2>{heading}</h2>" in text
    assert text.count("<img ") == text.count('src="data:image/svg+xml;base64,') == 2
    assert not re.search(r"(src|href)=\"(?!data:)", text)
    assert "<script" not in text


PROBE = """
<script>addEventListener("load", () => {
  const images = [...document.images].map(image => image.complete && image.naturalWidth > 0);
  const wide = document.documentElement.scrollWidth > innerWidth;
  document.body.setAttribute("data-probe", JSON.stringify({images, wide}));
});</script>
"""
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.mark.skipif(BROWSER is None, reason="no Chromium (.ci/run installs it)")
@pytest.mark.parametrize("width", [1280, 500])
def test_a_browser_shows_the_page_without_an_error(
    report: Path, tmp_path: Path, width: int
) -> None:
    page = tmp_path / "probed.html"
    text = (report / "report.html").read_text()
    page.write_text(text.replace("</body>", f"{PROBE}</body>"))
    quiet = ["disable-gpu", "disable-quic", "no-first-run", "disable-background-networking"]
    quiet += ["disable-component-update", "disable-sync", "no-sandbox", "headless"]
    result = subprocess.run(
        [
            str(BROWSER),
            *(f"--{flag}" for flag in quiet),
            f"--user-data-dir={tmp_path / 'profile'}",
            f"--window-size={width},1200",
            "--enable-logging=stderr",
            "--virtual-time-budget=3000",
            "--dump-dom",
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    (probe,) = re.findall(r'data-probe="([^"]*)"', result.stdout)
    found = json.loads(html.unescape(probe))
    assert found == {"images": [True, True], "wide": False}
    assert "CONSOLE" not in result.stderr
