"""Blocks written by one process and committed by another."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from teach_once.store import CacheMissing, TeacherCache
from teach_once.store.errors import SamplesChanged
from teach_once.store.write.staging import AsideWriter, Written
from teach_once.store.write.writer import CacheWriter
from tests.support.caches.random_cache import open_writer, records_of


def written(writer: CacheWriter, *, seed: int = 0, changed: int = 0) -> list[Written]:
    """All of the writer's work, as a node writes it."""
    node = AsideWriter(writer.path, writer.manifest, writer.work)
    for item in writer.work:
        rows = slice(item.block.start, item.block.stop)
        records = records_of(item.block.view, rows, seed)
        records["sample_digest"] = records["sample_digest"].copy()
        records["sample_digest"][:, -1] += np.uint8(changed)
        node.write_block(item.block, records)
    return node.written


def lines(path: Path) -> int:
    files = (path / "journal").glob("*.jsonl")
    return sum(len(file.read_text().splitlines()) for file in files)


def test_nothing_exists_before_it_is_committed_and_then_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "c"
    with open_writer(path) as writer:
        blocks = written(writer)
        assert lines(path) == 0
        assert not list((path / "teacher.zarr/logits").glob("c.*"))
        assert len(writer.pending()) == len(blocks) == 6
        assert all(writer.commit_written(block) for block in blocks)
        assert writer.left_over() == []
    opened = TeacherCache.open(path)
    assert opened.faults() == []
    for view in range(2):
        for tap, values in opened.read_view(view).items():
            assert (values == records_of(view, slice(None))[tap]).all()


def test_a_block_that_two_nodes_wrote_is_committed_once_and_nothing_is_left(
    tmp_path: Path,
) -> None:
    path = tmp_path / "c"
    with open_writer(path) as writer:
        first, second, late = written(writer), written(writer, seed=1), written(writer, seed=2)
        assert [writer.commit_written(block) for block in first] == [True] * 6
        assert [writer.commit_written(block) for block in second] == [False] * 6
        assert len(late) == 6  # of a node that was given up for dead: nobody commits them
        writer.remove_asides()
    assert lines(path) == 6
    assert not list(path.rglob("*.tmp"))
    opened = TeacherCache.open(path)
    assert opened.faults() == []
    assert (opened.read_view(1)["stage1"] == records_of(1, slice(None))["stage1"]).all()


def test_what_nodes_left_is_removed_by_the_next_writer(tmp_path: Path) -> None:
    with open_writer(tmp_path / "c") as writer:
        written(writer)
    assert list((tmp_path / "c").rglob("*.tmp"))
    with open_writer(tmp_path / "c"):
        assert not list((tmp_path / "c").rglob("*.tmp"))


@pytest.mark.parametrize("size", [None, 5])
def test_files_that_the_committing_process_does_not_see_are_an_error(
    tmp_path: Path, size: int | None
) -> None:
    with open_writer(tmp_path / "c") as writer:
        block = written(writer)[0]
        (aside,) = (tmp_path / "c").rglob(block.chunks["logits"][0])
        aside.unlink() if size is None else aside.write_bytes(b"." * size)
        found = "missing" if size is None else "truncated: 5 of "
        with pytest.raises(CacheMissing, match=rf"(?s){found}.*a folder that all nodes share"):
            writer.commit_written(block)
        assert lines(tmp_path / "c") == 0


def test_samples_that_nodes_read_differently_are_an_error(tmp_path: Path) -> None:
    with open_writer(tmp_path / "c") as writer:
        for block in written(writer)[:3]:
            writer.commit_written(block)
        with pytest.raises(SamplesChanged, match="the first is sample 0"):
            writer.commit_written(written(writer, changed=1)[3])
        assert lines(tmp_path / "c") == 3
