"""The journal's file: failed writes, removal during a pass, numbering."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from teach_once.configs.schema import TeacherConfig
from teach_once.precompute.compute.blocks import run_blocks
from teach_once.precompute.compute.teacher_pass import TeacherPass
from teach_once.runtime.safe.locks import Job, WriterLock
from teach_once.store import CacheError, CacheFull, TeacherCache
from tests.support.caches.random_cache import fill, journal_of, open_writer, write_item
from tests.support.caches.small_files import files_of_at_most
from tests.support.caches.teacher_cache import make_cache


def test_a_refused_line_is_one_message_and_the_lock_is_released(tmp_path: Path) -> None:
    path = tmp_path / "c"
    fill(path, blocks=2)
    journal_file = path / "journal" / "000002-0000.jsonl"
    size = (path / "journal" / "000001-0000.jsonl").stat().st_size // 2

    def write_two_blocks() -> None:
        with open_writer(path) as writer:
            for item in writer.work[:2]:
                write_item(writer, item)

    with files_of_at_most(size + 100), pytest.raises(CacheFull, match="too full"):
        write_two_blocks()  # there is room for each chunk, and not for a second line
    before = journal_file.read_bytes()
    assert before.count(b"\n") == 1
    assert before.endswith(b"\n")
    WriterLock(path, Job()).release()
    fill(path)
    assert TeacherCache.open(path).faults() == []


def test_a_line_after_a_refused_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "c"
    with open_writer(path) as writer:
        write_item(writer, writer.work[0])
        size = next((path / "journal").glob("*.jsonl")).stat().st_size
        with pytest.raises(CacheFull), files_of_at_most(size + 100):
            write_item(writer, writer.work[1])
        for item in writer.work[1:]:
            write_item(writer, item)
    assert journal_of(path).damaged_lines == []
    assert TeacherCache.open(path).faults() == []


@pytest.mark.parametrize("removal", ["removed", "replaced", "folder"])
def test_a_journal_file_that_is_removed_under_a_pass_ends_it(tmp_path: Path, removal: str) -> None:
    path = tmp_path / "c"
    with open_writer(path) as writer:
        write_item(writer, writer.work[0])
        file = next((path / "journal").glob("*.jsonl"))
        if removal == "folder":
            file.parent.rename(tmp_path / "elsewhere")
            file.parent.mkdir()
        else:
            content = file.read_bytes()
            file.unlink()
            if removal == "replaced":
                file.write_bytes(content)
        with pytest.raises(CacheError, match=r"000001-0000\.jsonl.* was removed or replaced"):
            write_item(writer, writer.work[1])
    fill(path)
    assert TeacherCache.open(path).faults() == []


def test_the_next_file_follows_the_last_one_though_an_earlier_one_was_removed(
    tmp_path: Path,
) -> None:
    path = tmp_path / "c"
    for _ in range(3):
        fill(path, blocks=1)
    (path / "journal" / "000002-0000.jsonl").unlink()
    fill(path)
    assert sorted(os.listdir(path / "journal")) == [
        "000001-0000.jsonl",
        "000003-0000.jsonl",
        "000004-0000.jsonl",
    ]
    assert TeacherCache.open(path).faults() == []


def test_a_pass_whose_commits_keep_vanishing_ends_with_an_error(
    small_teacher: Callable[..., TeacherConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_rounds = 0

    def run_and_remove(teacher_pass: TeacherPass, writer: Any, *rest: Any) -> int:
        nonlocal num_rounds
        num_rounds += 1
        assert num_rounds < 5, "the pass goes on endlessly"
        images = run_blocks(teacher_pass, writer, *rest)
        for file in (writer.path / "journal").glob("*.jsonl"):
            file.unlink()
        return images

    monkeypatch.setattr("teach_once.precompute.run_pass.run_blocks", run_and_remove)
    with pytest.raises(CacheError, match="another program changes committed blocks"):
        make_cache(small_teacher(), tmp_path / "caches")
