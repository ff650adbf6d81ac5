"""Leftovers of killed copies, imports and passes are removed by the next one."""

from __future__ import annotations

from pathlib import Path

import pytest

from teach_once.precompute.compute.spool import remove_spools
from teach_once.runtime.safe.locks import Job
from teach_once.store.command import cli
from teach_once.store.move.hdf5 import export_cache
from tests.support.caches.random_cache import fill, open_writer, write_item

LEFT = (
    ".manifest.json.4194000.tmp",
    "journal/.000001-0000.jsonl.4194000.tmp",
    "teacher.zarr/.zarr.json.4194000.tmp",
    "teacher.zarr/logits/.c.0.1.0.4194000.tmp",
    "teacher.zarr/labels/.c.0.4194000.tmp",
)


def leave_temporary_files(cache: Path) -> None:
    for name in LEFT:
        (cache / name).parent.mkdir(parents=True, exist_ok=True)
        (cache / name).write_bytes(b"half")


def temporary_files(cache: Path) -> list[str]:
    return sorted(str(path.relative_to(cache)) for path in cache.rglob(".*.tmp"))


@pytest.mark.parametrize("command", ["copy", "import"])
def test_copy_into_a_folder_removes_the_files_of_a_killed_one(command: str, tmp_path: Path) -> None:
    cache = fill(tmp_path / "caches" / "t-e4812202")
    export_cache(cache, tmp_path / "cache.h5")
    source = cache if command == "copy" else tmp_path / "cache.h5"
    target = tmp_path / "there" / cache.name
    leave_temporary_files(target)
    words = [str(source), str(target.parent)]
    assert cli([command, *words]) == 0
    assert temporary_files(target) == []


def test_last_rank_of_a_job_removes_the_files_of_killed_ranks(tmp_path: Path) -> None:
    with open_writer(tmp_path, job=Job("one", 0, 1)) as writer:
        leave_temporary_files(tmp_path)
        for item in writer.work:
            write_item(writer, item)
        assert writer.left_over() == []
    assert temporary_files(tmp_path) == []


def test_spools_of_cluster_workers_are_removed_and_those_of_ranks_kept(tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    journal.mkdir()
    for number in ("0000", "0012", "4611686018427387904"):
        (journal / f"{number}.spool").write_bytes(b"records")
    remove_spools(tmp_path, nobody_resumes=True)
    assert sorted(file.name for file in journal.iterdir()) == ["0000.spool", "0012.spool"]
    remove_spools(tmp_path)
    assert list(journal.iterdir()) == []
