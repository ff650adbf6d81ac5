"""Estimates of a cache's size without images and weights."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from teach_once.configs.schema import TeacherConfig
from teach_once.precompute.command import cli
from teach_once.runtime.formats import format_size
from tests.support.caches.teacher_cache import make_cache
from tests.support.project import ROOT

SIZES = ["--plan", "--samples", "60", "--classes", "10", "--image-px", "8"]


def test_an_estimate_has_the_bytes_and_files_of_the_cache_that_is_then_made(
    small_teacher: Callable[..., TeacherConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)  # which holds neither data nor weights
    for override in ("taps.channel_means=uint8", "taps.logits=uint8"):
        config = small_teacher(override)
        assert config.source is not None
        absent = [*config.source.overrides, "teacher.weights=absent.pt"]
        assert cli(["digits-resnet20", *SIZES, *absent]) == 0
        (line,) = re.findall("^as configured .*", capsys.readouterr().out, re.M)
        cells = re.split("  +", line)[1:]
        manifest = make_cache(config, tmp_path / override, block_rows=64).manifest
        num_blocks = manifest.blocks_per_view * manifest.num_views
        assert cells == [
            f"{manifest.record_bytes:,}",
            format_size(60 * manifest.record_bytes),
            format_size(180 * manifest.record_bytes),
            f"{num_blocks * sum(not spec.all_views for spec in manifest.arrays.values())}",
        ]


def test_the_table_of_the_documents_is_what_the_command_prints(
    capsys: pytest.CaptureFixture[str],
) -> None:
    page = (ROOT / "docs/how-to/shrink.md").read_text()
    (command,) = re.findall("^teach-once precompute (.* --samples .*)$", page, re.M)
    assert cli(command.split()) == 0
    header, *rows = capsys.readouterr().out.splitlines()[1:]
    assert len(rows) == 6
    for row in (header, *rows):
        cells = " | ".join(re.split("  +", row.strip()))
        assert f"\n| {cells} |\n" in page


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--samples", "60", "--classes", "10"], "--plan --samples 1281167 --classes 1000"),
        (["--plan", "--samples", "60"], "--plan --samples 1281167 --classes 1000"),
        (["--plan", "--samples", "60", "--classes", "10"], "such as --image-px 32"),
        ([*SIZES, "taps.logits={top_k: 10}"], "number of classes (10)"),
    ],
)
def test_an_estimate_that_cannot_be_made_says_what_is_missing(
    given: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli(["digits-resnet20", *given]) == 2
    assert told in capsys.readouterr().err
