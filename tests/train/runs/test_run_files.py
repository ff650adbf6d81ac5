"""Damaged, forged or exchanged run.json, metrics.jsonl and summary.json."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from teach_once.report.command import cli as report
from teach_once.runtime.safe.safe_read import BadFile
from teach_once.store.identity import identity_sha256
from teach_once.train.runs.files import (
    metrics_line,
    read_metrics,
    read_result,
    read_summary,
    run_document,
    summary_document,
)
from teach_once.train.runs.folder import runs_in
from teach_once.train.runs.study import Run
from teach_once.train.sessions.student import train_student
from tests.support.training.finished_run import Trained, train_both

FILES = ("run.json", "metrics.jsonl", "summary.json")


@pytest.fixture(scope="module")
def trained(teacher_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return train_both(teacher_weights, tmp_path_factory.mktemp("trained"))


@pytest.fixture
def run(trained: Trained, tmp_path: Path) -> Run:
    """The finished run, a copy of its own."""
    return trained.copy(tmp_path / "runs").run("ce", 0)


def problem_of(run: Run) -> str:
    """What is wrong, as listed; the same must stop the run itself from being taken for finished."""
    (found,) = (each for each in runs_in(run.folder.parent) if each.label == "ce")
    assert found.summary is None
    assert found.state == "unreadable"
    assert f"fix: rm -r {run.folder}" in found.problem
    assert not run.is_finished
    return found.problem


def rewrite_summary(run: Run, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a summary, and compute its checksum again."""
    summary = read_summary(run.folder)
    assert summary is not None
    change(summary)
    (run.folder / "summary.json").write_bytes(summary_document(summary))


def rewrite_metrics(run: Run, change: Callable[[list[dict[str, Any]]], object]) -> None:
    epochs = read_metrics(run.folder, run.sha256)
    assert epochs is not None
    change(epochs)
    lines = (metrics_line(epoch, run.sha256) for epoch in epochs)
    (run.folder / "metrics.jsonl").write_bytes(b"".join(lines))


def setter(*path: str, to: Any) -> Callable[[Any], None]:
    def change(content: Any) -> None:
        *above, last = path
        for key in above:
            content = content[key]
        content[last] = to

    return change


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (setter("last", "top1_error", to=0.01), r"has last \{.*'top1_error': 0.01"),
        (setter("best", "metrics", "top1_error", to=0.01), "has best"),
        (setter("best", "epoch", to=1_000), "has best"),
        (setter("best", "chosen_on", to="validation"), "has best"),
        (setter("epochs", to=2), "has epochs 2, but the run has 3"),
        (
            setter("last", "top1_error", to=101.0),
            "last: .*: top1_error is 101.0, expected a number",
        ),
        (setter("last", "top1_error", to="5"), "last.top1_error: found '5'"),
        (setter("last", to=None), "last: found None"),
        (setter("seconds", to=-1), "seconds: found -1"),
        (setter("seconds", to=True), "seconds: found True"),
        (setter("seed", to=2**64 - 1 + 0.5), "seed: found"),
        (setter("num_classes", to=None), "num_classes: found None"),
        (setter("device", to="x" * 2000), "device: found"),
        (setter("versions", to=[]), r"versions: found \[\]"),
        (setter("files_sha256", to={"../x": "0" * 64}), "files_sha256"),
        (setter("more", to=1), "more: found 1"),
        (lambda summary: summary.pop("best"), "lacks best"),
        (lambda summary: summary.pop("device"), "lacks device"),
        (setter("best-ema", to={"epoch": 1}), "lacks best-ema.chosen_on"),
    ],
)
def test_a_forged_summary_is_no_result_though_its_checksum_is_right(
    run: Run, change: Callable[[dict[str, Any]], object], told: str
) -> None:
    rewrite_summary(run, change)
    with pytest.raises(BadFile, match=told):
        _ = run.summary
    assert "summary.json" in problem_of(run)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda epochs: epochs.pop(), "has epochs 3|epochs"),
        (lambda epochs: epochs.pop(0), "line 1 belongs to epoch 2"),
        (lambda epochs: epochs.reverse(), "line 1 belongs to epoch 3"),
        (lambda epochs: epochs[2]["test"].update(top1_error=0.01), "has last"),
        (lambda epochs: epochs[0]["test"].update(top1_error=0.01), "has best"),
        (lambda epochs: epochs[2].update(test=None), "has results that"),
        (lambda epochs: epochs[1].update(train_seconds=-1), "line 2: train_seconds"),
        (lambda epochs: epochs[1]["test"].update(top1_error="x"), "line 2: test.top1_error"),
        (lambda epochs: epochs[1].update(losses=[]), "line 2: losses"),
        (lambda epochs: epochs[1].pop("loss"), "line 2: lacks loss"),
    ],
)
def test_figures_that_the_metrics_do_not_give_are_no_result(
    run: Run, change: Callable[[list[dict[str, Any]]], object], told: str
) -> None:
    rewrite_metrics(run, change)
    with pytest.raises(BadFile, match=told):
        _ = run.summary
    problem_of(run)


def test_metrics_of_another_run_are_not_taken_for_this_ones(run: Run) -> None:
    epochs = read_metrics(run.folder, run.sha256) or []
    lines = [metrics_line(epoch, "0" * 64) for epoch in epochs]
    (run.folder / "metrics.jsonl").write_bytes(b"".join(lines))
    assert "line 1 does not match its checksum, or belongs to another" in problem_of(run)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"null",
        b"{}",
        b'{"last": NaN}',
        b"[" * 100_000,
        '{"last": 1}'.encode("utf-16"),
        b"\xff\xfe\x00",
        b'{"training": [1]}',
        b'{"training": {"epochs": 99999999999999999999}}',
        b"x" * 5 * 2**20,
    ],
)
@pytest.mark.parametrize("name", FILES)
def test_content_that_is_none_is_one_error_each(run: Run, name: str, content: bytes) -> None:
    (run.folder / name).write_bytes(content)
    assert f"{run.folder}/" in problem_of(run)


def test_an_edited_run_file_is_noticed_by_the_name_of_its_folder(run: Run) -> None:
    identity = {**run.identity, "training": {**run.identity["training"], "epochs": 2}}
    (run.folder / "run.json").write_bytes(run_document(identity))
    assert "unlike the folder's name" in problem_of(run)


@pytest.mark.parametrize("kind", ["FIFO", "folder", "link", "device", "sparse"])
@pytest.mark.parametrize("name", FILES)
def test_only_regular_files_of_a_sensible_size_are_read(run: Run, name: str, kind: str) -> None:
    path = run.folder / name
    path.rename(run.folder.parent / "away")
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "sparse":
        with path.open("wb") as file:
            file.truncate(10**11)
    else:
        path.symlink_to("/dev/zero" if kind == "device" else run.folder.parent / "away")
    problem_of(run)


@pytest.mark.parametrize("name", FILES)
def test_every_flipped_bit_is_noticed_or_harmless(run: Run, name: str) -> None:
    path = run.folder / name
    whole, summary = path.read_bytes(), run.summary
    for position in range(0, len(whole), 7):
        flipped = bytearray(whole)
        flipped[position] ^= 1 << position % 8
        path.write_bytes(flipped)
        try:
            assert read_result(run.folder, run.identity) == summary, position
        except BadFile:
            continue
        # 1e-05 and 1E-05 are one number, and so are some that differ in the 17th digit.
        assert numbers_in(flipped, name) == numbers_in(whole, name), position


def numbers_in(content: bytes, name: str) -> list[Any]:
    documents = content.splitlines() if name.endswith(".jsonl") else [content]
    return [json.loads(each) for each in documents]


@pytest.mark.parametrize("name", ["run.json", "summary.json"])
def test_a_run_file_without_its_checksum_is_refused(run: Run, name: str) -> None:
    checksum = "run_sha256" if name == "run.json" else "content_sha256"
    content = json.loads((run.folder / name).read_text())
    del content[checksum]
    (run.folder / name).write_text(json.dumps(content))
    assert f"{name} lacks {checksum}" in problem_of(run)


def test_names_in_a_summary_reach_neither_the_terminal_nor_the_page_as_they_are(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    rewrite_summary(run, setter("model", to="\x1b]0;title\x07<script>|x"))
    rewrite_summary(run, setter("device", to="\x1b[31m`x`"))
    assert report([str(run.folder.parent)]) == 0
    printed = capsys.readouterr()
    pages = [(run.folder.parent / name).read_text() for name in ("ablation.md", "report.html")]
    for text in (printed.out + printed.err, *pages):
        assert "\x1b" not in text
        assert text.count("<script") == ("sortable" in text)  # the page's own


def test_a_damaged_result_is_neither_trained_over_nor_believed(run: Run) -> None:
    rewrite_summary(run, setter("last", "top1_error", to=0.01))
    before = (run.folder / "last.pt").stat().st_mtime_ns
    with pytest.raises(BadFile, match=r"has last .*\n  fix: rm -r .* train this run again"):
        train_student(run, device="cpu")
    assert (run.folder / "last.pt").stat().st_mtime_ns == before


def test_a_summary_of_another_identity_is_none_of_this_run(run: Run) -> None:
    rewrite_summary(run, setter("run_sha256", to=identity_sha256({"another": 1})))
    assert run.summary is None


@pytest.mark.parametrize("level", [0, 1, 2])
def test_a_file_in_place_of_a_folder_is_named(run: Run, level: int) -> None:
    place = [run.folder, run.folder.parent, run.folder.parent.parent][level]
    shutil.rmtree(place)
    place.write_bytes(b"")
    with pytest.raises(BadFile, match="is not a folder of a run\n  fix: move it away"):
        _ = run.summary


def test_a_run_folder_that_is_a_link_is_not_removed(run: Run, tmp_path: Path) -> None:
    from teach_once.train.runs.folder import remove_run

    away = tmp_path / "away"
    shutil.move(run.folder, away)
    run.folder.symlink_to(away)
    with pytest.raises(BadFile, match="is a symbolic link, expected a folder"):
        remove_run(run.folder)
    assert (away / "summary.json").exists()
