"""The report: its table, charts and page for the runs in a folder."""

from __future__ import annotations

import dataclasses
import io
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from scipy import stats

from teach_once.report.command import cli
from teach_once.report.differences import difference_cells, interval_bars
from teach_once.report.page import Report, cost_of_teacher, html_page, markdown_page
from teach_once.report.runs import ReportError, Result, results_in
from teach_once.report.table import csv_table, markdown_table, rows_of, terminal_table
from teach_once.train.runs.study import Study
from teach_once.train.sessions.student import train_student
from tests.support.project import ROOT
from tests.support.training.written_run import TEACHER, errors


def result(method: str, seed: int, top1: float) -> Result:
    return Result(
        method=method,
        seed=seed,
        student="s",
        model="resnet8",
        last=errors(top1, top1 / 10),
        best=errors(top1 - 1, top1 / 10),
        best_epoch=3,
        chosen_on="test",
        epochs=30,
        seconds=2.0 + seed,
        num_samples=100,
        num_classes=10,
        num_views=4,
        reads_cache=method != "ce",
        cache="t-12345678",
        cache_sha256="12345678ff",
        teacher=TEACHER,
        device="cpu",
        versions={"torch": "2"},
    )


RUNS = [result("ce", 0, 10.0), result("ce", 1, 14.0), result("kd", 0, 8.0)]


def test_rows_hold_mean_and_sample_deviation_in_the_order_of_the_methods() -> None:
    ce, kd = rows_of(RUNS)
    assert (ce.method, ce.num_seeds, kd.method) == ("ce", 2, "kd")
    assert ce.cells["last_top1_error"].mean == pytest.approx(12.0)
    assert ce.cells["last_top1_error"].std == pytest.approx(8**0.5)
    assert kd.cells["last_top1_error"].std is None


def test_differences_are_paired_by_seed_with_the_p_of_a_t_test() -> None:
    runs = [result("ce", seed, top1) for seed, top1 in ((0, 10.0), (1, 14.0), (2, 11.0))]
    runs += [result("kd", seed, top1) for seed, top1 in ((2, 9.0), (0, 7.0), (1, 12.0))]
    runs += [result("cd", 1, 6.0)]
    ce, kd, cd = rows_of(runs)
    assert ce.to_ce is None
    assert ce.to_kd is None
    assert kd.to_ce is not None
    assert kd.to_ce.mean == pytest.approx(-7 / 3)
    expected = stats.ttest_rel([7.0, 12.0, 9.0], [10.0, 14.0, 11.0]).pvalue
    assert kd.to_ce.p == pytest.approx(expected)
    assert str(cd.to_kd) == "-6.00"  # of one seed there is no p


def test_gaps_that_are_equal_up_to_rounding_have_no_p() -> None:
    theirs = [10.3, 41.1, 2.7, 67.9]
    runs = [result("ce", seed, top1) for seed, top1 in enumerate(theirs)]
    runs += [result("kd", seed, top1 - 3.1) for seed, top1 in enumerate(theirs)]
    assert len({(top1 - 3.1) - top1 for top1 in theirs}) > 1
    _, kd = rows_of(runs)
    assert str(kd.to_ce) == "-3.10"
    assert [cell.text for cell in difference_cells(rows_of(runs))[1]][-2:] == ["", ""]
    one_image = [result("kd", 0, theirs[0] - 3.1 + 1e-6), *runs[5:]]  # of 10**8
    assert "p = " in str(rows_of([*runs[:4], *one_image])[1].to_ce)


def test_the_bars_of_intervals_have_one_scale_with_zero_in_the_middle() -> None:
    def row(method: str, *gaps: float) -> list[Result]:
        return [result(method, seed, 50 + gap) for seed, gap in enumerate(gaps)]

    rows = rows_of([*row("ce", 0, 0, 0), *row("wide", -4, -3.9, -3.8), *row("close", 2, 2, 2.01)])
    wide, close = interval_bars(rows)
    bounds = [each.to_ce.interval for each in rows[1:]]
    reach = max(max(-each.low, each.high) for each in bounds)
    for bar, interval in zip((wide, close), bounds, strict=True):
        low, high = re.search(r'<path d="M([\d.]+) 7H([\d.]+)', bar).groups()
        middle = re.search(r'<circle cx="([\d.]+)"', bar)[1]
        for at, value in ((low, interval.low), (high, interval.high), (middle, interval.mean)):
            assert float(at) == pytest.approx(75 * (1 + 0.97 * value / reach), abs=0.06)
        assert 'class="zero" d="M75 0v14"' in bar
        assert bar.count("v6") == 2  # both ends are within the scale


def test_the_page_says_how_often_the_teacher_is_right() -> None:
    page = html_page(Report("t", RUNS, rows_of(RUNS), TEACHER, "All runs."))
    assert "<dt>teacher agrees with the label on the cached views</dt><dd>99.00%</dd>" in page


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
    assert lines[0].startswith("method,model,seed,last_top1_error,last_top5_error,best_top1_error")
    assert lines[1] == "ce,resnet8,0,10.0,1.0,9.0,1.0,3,2.0,t-12345678"
    assert len(lines) == 4


def without_top5(run: Result) -> Result:
    error = {"top1_error": run.last["top1_error"]}, {"top1_error": run.best["top1_error"]}
    return dataclasses.replace(run, last=error[0], best=error[1])


def compared(method: str, seed: int, disagreement: float, **more: float) -> Result:
    """A run with a neighbor disagreement, and `more` metrics of the last epoch."""
    values = {"neighbor_disagreement": disagreement}
    return dataclasses.replace(result(method, seed, 0.0), last=values | more, best=values)


def test_runs_without_errors_are_compared_by_neighbor_disagreement() -> None:
    runs = [compared("embedding", 0, 40.0, embedding_cosine=0.8125), compared("cd", 0, 45.0)]
    header, _, first, second = markdown_table(
        rows_of(runs), {"images_per_second": 9.0}
    ).splitlines()
    assert "| embedding cosine, last | neighbor disagreement, last (%) | " in header
    assert "| neighbor disagreement, best (%) | seconds per run |" in header
    assert first.startswith("| embedding | resnet8 | 1 | 0.812 | 40.00 | 40.00 | 2.00 |")
    assert second.startswith("| cd | resnet8 | 1 |  | 45.00 | 45.00 | 2.00 |")
    title, *_ = terminal_table(rows_of(runs), {}).splitlines()
    assert "last neighbor disagreement (%)" in title
    page = html_page(Report("t", runs, rows_of(runs), {}, "All runs."))
    assert "the epoch with the lowest neighbor disagreement on the test set" in page
    assert csv_table(runs).splitlines()[1:] == [
        "embedding,resnet8,0,0.8125,40.0,40.0,3,2.0,t-12345678",
        "cd,resnet8,0,,45.0,45.0,3,2.0,t-12345678",
    ]


def test_runs_with_and_without_errors_are_compared_by_what_both_have() -> None:
    ce = dataclasses.replace(
        result("ce", 0, 12.0),
        last={"top1_error": 12.0, "neighbor_disagreement": 50.0},
        best={"top1_error": 11.0, "neighbor_disagreement": 49.0},
    )
    rows = rows_of([ce, compared("embedding", 0, 40.0)])
    assert str(rows[1].to_ce) == "-10.00"
    with pytest.raises(ReportError, match=r"ce: top1_error\n  embedding: neighbor_disagreement"):
        rows_of([without_top5(ce), compared("embedding", 0, 40.0)])


def test_top_5_is_left_out_where_there_are_no_more_than_five_classes() -> None:
    few = [without_top5(run) for run in RUNS]
    header, _, teacher, first, _ = markdown_table(rows_of(few), TEACHER).splitlines()
    assert "top-5" not in header
    assert teacher == "| teacher |  |  | 5.00 |  |  |  |  |"
    assert first == "| ce | resnet8 | 2 | 12.00 ± 2.83 | 11.00 ± 2.83 | 2.50 ± 0.71 |  |  |"
    assert csv_table(few).splitlines()[:2] == [
        "method,model,seed,last_top1_error,best_top1_error,best_epoch,seconds,cache",
        "ce,resnet8,0,10.0,9.0,3,2.0,t-12345678",
    ]
    assert "top-5" in markdown_table(rows_of(RUNS), TEACHER)
    of_one = {"test_top1_error": 7.0}  # what a summary states need not be all
    assert "| teacher |  |  | 7.00 |  |" in markdown_table(rows_of(RUNS), of_one)


def test_the_certificate_of_a_reduced_cache_is_on_both_pages() -> None:
    figures = {"certified_records": 4096, "kl_t1": 0.012, "kl_t4": 0.03}
    report = Report("t", RUNS, rows_of(RUNS), {**TEACHER, **figures}, "All runs.")
    full = Report("t", RUNS, rows_of(RUNS), TEACHER, "All runs.")
    said = "on 4,096 records: KL divergence of the logits 0.012 at temperature 1, 0.03 at 4"
    for page in (markdown_page, html_page):
        assert said in page(report)
        assert "ertificate" not in page(full)


def test_cost_of_teacher_has_three_numbers_and_times_of_a_known_rate() -> None:
    found = cost_of_teacher(RUNS, TEACHER)  # 100 samples, 4 views, one run of 30 epochs, 50 per s
    assert found == {
        "the teacher's pass, once": "400 images (8 s)",
        "with the teacher in the loop, 1 distilled run": "3,000 images (60 s)",
        "paid back after": "0.1 distilled runs",
    }


def test_cost_of_teacher_of_short_or_undistilled_runs_is_paid_back_late_or_not() -> None:
    short = [dataclasses.replace(result, epochs=1) for result in RUNS]
    assert cost_of_teacher(short, {})["paid back after"] == "4.0 distilled runs"
    alone = [result for result in RUNS if not result.reads_cache]
    assert cost_of_teacher(alone, {})["paid back after"] == "no distilled run"


# ---- a folder of runs


def test_a_folder_is_reported_with_all_its_finished_runs(
    write_run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unfinished = write_run("dist", 0, 6.0)
    (unfinished / "summary.json").unlink()
    for label, seed, top1 in (("cd", 0, 4.0), ("ce", 0, 8.0), ("ce", 1, 10.0), ("kd", 0, 5.0)):
        write_run(label, seed, top1)
    assert cli([str(tmp_path / "small")]) == 0
    header, teacher, ce, kd, cd, rest = capsys.readouterr().out.splitlines()
    assert re.split("  +", header)[:4] == ["method", "seeds", "last error (%)", "best error (%)"]
    assert teacher.split() == ["teacher", "5.00"]
    assert ce.startswith("ce       2      9.00 ± 1.41 ")
    assert kd.startswith("kd       1      5.00 ")
    assert cd.startswith("cd       1      4.00 ")
    assert max(map(len, (header, teacher, ce, kd, cd))) <= 100
    assert rest == f"written to {tmp_path}/small/report.html, ablation.md, .csv and .png"
    text = (tmp_path / "small" / "ablation.md").read_text()
    assert "All finished runs with these settings." in text
    assert "Command:" not in text
    assert "<h2>Commands</h2>" not in (tmp_path / "small" / "report.html").read_text()


def test_runs_can_be_named_and_a_live_teacher_is_a_method_of_its_own(
    write_run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    live = write_run("kd-live", 0, 5.0, teacher_outputs="live")
    cached = write_run("kd", 0, 5.5)
    write_run("ce", 0, 9.0)
    assert cli([str(tmp_path / "small"), live.name, cached.name]) == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()] == [
        *("method", "teacher", "kd-live", "kd", "written")
    ]
    (path,) = (tmp_path / "small").glob("report-*.html")  # of runs that were chosen by hand
    page = path.read_text()
    cost = "with the teacher in the loop, 1 distilled run</dt><dd>200 images"
    assert cost in page  # the live run saved nothing
    assert f"The runs {live.name}, {cached.name}." in page


@pytest.mark.parametrize("file", ["summary.json", "metrics.jsonl", "run.json"])
def test_a_run_whose_files_are_damaged_is_named_and_stops_no_report_of_others(
    write_run: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    file: str,
) -> None:
    folder = write_run("kd", 0, 5.0)
    text = (folder / file).read_text()
    (folder / file).write_text(text.replace("0", "9", 1))
    assert cli([str(tmp_path / "small")]) == 2
    told = capsys.readouterr().err
    assert f"error: {folder}/{file}" in told
    assert f"fix: rm -r {folder}" in told
    sound = write_run("ce", 0, 9.0)
    for names in ([], [folder.name, sound.name]):
        assert cli([str(tmp_path / "small"), *names]) == 0
        printed = capsys.readouterr()
        assert f"left out: {folder}/{file}" in printed.err
        assert "\nce       1      9.00 " in printed.out
        assert "\nkd " not in printed.out
        for page in ("ablation*.md", "report*.html"):
            told = max(
                (tmp_path / "small").glob(page), key=lambda path: path.stat().st_mtime_ns
            ).read_text()
            assert f"Left out because their files are damaged: {folder.name}." in told


def test_a_run_without_its_metrics_is_reported_without_curves(
    write_run: Callable[..., Path], tmp_path: Path
) -> None:
    (write_run("kd", 0, 5.0) / "metrics.jsonl").unlink()
    assert cli([str(tmp_path / "small")]) == 0
    assert "Learning curves" not in (tmp_path / "small" / "report.html").read_text()


def test_a_folder_without_the_runs_is_one_message(
    write_run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli([str(tmp_path / "nothing")]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"error: {tmp_path}/nothing contains no finished run\n  fix: python -m ")
    write_run("kd", 0, 5.0)
    assert cli([str(tmp_path / "small"), "kd-seed1-00000000"]) == 2
    assert "contains no finished run kd-seed1-00000000" in capsys.readouterr().err


def test_reading_runs_loads_neither_torch_nor_the_plotting_library() -> None:
    code = (
        "import sys, report.runs, report.table, report.page; "
        "sys.exit(bool({'torch', 'matplotlib', 'scipy'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


# ---- the report of a real ablation


@pytest.fixture
def report(make_study: Callable[..., Study], capsys: pytest.CaptureFixture[str]) -> Path:
    """The folder of a real, small ablation, with an angle bracket in the report's command."""
    study = make_study()
    for method, seed in (("ce", 0), ("ce", 1), ("cd", 0), ("cd", 1)):
        train_student(study.run(method, seed))
    commands = ["--command", "make ablation <here>", "--command", "make cache-teacher"]
    assert cli([str(study.folder), "--asked", "ce cd; seeds 0 1", *commands]) == 0
    rows, teacher = rows_of(results_in(study.folder).results), study.cache.measured
    assert terminal_table(rows, teacher) in capsys.readouterr().out
    assert markdown_table(rows, teacher) in (study.folder / "ablation.md").read_text()
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
    teacher = re.search(
        r"<dt>teacher</dt><dd>resnet8, weights teacher.pt, sha256 \w{64}</dd>", text
    )
    assert teacher is not None
    assert re.sub("<[^>]*>", "", teacher[0]).removeprefix("teacher") in (
        report / "ablation.md"
    ).read_text().replace("\\", "")
    for heading in (
        "Learning curves",
        "Paired differences",
        "Cost of the teacher",
        "Provenance",
        "Commands",
    ):
        assert f"<h2>{heading}</h2>" in text
    assert text.count('<svg xmlns="http://www.w3.org/2000/svg" class="chart ') == 4
    assert not re.search(r"(src|href)=\"(?!data:)", text)
    assert not re.search(r"url\(|@import|fetch|XMLHttp", text)
