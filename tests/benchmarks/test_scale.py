"""The benchmark of ImageNet's size: its folder tree is correct, and it prints all rows."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import __main__ as suite
from benchmarks.synthetic import photographs
from benchmarks.targets import scale
from teach_once.runtime.command.cost import Memory
from teach_once.store.errors import CacheFull
from teach_once.views.images.folders import image_folder


@pytest.fixture
def few_classes(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(scale, "CLASSES", 4)
    return 4


def test_a_tree_is_links_to_few_files_and_says_the_digest_of_each_sample(
    few_classes: int, tmp_path: Path
) -> None:
    contents = list(photographs.photographs(2))
    digests = photographs.photograph_folder(tmp_path / "tree", 18, contents, few_classes)
    source = image_folder(tmp_path / "tree")
    assert np.bincount(source.train.labels).tolist() == [5, 5, 4, 4]
    assert len(source.test) == few_classes
    assert np.array_equal(source.train.read_digests(np.arange(18)), digests)
    assert len(np.unique(digests, axis=0)) == 2
    originals = list((tmp_path / "tree/originals").iterdir())
    assert len(originals) == 2
    assert sum(file.stat().st_nlink - 1 for file in originals) == 18 + few_classes


def test_a_disk_without_room_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    photographs.check_disk(tmp_path, 1000)
    with pytest.raises(CacheFull, match="are needed"):
        photographs.check_disk(tmp_path, 1000, more_bytes=10**18)


@pytest.mark.long
def test_every_row_is_measured_and_nothing_is_left_behind(
    few_classes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scale, "BLOCKS", (100, 1000))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    # These start twelve programs, which are tested by themselves.
    monkeypatch.setattr(scale, "first_steps", lambda sizes: [])
    monkeypatch.setattr(scale, "memory_of_pass", lambda *_: (2e9, 1e9))
    monkeypatch.setattr(scale, "memory_of_training", lambda *_: (2e9, 1e9))
    files = ["--docs", str(tmp_path / "b.md"), "--json", str(tmp_path / "b.json")]
    small = ["--samples", "40", "--views", "4", "--images", "16", "--rounds", "1"]
    assert suite.main(["scale", *small, *files]) == 0
    found = {row["what"]: row["value"] for row in json.loads((tmp_path / "b.json").read_text())}
    assert {"opening a cache of 4 views (s)", "memory of stage 1: taken ÷ planned"} <= set(found)
    assert sum("large ÷ small" in what for what in found) == 6
    assert found["memory of stage 2: taken ÷ planned"] == 0.5
    assert "| scheduling 100 and 1,000 blocks, µs each |" in (tmp_path / "b.md").read_text()
    assert not list(tmp_path.glob("scale-*"))


def test_the_memory_of_a_plan_is_read_in_the_form_that_plans_have() -> None:
    assert scale.ram_bytes(f"memory   {Memory(2_500_000, gpu_bytes=0)} (9 GB free)") == 2_500_000


def test_scheduling_that_looks_through_all_blocks_would_be_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(scale, "BLOCKS", (1_000, 10_000))
    (line,) = scale.scheduling()
    assert dataclasses.replace(line.verdict, value=10.6).mark == "✗ missed"
    assert scale.seconds_per_block(500) > 0
