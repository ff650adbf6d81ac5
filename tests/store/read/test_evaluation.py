"""Evaluation caches: caches of one view inside a cache, with the same code."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import h5py
import pytest

from teach_once.runtime.machine.urls import ObjectUrl, path_or_url
from teach_once.store import CacheError, CacheMismatch, TeacherCache
from teach_once.store.command import cli
from teach_once.store.errors import CacheDamaged
from teach_once.store.format.index import INDEX
from teach_once.store.identity import evaluation_identity
from teach_once.store.move.copy import copy_cache
from teach_once.store.move.hdf5 import export_cache, import_cache
from teach_once.store.move.trim import trim_cache
from teach_once.store.place.folder import Folder
from teach_once.store.place.index import read_index, remove_index
from teach_once.store.read.evaluation import evaluation_names, evaluation_path, open_evaluation
from teach_once.store.read.mirror import attach
from tests.support.caches.damage import flip
from tests.support.caches.object_store import Server
from tests.support.caches.random_cache import IDENTITY, open_any, records_of, write_item

INNER = evaluation_identity(IDENTITY, "test-digest", {"type": "center"})
INNER_INDEX = f"evaluation/test/{INDEX}"


def finished(path: Path, seed: int = 0, **changes: Any) -> Path:
    with open_any(path, **changes) as writer:
        for item in writer.work:
            write_item(writer, item, seed)
        assert writer.left_over() == []
        writer.finish({})
    return path


def with_evaluation(path: Path, **changes: Any) -> Path:
    """A cache, and the outputs for its test split, which are others."""
    finished(path, **changes)
    finished(evaluation_path(path, "test"), 1, identity=INNER, num_views=1, **changes)
    return path


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return with_evaluation(tmp_path / "t-e4812202")


def assert_whole(path: Path) -> None:
    assert TeacherCache.open(path).faults() == []
    assert evaluation_names(path) == ["test"]
    inner = open_evaluation(path, IDENTITY, "test")
    assert inner.faults() == []
    assert inner.num_views == 1
    expected = records_of(0, slice(None), 1)
    assert all((values == expected[tap]).all() for tap, values in inner.read_view(0).items())


def test_evaluation_cache_is_read_beside_the_views_of_its_parent(cache: Path) -> None:
    assert_whole(cache)
    outer = TeacherCache.open(cache).read_view(0)
    assert (outer["logits"] == records_of(0, slice(None))["logits"]).all()


def test_index_names_an_evaluation_cache_by_its_own_index(cache: Path) -> None:
    place, manifest = Folder(cache), TeacherCache.open(cache).manifest
    index = read_index(place, manifest)
    assert index is not None
    assert index[INNER_INDEX].size == (cache / INNER_INDEX).stat().st_size
    inner = evaluation_path(cache, "test")
    with open_any(inner, identity=INNER, num_views=2):  # grows
        assert not (cache / INDEX).exists()
        assert not (inner / INDEX).exists()
    finished(inner, 1, identity=INNER, num_views=2)
    assert INNER_INDEX in (read_index(place, manifest) or {})


def test_index_of_the_parent_is_gone_when_the_removal_of_the_inner_one_is_killed(
    cache: Path,
) -> None:
    class Killed(Folder):
        def delete(self, key: str) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        remove_index(Killed(evaluation_path(cache, "test")))
    assert not (cache / INDEX).exists()
    assert (cache / INNER_INDEX).exists()


def test_writer_below_a_folder_that_is_named_evaluation_but_no_cache_keeps_its_files(
    tmp_path: Path,
) -> None:
    (tmp_path / INDEX).write_text("somebody else's")
    cache = finished(tmp_path / "evaluation" / "t-e4812202")
    finished(cache, num_views=3)
    assert (cache / INDEX).exists()
    assert (tmp_path / INDEX).read_text() == "somebody else's"


def test_evaluation_names_of_a_folder_without_a_manifest_leave_it_out(cache: Path) -> None:
    (cache / "evaluation" / "begun").mkdir()
    assert evaluation_names(cache) == ["test"]


def test_index_of_a_cache_in_use_is_left_to_its_writer(cache: Path) -> None:
    inner = evaluation_path(cache, "test")
    with open_any(cache, num_views=3):
        finished(inner, 1, identity=INNER, num_views=2)
        assert not (cache / INDEX).exists()


@pytest.mark.parametrize("where", ["copies", "s3://bucket/copies"])
def test_copy_takes_evaluation_caches_along(
    server: Server, cache: Path, tmp_path: Path, where: str
) -> None:
    dest = path_or_url(where) if ":" in where else tmp_path / where
    made, _ = copy_cache(TeacherCache.open(cache), dest)
    assert_whole(made)
    back, _ = copy_cache(TeacherCache.open(made), tmp_path / "back")
    assert_whole(back)
    assert INNER_INDEX in (read_index(Folder(back), TeacherCache.open(back).manifest) or {})


def test_evaluation_cache_in_a_bucket_is_written_by_the_same_writer(
    server: Server, spool: Path
) -> None:
    url = path_or_url("s3://bucket/caches/t-e4812202")
    assert isinstance(url, ObjectUrl)
    assert_whole(with_evaluation(url, spool_folder=spool))
    assert f"caches/t-e4812202/{INDEX}" in server.all_keys()


def test_trim_leaves_evaluation_caches_and_their_place_in_the_index(cache: Path) -> None:
    trim_cache(cache, num_views=1)
    assert_whole(cache)
    assert INNER_INDEX in (read_index(Folder(cache), TeacherCache.open(cache).manifest) or {})


def test_evaluation_cache_is_exported_on_its_own(cache: Path, tmp_path: Path) -> None:
    export_cache(evaluation_path(cache, "test"), tmp_path / "test.h5")
    opened = TeacherCache.open(tmp_path / "test.h5")
    assert opened.faults() == []
    assert opened.identity == INNER
    assert evaluation_names(tmp_path / "test.h5") == []


def test_one_file_has_the_evaluation_caches_and_gives_the_folder_back(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "whole.h5"
    export_cache(cache, file)
    assert_whole(file)
    assert cli(["check", str(file)]) == 0
    assert f"{file}/evaluation/test is valid" in capsys.readouterr().out
    assert cli(["info", str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["evaluations"] == ["test"]
    back = import_cache(file, tmp_path / "back")
    assert_whole(back)
    for name in ("", "evaluation/test"):
        arrays = sorted((cache / name / "teacher.zarr").rglob("c.*"))
        assert arrays
        for each in arrays:
            assert (back / each.relative_to(cache)).read_bytes() == each.read_bytes()
    assert INNER_INDEX in (read_index(Folder(back), TeacherCache.open(back).manifest) or {})


def test_flipped_byte_of_an_evaluation_cache_in_one_file_is_named(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "whole.h5"
    export_cache(cache, file)
    with h5py.File(file) as opened:
        offset = opened["evaluation/test/logits"].id.get_offset()
    content = bytearray(file.read_bytes())
    content[offset + 5] ^= 1
    file.write_bytes(content)
    assert cli(["check", str(file)]) == 1
    told = capsys.readouterr().out
    assert f"{file} is valid" in told
    assert f"{file}/evaluation/test is invalid: 1 fault" in told
    with pytest.raises(CacheDamaged, match="logits"):
        open_evaluation(file, IDENTITY, "test").read_view(0)


def test_evaluation_cache_of_another_parent_in_one_file_is_refused(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, other = tmp_path / "whole.h5", {**INNER, "parent_sha256": "0" * 64}
    export_cache(finished(tmp_path / "alone" / cache.name), file)
    with h5py.File(file, "r+") as opened:
        inner = finished(tmp_path / "inner", 1, identity=other, num_views=1)
        export_cache(inner, tmp_path / "inner.h5")
        with h5py.File(tmp_path / "inner.h5") as theirs:
            opened.create_group("evaluation")
            theirs.copy(theirs["/"], opened["evaluation"], "test")
    with pytest.raises(CacheMismatch, match="belongs to another cache"):
        open_evaluation(file, IDENTITY, "test")
    assert cli(["check", str(file)]) == 1
    assert "belongs to another cache" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["soft", "external", "dataset", "no manifest", "missing"])
def test_group_of_another_kind_in_one_file_is_an_error(
    cache: Path, tmp_path: Path, kind: str
) -> None:
    file = tmp_path / "whole.h5"
    export_cache(finished(tmp_path / "alone" / cache.name), file)
    with h5py.File(file, "r+") as opened:
        group = opened.create_group("evaluation")
        if kind == "soft":
            group["test"] = h5py.SoftLink("/")
        elif kind == "external":
            group["test"] = h5py.ExternalLink("/etc/passwd", "/")
        elif kind == "dataset":
            group["test"] = [1, 2]
        elif kind == "no manifest":
            group.create_group("test").attrs["format"] = "teach-once-cache"
    with pytest.raises(CacheError):
        open_evaluation(file, IDENTITY, "test")
    assert TeacherCache.open(file).faults() == []


def test_check_reads_evaluation_caches_too(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli(["check", str(cache)]) == 0
    assert "2 of 2 caches are valid" in capsys.readouterr().out
    flip(next(iter(evaluation_path(cache, "test").glob("teacher.zarr/logits/c.*"))), 3)
    assert cli(["check", str(cache)]) == 1
    assert "evaluation/test is invalid: 1 fault" in capsys.readouterr().out.replace("\n", "")


def test_evaluation_cache_of_another_parent_is_refused_and_a_fault(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    finished(other, identity={**IDENTITY, "dataset": {"digest": "e"}})
    shutil.copytree(cache / "evaluation", other / "evaluation")
    with pytest.raises(CacheMismatch, match="belongs to another cache"):
        open_evaluation(other, TeacherCache.open(other).identity, "test")
    with pytest.raises(CacheMismatch, match="belongs to another cache"):
        copy_cache(TeacherCache.open(other), tmp_path / "copies")
    assert cli(["check", str(other)]) == 1
    assert "belongs to another cache than the one around it" in capsys.readouterr().out


def test_info_names_evaluation_caches(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli(["info", str(cache)]) == 0
    assert "\nevaluation test\n" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["..", "a/b", "", ".hidden", "a..b"])
def test_name_of_an_evaluation_cache_never_leads_elsewhere(cache: Path, name: str) -> None:
    with pytest.raises(CacheError, match="not a name"):
        evaluation_path(cache, name)


def test_evaluation_cache_is_read_through_a_mirror(
    server: Server, spool: Path, tmp_path: Path
) -> None:
    url = path_or_url("s3://bucket/caches")
    assert isinstance(url, ObjectUrl)
    with_evaluation(url / "t-e4812202", spool_folder=spool)
    path = attach(url, tmp_path / "mirror", 10**9) / "t-e4812202"
    assert_whole(path)
    before = len(server.requests)
    assert_whole(path)
    chunks = [name for _, name in server.requests[before:] if "/c.0" in name]
    assert chunks == []  # they are in the mirror now


def test_evaluation_names_of_a_mirrored_cache_without_any_are_none(
    server: Server, spool: Path, tmp_path: Path
) -> None:
    url = path_or_url("s3://bucket/caches")
    assert isinstance(url, ObjectUrl)
    finished(url / "t-e4812202", spool_folder=spool)
    path = attach(url, tmp_path / "mirror", 10**9) / "t-e4812202"
    assert evaluation_names(path) == []
    with pytest.raises(CacheError):
        open_evaluation(path, IDENTITY, "test")
