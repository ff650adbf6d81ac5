"""Training from a cache in an object store, read once through a folder of limited size."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from teach_once.configs.schema import StudentConfig, TeacherConfig
from teach_once.runtime.machine.urls import ObjectUrl, path_or_url
from teach_once.store import CacheDamaged, CacheFull, TeacherCache
from teach_once.store.inspect.find import find_cache
from teach_once.store.move.copy import copy_cache
from teach_once.store.place.mirror import MirrorOfBucket
from teach_once.store.read.mirror import attach, local_folder
from teach_once.train.cli.commands import cli
from teach_once.train.runs.study import open_study
from teach_once.train.studies.executor import StudyRecipe
from tests.support.caches.damage import flip
from tests.support.caches.object_store import Server, a_cache, emptied
from tests.support.caches.random_cache import IDENTITY, TAPS, records_of
from tests.support.caches.teacher_cache import make_cache
from tests.support.project import QUICK_RUN

LOGITS = "caches/t-e4812202/teacher.zarr/logits/c.1.0.0"
PLENTY = 10**9


@pytest.fixture
def server(running_server: Server, tmp_path: Path) -> Iterator[Server]:
    """The store with the cache of `a_cache` at s3://bucket/caches."""
    with emptied(running_server):
        copy_cache(TeacherCache.open(a_cache(tmp_path)), path_or_url("s3://bucket/caches"))
        running_server.requests.clear()
        yield running_server


def mirrored(tmp_path: Path, most_bytes: int = PLENTY) -> TeacherCache:
    url = path_or_url("s3://bucket/caches")
    assert isinstance(url, ObjectUrl)
    return TeacherCache.open(attach(url, tmp_path / "mirror", most_bytes) / "t-e4812202")


def is_view(cache: TeacherCache, view: int) -> bool:
    records = cache.read_view(view)
    expected = records_of(view, slice(None))
    return all((records[tap] == expected[tap]).all() for tap in TAPS)


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def fetched(server: Server) -> list[str]:
    """The keys of chunks that were asked for since the last call."""
    found = [path for method, path in server.requests if "/c." in path and "labels" not in path]
    server.requests.clear()
    return found


def test_a_complete_cache_opens_with_at_most_eight_requests(server: Server, tmp_path: Path) -> None:
    url = path_or_url("s3://bucket/caches")
    assert isinstance(url, ObjectUrl)
    folder = attach(url, tmp_path / "mirror", PLENTY)
    cache = find_cache(folder, "t", IDENTITY)
    assert 0 < len(server.requests) <= 8
    assert fetched(server) == []
    assert is_view(cache, 0)


def test_a_view_is_fetched_once_and_then_read_from_an_ordinary_folder(
    server: Server, tmp_path: Path
) -> None:
    cache = mirrored(tmp_path)
    assert is_view(cache, 0)
    assert len(fetched(server)) == 9
    assert is_view(cache, 1)
    assert len(fetched(server)) == 9
    for view in (0, 1, 0):
        assert is_view(cache, view)
    assert is_view(mirrored(tmp_path), 1)
    assert fetched(server) == []
    shutil.copytree(cache.path, tmp_path / "copy" / cache.path.name)
    assert is_view(TeacherCache.open(tmp_path / "copy" / cache.path.name), 1)


def test_what_was_not_read_for_longest_goes_first(server: Server, tmp_path: Path) -> None:
    view_bytes = sum(
        (tmp_path / "t-e4812202" / f"teacher.zarr/{tap}/c.0.{block}{end}").stat().st_size
        for tap, end in (("logits", ".0"), ("stage1", ".0"), ("correct", ""))
        for block in range(3)
    )
    labels = (tmp_path / "t-e4812202" / "teacher.zarr/labels/c.0").stat().st_size
    described = size_of(mirrored(tmp_path / "plenty").path) - labels
    cache = mirrored(tmp_path, 2 * view_bytes + labels + described + 100)
    assert is_view(cache, 0)
    assert is_view(cache, 1)
    fetched(server)
    assert is_view(cache, 0)
    assert is_view(cache, 1)
    assert fetched(server) == []
    older, newer = (
        tmp_path / "mirror/bucket/caches" / name / "teacher.zarr/logits/c.0.0.0"
        for name in ("older", "newer")
    )
    for mtime, other in ((1, older), (2, newer)):
        other.parent.mkdir(parents=True)
        other.write_bytes(bytes(100))
        os.utime(other, (mtime, mtime))
    for chunk in cache.path.glob("teacher.zarr/*/c.1.*"):  # of the other view that is needed
        os.utime(chunk, (0, 0))
    (cache.path / "teacher.zarr/logits/c.0.0.0").unlink()
    assert is_view(cache, 0)
    assert not older.exists()
    assert newer.exists()
    assert is_view(cache, 1)
    assert fetched(server) == ["/bucket/caches/t-e4812202/teacher.zarr/logits/c.0.0.0"]
    with pytest.raises(
        CacheFull, match=r"the current and the next view need .*\n  fix: --mirror-gb"
    ):
        mirrored(tmp_path / "small", described + view_bytes - 1).read_view(0)


def test_damage_in_the_mirror_is_fetched_again_and_damage_there_is_named(
    server: Server, tmp_path: Path
) -> None:
    cache = mirrored(tmp_path)
    assert is_view(cache, 0)
    flip(cache.path / "teacher.zarr/stage1/c.0.1.0", 2)
    fetched(server)
    assert is_view(cache, 0)
    assert fetched(server) == ["/bucket/caches/t-e4812202/teacher.zarr/stage1/c.0.1.0"]
    content = bytearray(server.ask("GET", LOGITS))
    content[3] ^= 1
    server.ask("PUT", LOGITS, bytes(content))
    with pytest.raises(CacheDamaged, match=f"wrong checksum: s3://bucket/{LOGITS}") as error:
        cache.read_view(1)
    assert "store copy CACHE s3://bucket/caches" in str(error.value)
    assert not (cache.path / "teacher.zarr/logits/c.1.0.0").exists()


def test_a_student_trains_from_a_url_as_from_the_folder(
    server: Server,
    small_teacher: Callable[..., TeacherConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    config = small_teacher()
    words = [
        *(
            "student",
            "digits-resnet8",
            "--method",
            "kd",
            *QUICK_RUN,
            "teacher.dataset.max_per_class=6",
        ),
        *("teacher.teacher.arch=resnet8", f"teacher.teacher.weights={config.teacher.weights}"),
        "teacher.views.count=3",
    ]
    assert cli([*words, "--caches", "s3://bucket/caches"]) == 2
    told = capsys.readouterr().err
    assert "precompute digits-resnet20 --caches s3://bucket/caches" in told
    opened = make_cache(config, tmp_path / "made")
    copy_cache(opened, path_or_url("s3://bucket/caches"))
    fetched(server)
    assert cli([*words, "--caches", "s3://bucket/caches", "--runs", "remote"]) == 0
    asked = fetched(server)
    assert 0 < len(asked) == len(set(asked))
    # kd reads no stage, but students are compared with the teacher's last means of test images.
    assert not any("stage" in key for key in asked if "/evaluation/" not in key)
    assert cli([*words, "--caches", "made", "--runs", "local"]) == 0
    (remote,), (local,) = (list(Path(f).glob("*/*/metrics.jsonl")) for f in ("remote", "local"))
    assert remote.parent.name == local.parent.name
    ours, theirs = (
        json.loads(run.with_name("summary.json").read_text()) for run in (remote, local)
    )
    assert ours["last"] == theirs["last"]
    assert "top1_agreement" in ours["last"]
    assert not Path("s3:").exists()


def test_another_process_of_an_ablation_reads_through_the_mirror_too(
    server: Server,
    small_teacher: Callable[..., TeacherConfig],
    small_student: Callable[..., StudentConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = small_teacher()
    url = path_or_url("s3://bucket/caches")
    copy_cache(make_cache(config, tmp_path / "made"), url)
    folder = local_folder(url, tmp_path / "mirror", 1.0)
    study = open_study(small_student(), config, caches_dir=folder, runs_dir=tmp_path / "runs")
    sent = pickle.dumps(StudyRecipe.of(study))
    monkeypatch.setattr("teach_once.store.read.mirror._attached", {})
    shutil.rmtree(tmp_path / "mirror")  # as on another machine
    source = pickle.loads(sent).open().cache.source  # noqa: S301
    assert isinstance(source.place, MirrorOfBucket)


def test_a_command_that_needs_a_folder_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    from teach_once.train.certify import cli as certify

    assert certify(["digits-resnet8", "--caches", "s3://bucket/caches"]) == 2
    assert "takes a folder of caches, not a URL" in capsys.readouterr().err
