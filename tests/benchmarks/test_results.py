"""The results page depends only on docs/results/*.json: every table can be computed from them."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from benchmarks.results.kept import KEPT, ResultsError, keep, load_kept
from benchmarks.results.page import PAGE, PAGES, page_with_tables, pictures_of, write
from teach_once.report.runs import Point, ReportError, Result, results_in
from tests.support.project import ROOT
from tests.support.training.finished_run import Trained, train_both
from tests.support.training.written_run import errors


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_every_table_of_a_page_is_what_the_kept_runs_say(page: Path) -> None:
    text = (ROOT / page).read_text()
    assert page_with_tables(text, ROOT / KEPT) == text


def test_everything_kept_is_shown_on_the_page() -> None:
    shown = set(re.findall(r"<!-- table: ([\w.+-]+) ", (ROOT / PAGE).read_text()))
    assert shown == {file.stem for file in (ROOT / KEPT).glob("*.json")}


@pytest.mark.parametrize(
    ("page", "begin", "end"), [(PAGES[0], "## On one page\n", "\n## "), (PAGES[1], "\n## ", "\0")]
)
def test_every_figure_in_the_answers_of_a_page_is_in_one_of_its_tables(
    page: Path, begin: str, end: str
) -> None:
    _, _, first_page = (ROOT / page).read_text().partition(begin)
    first_page, _, _ = first_page.partition(end)
    tables = "\n".join(re.findall(r"<!-- table: .*?<!-- end -->", first_page, re.DOTALL))
    told = re.sub(r"<!-- table: .*?<!-- end -->|```.*?```", "", first_page, flags=re.DOTALL)
    in_tables = set(re.findall(r"\d+\.\d+", tables))
    assert in_tables
    assert set(re.findall(r"\d+\.\d\d", told)) <= in_tables


def test_every_picture_that_is_asked_for_is_there_and_shown() -> None:
    text = (ROOT / PAGE).read_text()
    for name in re.findall(r"<!-- picture: .* ([\w./+-]+\.svg)(?:: .*)? -->", text):
        assert (ROOT / PAGE).parent.joinpath(name).read_bytes().startswith(b"<?xml")
        assert f"]({name})" in text


@pytest.fixture(scope="module")
def trained(teacher_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return train_both(teacher_weights, tmp_path_factory.mktemp("study"))


def _result(method: str, seed: int, top1: float, reads_cache: bool = True) -> Result:
    return Result(
        method=method,
        seed=seed,
        student="s",
        model="resnet8",
        last=errors(top1, 1.0),
        best=errors(top1 - 1, 1.0),
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
        curve=(Point(2, 1.0, errors(top1 + 2)), Point(4, 2.0, errors(top1))),
    )


_RESULTS = tuple(
    _result(method, seed, error + seed, method != "ce")
    for method, error in (("ce", 20.0), ("kd", 16.0), ("cd", 12.0))
    for seed in range(3)
)


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    _keep(monkeypatch, tmp_path, _RESULTS)
    return tmp_path


def _keep(
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    results: tuple[Result, ...],
    label: str = "{method}",
    record_bytes: int | None = 50,
) -> None:
    """As if these were the runs of a folder, which read a cache with records of this size."""
    found = type("Found", (), {"results": results, "left_out": {}})
    manifest = type("Manifest", (), {"record_bytes": record_bytes})
    opened = type("Opened", (), {"manifest": manifest})
    monkeypatch.setattr("benchmarks.results.kept.results_in", lambda folder, names: found)
    monkeypatch.setattr("benchmarks.results.kept.TeacherCache.open", lambda path: opened)
    cache = folder if record_bytes else None
    keep("study", folder, [], "make ablation", jobs=2, label=label, cache=cache, folder=folder)


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
    assert any(
        "| cd | 3 | 13.00 ± 1.00 | ce | -8.00 |" in row for row in _table(kept, "differences")
    )


def test_curves_have_a_column_for_each_tested_epoch(kept: Path) -> None:
    header, _, _, _, cd = _table(kept, "curves")
    assert header == "| method | epoch 2 | epoch 4 |"
    assert cd == "| cd | 15.00 ± 1.00 | 13.00 ± 1.00 |"


def test_differences_to_the_first_method_have_intervals(kept: Path) -> None:
    header, _, cd, ce = _table(kept, "paired: cd ce")
    assert header == (
        "| method | seeds | top-1 error, last (%) | compared with | difference | 95% interval | p |"
    )
    assert cd == "| cd | 3 | 13.00 ± 1.00 |  |  |  |  |"
    assert ce == "| ce | 3 | 21.00 ± 1.00 | cd | +8.00 |  |  |"  # no spread, no interval


def test_an_interval_is_that_of_the_paired_differences(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors = {"a": (10.0, 12.0, 14.0), "b": (11.0, 14.0, 15.0)}
    runs = [_result(name, seed, top1) for name in errors for seed, top1 in enumerate(errors[name])]
    _keep(monkeypatch, tmp_path, tuple(runs))
    # Gaps of 1, 2 and 1: mean 4/3, s = 0.57735, t(2) at 97.5 % = 4.30265, half = 1.43422.
    assert _table(tmp_path, "paired")[3] == (
        "| b | 3 | 13.33 ± 2.08 | a | +1.33 | -0.10 to +2.77 | 0.057 |"
    )


def test_order_compares_each_method_with_the_row_above(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors = {"ce": (30.0, 31.0, 32.0), "kd": (25.0, 26.1, 27.0), "cd": (25.0, 26.0, 29.0)}
    runs = [_result(name, seed, top1) for name in errors for seed, top1 in enumerate(errors[name])]
    _keep(monkeypatch, tmp_path, tuple(runs))
    _, _, *rows = _table(tmp_path, "order")
    assert "| kd | 3 | 26.03 ± 1.00 | ce | -4.97 | -5.11 to -4.82 |" in rows[1]
    assert rows[2].startswith("| cd | 3 | 26.67 ± 2.08 | kd | +0.63 |")


def test_the_second_of_a_pair_is_compared_with_the_first(kept: Path) -> None:
    header, _, kd = _table(kept, "pairs: ce kd")
    assert header.startswith("| method | seeds | top-1 error, last (%) | compared with |")
    assert kd.startswith("| kd | 3 | 17.00 ± 1.00 | ce | -4.00 |")
    for kind in ("pairs", "payback"):
        with pytest.raises(ResultsError, match=f"{kind}: 3 methods are named; they come in pairs"):
            _table(kept, f"{kind}: ce kd cd")


def test_parts_have_labels_and_take_the_place_of_older_ones(
    kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for error in (30.0, 31.0):
        _keep(monkeypatch, kept, (_result("cd", 0, error),), "{method}, 2 views")
    rows = _table(kept, 'paired: cd "cd, 2 views"')
    assert rows[3].startswith("| cd, 2 views | 1 | 31.00 | cd | +19.00 |")


def test_a_part_of_another_method_does_not_take_the_place_of_one_with_its_label(
    kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for method in ("cd", "kd"):
        _keep(monkeypatch, kept, (_result(method, 0, 30.0),), "{method}, 2 views")
    names = {each.label for each in load_kept(kept / "study.json")}
    assert {"cd, 2 views", "kd, 2 views"} <= names


def test_one_name_for_two_runs_is_refused(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ResultsError, match="two runs of cd with seed 0"):
        _keep(monkeypatch, kept, (_result("kd", 0, 1.0),), "cd")
    assert sum(len(each.results) for each in load_kept(kept / "study.json")) == len(_RESULTS)


def test_bytes_of_an_image_are_those_of_all_its_views(
    kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = _result("cd-live", 0, 12.0, reads_cache=False)
    _keep(monkeypatch, kept, (live,), "in the loop", None)
    _keep(monkeypatch, kept, (_result("cd", 0, 12.5),), "small", 7)
    header, _, cd, small, in_the_loop = _table(kept, 'stored: cd small "in the loop"')
    assert header.startswith("| teacher's outputs | views | bytes per record | bytes per image |")
    assert cd.startswith("| cd | 2 | 50 | 100 | 3 | 13.00 ± 1.00 |")
    assert small.startswith("| small | 2 | 7 | 14 | 1 | 12.50 | +0.50 |")
    assert in_the_loop.startswith("| in the loop | 2 |  |  | 1 | 12.00 | +0.00 |")


def test_a_pass_is_paid_back_by_the_machine_time_that_runs_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = {"test_top1_error": 5.0, "images_per_second": 4.0}
    cached = dataclasses.replace(_result("cd", 0, 9.0), seconds=10.0, teacher=teacher)
    live = dataclasses.replace(_result("cd-live", 0, 9.0, False), seconds=30.0, teacher=teacher)
    _keep(monkeypatch, tmp_path, (cached, live))
    # 100 samples x 2 views / 4 per s = 50 s; two runs side by side: (30 - 10) / 2 s saved in each.
    assert _table(tmp_path, "payback")[2] == "| cd | 10.00 | 30.00 | 2 | 50 | 5.0 |"


def test_the_teacher_is_shown_with_its_error_on_the_cached_views(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = {"test_top1_error": 5.0, "train_agreement": 0.75, "views": 2.0}
    _keep(monkeypatch, tmp_path, (dataclasses.replace(_result("cd", 0, 9.0), teacher=teacher),))
    header, _, row = _table(tmp_path, "teacher")
    assert header.startswith("| top-1 test error (%) | top-1 error on the cached views (%) | ")
    assert row == "| 5.00 | 25.00 | 100 x 2 = 200 |"


def test_weights_are_chosen_by_the_validation_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = dataclasses.replace(_result("at", 0, 10.0), last_validation=errors(33.0))
    _keep(monkeypatch, tmp_path, (run, _result("ce", 0, 12.0)))
    assert _table(tmp_path, "validation")[2:] == ["| at | 1 | 33.00 |", "| ce | 1 |  |"]


def test_pictures_are_drawn_beside_the_page(kept: Path) -> None:
    marks = [
        f"<!-- picture: study {kind} {kind}.svg -->" for kind in ("errors", "curves", "stored")
    ]
    page = kept / "page.md"
    page.write_text("\n".join([*marks, "<!-- picture: study stored two.svg: cd ce -->"]))
    write(page, kept)
    drawn = {file.name for file in kept.glob("*.svg")}
    assert drawn == {"errors.svg", "curves.svg", "stored.svg", "two.svg"}
    assert (kept / "two.svg").read_bytes() != (kept / "stored.svg").read_bytes()


def test_an_unknown_picture_is_refused(kept: Path) -> None:
    with pytest.raises(
        ResultsError, match="unknown picture; known: errors, curves, differences, stored"
    ):
        pictures_of("<!-- picture: study beauty x.svg -->", kept)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ("study beauty", "unknown table; known: errors"),
        ("study errors: ce dkd", "no run of dkd is kept"),
        ("other errors", " not found"),
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
    study = trained.copy(tmp_path / "runs")
    (result,) = results_in(study.folder).results
    command, cache = "make train-student", study.cache.path
    file = keep("digits", study.folder, [], command, cache=cache, folder=tmp_path)
    (kept,) = load_kept(file)
    assert kept.results == [result]
    assert kept.record_bytes == study.cache.manifest.record_bytes
    assert dataclasses.asdict(result)["curve"]


def test_keep_without_a_finished_run_raises_and_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="no finished run"):
        keep("x", tmp_path / "runs", [], "make", folder=tmp_path / "kept")
    assert not (tmp_path / "kept").exists()
