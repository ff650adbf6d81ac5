"""docs/results.md rests on docs/results/*.json: every table can be computed from them again."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from benchmarks.results import KEPT, PAGE, ResultsError, keep, load_kept, main, page_with_tables
from report.runs import Errors, Point, Result, results_in
from tests.support.finished_run import Trained, train_both
from tests.support.project import ROOT


def test_every_table_of_the_page_is_what_the_kept_runs_say() -> None:
    text = (ROOT / PAGE).read_text()
    assert page_with_tables(text, ROOT / KEPT) == text


def test_everything_kept_is_shown_on_the_page() -> None:
    shown = set(re.findall(r"<!-- table: ([\w.+-]+) ", (ROOT / PAGE).read_text()))
    assert shown == {file.stem for file in (ROOT / KEPT).glob("*.json")}


@pytest.fixture(scope="module")
def trained(teacher_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return train_both(teacher_weights, tmp_path_factory.mktemp("study"))


def _result(method: str, seed: int, top1: float, reads_cache: bool = True) -> Result:
    return Result(
        method=method,
        seed=seed,
        student="s",
        model="resnet8",
        last=Errors(top1, 1.0),
        best=Errors(top1 - 1, 1.0),
        best_epoch=3,
        chosen_on="test",
        epochs=4,
        seconds=10.0 + seed,
        num_samples=100,
        num_classes=10,
        num_views=2,
        reads_cache=reads_cache,
        cache="c",
        cache_sha256="0",
        teacher={"test_top1_error": 5.0, "test_top5_error": 0.5},
        device="cpu",
        versions={},
        curve=(Point(2, 1.0, top1 + 2), Point(4, 2.0, top1)),
    )


_RESULTS = tuple(
    _result(method, seed, error + seed, method != "ce")
    for method, error in (("ce", 20.0), ("kd", 16.0), ("cd", 12.0))
    for seed in range(3)
)


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    found = type("Found", (), {"results": _RESULTS, "left_out": {}})
    monkeypatch.setattr("benchmarks.results.results_in", lambda folder, names: found)
    keep("study", tmp_path, [], "make ablation", tmp_path)
    return tmp_path


def _table(kept: Path, words: str) -> list[str]:
    page = f"before\n<!-- table: study {words} -->\nold\n<!-- end -->\nafter\n"
    filled = page_with_tables(page, kept)
    assert filled.startswith(f"before\n<!-- table: study {words} -->\n|")
    assert filled.endswith("<!-- end -->\nafter\n")
    assert page_with_tables(filled, kept) == filled
    return filled.splitlines()[2:-2]


def test_errors_are_those_of_the_kept_runs(kept: Path) -> None:
    header, _, teacher, *rows = _table(kept, "errors")
    assert header.startswith("| method | model | seeds | top-1 error, last (%)")
    assert teacher.startswith("| teacher |  |  | 5.00 | 0.50 |")
    assert [row.split(" | ")[0] for row in rows] == ["| ce", "| kd", "| cd"]
    assert "| 13.00 ± 1.00 |" in rows[2]
    assert "-8.00" in rows[2]


def test_methods_are_chosen_and_ordered(kept: Path) -> None:
    assert [row[:5] for row in _table(kept, "errors: cd ce")[3:]] == ["| cd ", "| ce "]


def test_differences_are_paired(kept: Path) -> None:
    assert any("| cd | ce | 3 | -8.00 |" in row for row in _table(kept, "differences"))


def test_curves_have_a_column_for_each_tested_epoch(kept: Path) -> None:
    header, _, _, _, cd = _table(kept, "curves")
    assert header == "| method | epoch 2 | epoch 4 |"
    assert cd == "| cd | 15.00 ± 1.00 | 13.00 ± 1.00 |"


def test_costs_count_images(kept: Path) -> None:
    _, _, ce, kd, _ = _table(kept, "cost")
    assert ce == "| ce | 11.00 ± 1.00 | 400 |  |  |  |"
    assert kd == "| kd | 11.00 ± 1.00 | 400 | 400 | 200 | 0.5 |"


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ("study beauty", "unknown table; known: errors"),
        ("study errors: ce dkd", "no run of dkd is kept"),
        ("other errors", "there is no "),
    ],
)
def test_a_mark_that_names_nothing_is_refused(kept: Path, words: str, problem: str) -> None:
    with pytest.raises(ResultsError, match=problem):
        page_with_tables(f"<!-- table: {words} -->\n<!-- end -->", kept)


def test_a_kept_file_with_a_foreign_key_is_refused(kept: Path) -> None:
    file = kept / "study.json"
    file.write_text(file.read_text().replace('"command"', '"x": 1, "command"', 1))
    with pytest.raises(ResultsError, match=r"study.json: .*"):
        load_kept(file)


def test_runs_are_kept_and_come_back(trained: Trained, tmp_path: Path) -> None:
    folder = trained.copy(tmp_path / "runs").folder
    (result,) = results_in(folder).results
    file = keep("digits", folder, [], "make train-student", tmp_path)
    assert load_kept(file).results == (result,)
    assert dataclasses.asdict(result)["curve"]


def test_the_command_says_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["keep", "x", str(tmp_path), "--command", "make"]) == 2
    assert "no finished run" in capsys.readouterr().err
