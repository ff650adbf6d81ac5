"""Reports of runs with different settings: rows, labels and file names."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from teach_once.report.command import cli
from teach_once.train.runs.folder import distinct_settings, settings_key

# ---- runs with other settings


def test_runs_of_other_settings_are_rows_of_their_own_labeled_by_what_differs(
    write_run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed in (0, 1):
        write_run("ce", seed, 20.0 + seed)
        write_run("kd", seed, 10.0 + 2 * seed)
    short = write_run("kd", 0, 80.0, training={"epochs": 1})
    write_run("kd", 1, 84.0, training={"epochs": 1})
    heavy = write_run("kd", 0, 12.0, terms=[{"loss": "kd", "weight": 2.0}])
    assert cli([str(tmp_path / "small")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines[:-1])) <= 100
    found = {name: cells for name, *cells, _ in (re.split("  +", line) for line in lines[2:-1])}
    both = "terms.0.weight=not set, training.epochs"
    assert found == {
        "ce (training.epochs=2)": ["2", "20.50 ± 0.71"],
        f"kd ({both}=2)": ["2", "11.00 ± 1.41"],
        f"kd ({both}=1)": ["2", "82.00 ± 2.83"],
        "kd (terms.0.weight=2.0, training.epochs=2)": ["1", "12.00"],
    }
    text = (tmp_path / "small" / "report-all.html").read_text()
    assert "All finished runs of this folder, with different settings." in text
    assert f"<td>kd ({both}=1)</td><td>kd ({both}=2)</td>" in text  # paired with one another
    assert f"<td>kd ({both}=1)</td><td>ce" not in text  # no ce was trained for one epoch
    names = [short.name, heavy.name]
    assert cli([str(tmp_path / "small"), *names]) == 0
    assert re.search(r"^kd .*  1      80\.00 ", capsys.readouterr().out, re.M)


def test_a_report_of_named_runs_takes_no_other_report_s_place(
    write_run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "small"
    runs = [write_run("kd", seed, 10.0 + seed) for seed in range(3)]
    assert cli([str(folder)]) == 0
    good = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert set(good) == {"report.html", "ablation.md", "ablation.csv", "ablation.png"}
    short = [write_run("kd", 0, 80.0, training={"epochs": 1}).name]
    heavy = [write_run("kd", 0, 12.0, terms=[{"loss": "kd", "weight": 2.0}]).name]
    asked = ["--asked", "kd; seeds 0"]  # as `teach-once ablation` does
    capsys.readouterr()
    for arguments in ([runs[0].name], [*asked, *short], [*asked, *heavy], ["--method", "kd"]):
        assert cli([str(folder), *arguments]) == 0
        written = re.search(r"written to .*/(report-\w+)\.html", capsys.readouterr().out)
        assert written is not None
        page = (folder / f"{written[1]}.html").read_text()
        assert (
            written[1].replace("report", "ablation") + ".png"
            in (folder / f"{written[1].replace('report', 'ablation')}.md").read_text()
        )
        assert "<h1>Ablation of small</h1>" in page
    assert {name: (folder / name).read_bytes() for name in good} == good
    assert len(list(folder.glob("report*.html"))) == 5
    assert cli([str(folder), *asked, *(run.name for run in runs)]) == 0
    assert "/report.html, ablation.md, .csv and .png" in capsys.readouterr().out
    for run in runs:
        shutil.rmtree(run)
    assert cli([str(folder), *asked, *short]) == 0
    assert "/report.html, " in capsys.readouterr().out  # of whose settings no run is left


def test_a_run_that_is_named_twice_is_refused(
    write_run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run("kd", 0, 10.0)
    assert cli([str(tmp_path / "small"), run.name, run.name]) == 2
    told = capsys.readouterr().err
    assert f"{run.name} is named twice" in told
    assert f"fix: python -m report {tmp_path}/small {run.name}" in told
    assert not list((tmp_path / "small").glob("report*"))


def test_methods_of_one_study_share_its_settings_whatever_their_losses_decide() -> None:
    study = {"student": {"arch": "resnet8"}, "training": {"epochs": 3}}
    kd = {**study, "terms": [{"loss": "kd"}], "seed": 0}
    rkd = {**study, "terms": [{"loss": "rkd"}], "seed": 0}
    student = {"arch": "resnet8", "linear_connectors": ["stage1"]}
    cd = {**study, "terms": [{"loss": "cd"}], "seed": 0, "student": student}
    assert len({settings_key(each) for each in (kd, rkd, cd)}) == 1
    assert distinct_settings([("kd", kd), ("rkd", rkd), ("cd", cd)]) == [[], [], []]
    assert settings_key({**kd, "training": {"epochs": 4}}) != settings_key(kd)
