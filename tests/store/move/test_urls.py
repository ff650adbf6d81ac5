"""Every command that reads a cache reads one at s3://bucket/prefix through the mirror."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePath

import numpy as np
import pytest
import torch

from teach_once.configs.schema import TeacherConfig
from teach_once.precompute.verify import cli as verify
from teach_once.runtime.machine.urls import ObjectUrl, path_or_url
from teach_once.runtime.safe.confined import Root
from teach_once.store import TeacherCache
from teach_once.store.command import cli as store
from teach_once.store.errors import CacheError
from teach_once.store.format.spec import Block
from teach_once.store.move.copy import copy_cache
from teach_once.store.place import mirror_folder
from teach_once.store.place.mirror_folder import MARK, MirrorFolder
from teach_once.store.read.mirror import attach, attached
from teach_once.store.read.zarr_source import ZarrSource
from teach_once.train.cli.commands import cli as train
from teach_once.train.outputs.cached_teacher import WindowedTeacher
from teach_once.train.outputs.shuffle_buffer import ShuffleBuffer
from tests.support.caches.mirror_users import need, read_views
from tests.support.caches.object_store import Server, emptied, running
from tests.support.caches.teacher_cache import make_cache
from tests.support.programs.processes import Forks
from tests.support.project import QUICK_RUN, make
from tests.support.training.printed_report import write_printed_report

CACHES = "s3://bucket/caches"
PLENTY = 10**9


@pytest.fixture(scope="module")
def server(
    small_teacher: Callable[..., TeacherConfig], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """A store with the cache of `small_teacher`, by the name of digits-resnet20."""
    with running() as started, emptied(started):
        copy_cache(make_cache(small_teacher(), tmp_path_factory.mktemp("made")), url())
        yield started


@pytest.fixture
def words(
    server: Server,
    small_teacher: Callable[..., TeacherConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> list[str]:
    """The overrides by which that cache is found; in a folder that holds nothing."""
    monkeypatch.chdir(tmp_path)
    server.requests.clear()
    teacher = small_teacher().teacher
    return [
        *(
            "teacher.dataset.max_per_class=6",
            "teacher.views.count=3",
            "teacher.teacher.arch=resnet8",
        ),
        *("teacher.taps.attention=null", "teacher.taps.hint=null"),
        f"teacher.teacher.weights={teacher.weights}",
    ]


def url() -> ObjectUrl:
    found = path_or_url(CACHES)
    assert isinstance(found, ObjectUrl)
    return found


def chunks_asked(server: Server) -> list[str]:
    """The keys of records that were asked for since the last call."""
    found = [path for method, path in server.requests if "/c." in path and "labels" not in path]
    server.requests.clear()
    return found


def size_of(mirror: Path) -> int:
    """The bytes that count."""
    files = (path for path in (mirror / "bucket").rglob("*") if path.is_file())
    return sum(path.stat().st_size for path in files)


def of_teacher(words: list[str]) -> list[str]:
    return [word.removeprefix("teacher.") for word in words]


# ---- commands


def test_a_study_is_checked_planned_trained_and_exported(
    server: Server, words: list[str], forks: None, capsys: pytest.CaptureFixture[str]
) -> None:
    of_study = ["digits-resnet8", *QUICK_RUN, *words, "--caches", CACHES]
    assert train(["check", *of_study, "--methods", "kd cd"]) == 0
    assert train(["plan", *of_study, "--no-trial", "--method", "kd"]) == 0
    assert "cache    found: s3://bucket/caches/digits-resnet20-" in capsys.readouterr().out
    assert chunks_asked(server) == []
    of_runs = ["ablation", *of_study, "--methods", "kd cd", "--jobs", "2"]
    assert train([*of_runs, "--seeds", "0"]) == 0
    asked = chunks_asked(server)
    assert 0 < len(asked) == len(set(asked))  # by the two processes together
    assert train([*of_runs, "--seeds", "1", "--shared-loading", "--jobs", "1"]) == 0
    assert chunks_asked(server) == []
    assert write_printed_report(capsys.readouterr().out) == 0
    assert train(["export", of_study[0], "out", *of_study[1:], "--method", "kd"]) == 0
    assert Path("out/student.pt2").is_file()
    assert not Path("caches").exists()


def test_one_cache_is_named_by_its_url(
    server: Server, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (name,) = (path.name for path in attach(url(), Path("looked"), PLENTY).iterdir())
    call = ["student", "digits-resnet8", "--method", "kd", *QUICK_RUN, *words]
    assert train([*call, "--cache", f"{CACHES}/{name}", "--mirror", "held"]) == 0
    assert "from s3://bucket/caches/digits-resnet20-" in capsys.readouterr().out
    assert train([*call, "--cache", f"{CACHES}/absent"]) == 2
    assert f"{CACHES}/absent is not a cache" in capsys.readouterr().err
    assert train([*call, "--cache", "s3://bucket"]) == 2
    assert "s3://bucket is a bucket, not a cache" in capsys.readouterr().err
    assert Path("held/bucket/caches", name).is_dir()


def test_the_teacher_is_compared_with_a_cache_at_a_url(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    call = ["digits-resnet20", "--caches", CACHES]
    assert verify([*call, *of_teacher(words), "--records", "20"]) == 0
    assert "valid: 20 records were computed again and agree" in capsys.readouterr().out
    assert store(["check", "--caches", CACHES]) == 0
    assert store(["list", "--caches", CACHES]) == 0


def test_a_teacher_whose_cache_is_at_a_url_is_not_trained(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    absent = [*of_teacher(words)[:-1], "teacher.weights=absent.pt"]
    assert train(["teacher", "digits-resnet20", "--caches", CACHES, *absent]) == 0
    assert " not found, and not needed: s3://bucket/caches/" in capsys.readouterr().out
    assert not Path("absent.pt").exists()


def test_make_hands_on_where_the_mirror_is() -> None:
    settings = (f"CACHES={CACHES}", "MIRROR=held here", "MIRROR_GB=7")
    given = f"--caches '{CACHES}' --mirror 'held here' --mirror-gb '7'"
    for target, count in (("train-student", 1), ("ablation", 1), ("export-student", 1)):
        assert make("-n", target, *settings).stdout.count(given) == count
    assert given in make("-n", "check-recompute", *settings).stdout
    assert "--mirror" not in make("-n", "train-student").stdout


# ---- one mirror for several


def mirrored(root: Path, most_bytes: int = PLENTY) -> TeacherCache:
    folder = attach(url(), root, most_bytes)
    return TeacherCache.open(next(folder.glob("digits-*")))


def test_what_one_process_has_fetched_another_does_not_fetch(
    server: Server, words: list[str], tmp_path: Path
) -> None:
    cache = mirrored(tmp_path / "mirror")
    context = Forks()
    processes = [
        context.Process(target=read_views, args=(attached(), cache.path, order))
        for order in ([0, 1, 2], [2, 1, 0], [0, 2, 1])
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    asked = chunks_asked(server)
    assert 0 < len(asked) == len(set(asked))
    cache.read_view(2)
    assert chunks_asked(server) == []


def test_threads_that_read_the_same_view_fetch_it_once(
    server: Server, words: list[str], tmp_path: Path
) -> None:
    caches = [mirrored(tmp_path / "mirror") for _ in range(4)]
    block = caches[0].manifest.block(0, 0)

    def digests(cache: TeacherCache) -> list[list[int]]:
        found = np.empty((block.rows, 16), np.uint8)
        cache.source.read("sample_digest", block, found)  # fetched when it is read
        return found.tolist()

    for read in (lambda cache: len(cache.read_view(0)), digests):
        with ThreadPoolExecutor(4) as pool:
            with MirrorFolder(tmp_path / "mirror", PLENTY).locked():
                results = [pool.submit(read, cache) for cache in caches]
                time.sleep(0.3)  # all of them find nothing here, and wait
            assert len({str(result.result()) for result in results}) == 1
    asked = chunks_asked(server)
    assert 0 < len(asked) == len(set(asked))


def test_digests_of_samples_take_one_look_at_the_mirror_and_stay_in_a_full_one(
    server: Server, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, looks, walk = mirrored(tmp_path / "plenty"), [], mirror_folder.walk_inside

    def noted(root: Root) -> Iterator[tuple[PurePath, int, os.stat_result]]:
        looks.append(root)
        return walk(root)

    monkeypatch.setattr(mirror_folder, "walk_inside", noted)
    assert cache.manifest.blocks_per_view > 3
    digests = cache.sample_digest
    assert len(looks) == 1
    mirrored(tmp_path / "plenty")  # again: all that describes it is here
    assert len(looks) == 1
    for view in (0, 1):
        cache.read_view(view)
    tight = mirrored(tmp_path / "tight", size_of(tmp_path / "plenty"))
    assert (tight.sample_digest == digests).all()
    own = list(tight.path.glob("teacher.zarr/sample_digest/c.*"))
    for path in own:
        os.utime(path, (1, 1))
    for view in (0, 1, 2):
        tight.read_view(view)
    assert all(path.exists() for path in own)
    assert len(list(tight.path.glob("teacher.zarr/logits/c.0.*"))) < cache.manifest.blocks_per_view


def test_the_blocks_of_a_window_are_fetched_together(
    server: Server, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, fetch, fetched = mirrored(tmp_path / "mirror"), ZarrSource.fetch, []

    def noted(source: ZarrSource, chunks: Sequence[tuple[str, Block]]) -> None:
        fetched.append(len(chunks))
        fetch(source, chunks)

    monkeypatch.setattr(ZarrSource, "fetch", noted)
    placement = WindowedTeacher(cache, ["logits", "stage1"], torch.device("cpu"), window_rows=32)
    order = ShuffleBuffer(cache.num_samples, cache.manifest.block_rows, 32).order(0, 1)
    placement.start_epoch(0, order)
    placement.close()
    assert fetched[0] == 2 * 2  # two blocks of two taps


def test_what_another_reader_of_this_process_needs_is_not_removed(
    server: Server, words: list[str], tmp_path: Path
) -> None:
    first, second = mirrored(tmp_path / "m"), mirrored(tmp_path / "m")
    first.read_view(0)
    tight = MirrorFolder(tmp_path / "m", size_of(tmp_path / "m") + 100)
    with (
        tight.locked() as opened,
        pytest.raises(CacheError, match="the current and the next view need"),
    ):
        tight.make_room(opened, 2000)  # more than that and the labels, which nobody needs now
    records = sum(chunk.stat().st_size for chunk in first.path.glob("teacher.zarr/*/c.*"))
    del first, second
    with tight.locked() as opened:
        tight.make_room(opened, records + 100)
    assert list((tmp_path / "m").rglob("teacher.zarr/*/c.0.*")) == []


def test_what_another_process_needs_goes_last_and_is_forgotten_with_it(tmp_path: Path) -> None:
    root = tmp_path / "mirror"
    folder = MirrorFolder(root, 250)
    with folder.locked() as opened:
        folder.make_room(opened, 0)
    needed, other = (root / f"b/c-{n}/teacher.zarr/logits/c.0.0.0" for n in (0, 1))
    for path, age in ((needed, 1), (other, 2)):  # the needed one was not used for longer
        path.parent.mkdir(parents=True)
        path.write_bytes(bytes(100))
        os.utime(path, (age, age))
    context = Forks()
    ready, done = context.Event(), context.Event()
    process = context.Process(target=need, args=(root, [needed], ready, done), daemon=True)
    process.start()
    assert ready.wait(60)
    with folder.locked() as opened:
        folder.make_room(opened, 100)
    assert needed.exists()
    assert not other.exists()
    with folder.locked() as opened:
        folder.make_room(opened, 200)
    assert not needed.exists()  # it will fetch it again
    done.set()
    process.join()
    assert len(list((root / ".in-use").iterdir())) == 2
    with folder.locked() as opened:
        folder.make_room(opened, 0)
    assert len(list((root / ".in-use").iterdir())) == 1


def test_what_is_removed_before_it_is_read_is_fetched_again(
    server: Server, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = mirrored(tmp_path / "mirror")
    monkeypatch.setattr(type(cache.source), "fetch", lambda self, chunks: None)
    records = cache.read_view(1)
    monkeypatch.undo()
    (again,) = [cache.read_view(1)]
    assert all((records[tap] == again[tap]).all() for tap in records)
    chunk = next(cache.path.glob("teacher.zarr/logits/c.1.*"))
    rows = cache.source.mapped("logits", cache.manifest.block(1, 0))
    chunk.unlink()
    assert (cache.source.mapped("logits", cache.manifest.block(1, 0)) == rows).all()


def test_what_a_killed_process_left_half_written_is_removed(
    words: list[str], tmp_path: Path
) -> None:
    cache = mirrored(tmp_path / "mirror")
    left = cache.path / "teacher.zarr/logits/.c.0.0.0.1234.tmp"
    left.parent.mkdir(exist_ok=True)
    left.write_bytes(b"half")
    cache.read_view(0)
    assert not left.exists()


def test_a_folder_of_something_else_is_not_made_a_mirror(words: list[str], tmp_path: Path) -> None:
    mine = tmp_path / "caches/mine/teacher.zarr/logits/c.0.0.0"
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"mine")
    with pytest.raises(CacheError, match=r"caches is not empty, and no mirror: .*\n  fix: name"):
        mirrored(tmp_path / "caches", 1)
    assert mine.read_bytes() == b"mine"
    assert not (tmp_path / "caches" / MARK).exists()
