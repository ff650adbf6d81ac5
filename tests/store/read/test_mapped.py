"""Memory-mapped rows of a cache: open files and address space, and the error for a shortage."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import typer

from teach_once.runtime.command.frame import new_app, run_command
from teach_once.runtime.safe.safe_read import BadFile
from teach_once.store import CacheDamaged, TeacherCache
from teach_once.store.move.hdf5 import export_cache
from teach_once.store.place.chunks import map_file
from teach_once.store.read.mapped import MappedRows
from tests.support.caches.random_cache import LABELS, TAPS, fill


@pytest.fixture(params=["folder", "hdf5"])
def cache(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = fill(tmp_path / "caches" / "t-e4812202")
    if request.param == "hdf5":
        export_cache(path, tmp_path / "cache.h5")
        return tmp_path / "cache.h5"
    return path


@contextmanager
def no_more_open_files() -> Iterator[None]:
    """Lower this process's limit of open files to what is open."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.open("/dev/null", os.O_RDONLY)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def mapped_bytes(path: Path) -> list[int]:
    """Sizes of this process's maps of files at or below `path`."""
    lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(path) in line]
    ends = [[int(end, 16) for end in line.split()[0].split("-")] for line in lines]
    return [stop - start for start, stop in ends]


def test_mapped_rows_of_all_blocks_keep_no_file_open(cache: Path) -> None:
    rows = MappedRows(TeacherCache.open(cache), list(TAPS))
    open_before = len(os.listdir("/proc/self/fd"))
    rows.read(0, np.arange(len(LABELS)))
    assert len(mapped_bytes(cache)) >= 1
    assert len(os.listdir("/proc/self/fd")) == open_before


def test_map_file_of_a_part_maps_its_pages_alone_and_unmaps_them(tmp_path: Path) -> None:
    file, page = tmp_path / "values", resource.getpagesize()
    expected = np.arange(100 * page, dtype=np.uint16)
    expected.tofile(file)
    values = map_file(file, "uint16", (10, 3), offset=2 * 50_001)
    assert (values == expected[50_001:50_031].reshape(10, 3)).all()
    assert sum(mapped_bytes(file)) <= 2 * page
    row = values[3]
    del values
    assert (row == expected[50_010:50_013]).all()  # a part of it keeps the pages mapped
    del row
    assert mapped_bytes(file) == []


def test_mapped_values_are_read_only(cache: Path) -> None:
    source = TeacherCache.open(cache).source
    values = source.mapped("stage1", source.manifest.block(0, 1))
    with pytest.raises(ValueError, match="read-only"):
        values[0, 0] = 1


def test_map_file_beyond_the_end_is_refused_with_both_sizes(tmp_path: Path) -> None:
    file = tmp_path / "values"
    file.write_bytes(bytes(100))
    with pytest.raises(BadFile, match="has 100 bytes, expected 104"):
        map_file(file, "uint8", (100,), offset=4)


@pytest.mark.parametrize("reading", ["open", "read", "verify", "map", "check"])
def test_too_few_open_files_are_not_called_damage(cache: Path, reading: str) -> None:
    opened = TeacherCache.open(cache)
    block = opened.manifest.block(0, 0)
    reads = {
        "open": lambda: TeacherCache.open(cache),
        "read": lambda: opened.read_view(0),
        "verify": lambda: opened.source.verify("stage1", block),
        "map": lambda: opened.source.mapped("stage1", block),
        "check": lambda: opened.source.faults(every_byte=True),
    }
    with no_more_open_files(), pytest.raises(OSError, match="Too many open files") as caught:
        reads[reading]()
    assert not isinstance(caught.value, CacheDamaged)
    assert TeacherCache.open(cache).read_view(0)["logits"].shape == (11, 3)


def test_command_with_too_few_open_files_says_how_to_raise_the_limit(
    cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    app: typer.Typer = new_app()

    @app.command()
    def read() -> None:
        with no_more_open_files():
            TeacherCache.open(cache).read_view(0)

    assert run_command(app, []) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: Too many open files: this process may open ")
    assert "fix: ulimit -n " in said
