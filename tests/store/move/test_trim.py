"""`store trim`: what it removes and keeps, and the result of an interruption."""

from __future__ import annotations

import itertools
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from teach_once.store import CacheBusy, CacheIncomplete, TapSpec, TeacherCache
from teach_once.store.command import cli
from teach_once.store.format.spec import DIGEST_SPEC, SAMPLE_DIGEST, chunk_path
from teach_once.store.move.trim import trim_cache
from tests.support.caches.random_cache import DIGESTS, TAPS, journal_of, open_writer, records_of

ATTENTION = {"attention1": TapSpec((4,), "float16")}
BASE = list(TAPS)


def attention_of(view: int, rows: slice) -> np.ndarray:
    return np.random.default_rng([9, view]).random((11, 4)).astype(np.float16)[rows]


def fill(path: Path, **changes: Any) -> Path:
    """A cache of blocks of eight samples, and what was measured of its teacher."""
    with open_writer(path, block_rows=8, **changes) as writer:
        for item in writer.work:
            rows = slice(item.block.start, item.block.stop)
            found = {
                **records_of(item.block.view, rows),
                "attention1": attention_of(item.block.view, rows),
            }
            writer.write_block(item.block, {tap: found[tap] for tap in item.taps})
        right = np.mean([records_of(v, slice(None))["correct"] for v in range(3)])
        writer.finish({"test_top1_error": 5.0, "train_agreement": float(right)})
    return path


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """Three views of four taps, one of them opt-in."""
    return fill(tmp_path / "t-e4812202", num_views=3, taps=TAPS | ATTENTION)


def files_of(cache: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(cache)): file.read_bytes()
        for file in cache.rglob("*")
        if file.is_file() and file.name != "writer.lock"
    }


def test_views_are_deleted_and_the_rest_stays_as_it_is(
    cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files_of(cache)
    assert cli(["trim", str(cache), "--views", "2"]) == 0
    freed = 2 * (8 * 3 * 2 + 8 * 5 * 4 + 8 + 8 * 4 * 2 + 4 * 4)  # two blocks of four chunks
    assert f"2 views of logits, stage1, correct, attention1; {freed} bytes freed" in (
        capsys.readouterr().out
    )
    opened = TeacherCache.open(cache)
    assert opened.num_views == 2
    assert opened.faults() == []
    agreement = np.mean([records_of(v, slice(None))["correct"] for v in range(2)])
    assert opened.measured == {
        "test_top1_error": 5.0,
        "views": 2,
        "train_agreement": pytest.approx(agreement),
    }
    kept = {name: data for name, data in files_of(cache).items() if "/c." in name}
    assert kept == {name: before[name] for name in kept}
    assert len(kept) == 2 * 2 * 4 + 2 + 2  # taps, labels and preview, digests
    assert zarr.open_group(cache / "teacher.zarr", mode="r")["logits"].shape == (2, 11, 3)
    assert all(view < 2 for _, view, _ in journal_of(cache).committed)
    assert cli(["trim", str(cache), "--views", "2"]) == 0
    assert "; 0 bytes freed" in capsys.readouterr().out
    assert cli(["check", str(cache)]) == 0


def test_opt_in_taps_are_dropped_and_may_come_back_in_another_form(cache: Path) -> None:
    trim_cache(cache, drop_taps=["attention"])
    opened = TeacherCache.open(cache)
    assert list(opened.taps) == BASE
    assert not (cache / "teacher.zarr" / "attention1").exists()
    assert {array for array, _, _ in journal_of(cache).committed} == {*BASE, SAMPLE_DIGEST}
    fill(cache, num_views=3, taps=TAPS | {"attention1": TapSpec((4,), "float32")})
    assert TeacherCache.open(cache).read_view(2)["attention1"].dtype == np.float32
    assert TeacherCache.open(cache).faults() == []


def test_the_digests_of_the_samples_are_those_of_all_views_and_stay(tmp_path: Path) -> None:
    path = tmp_path / "c"
    with open_writer(path, block_rows=2, num_views=3) as writer:
        for item in writer.work:
            rows = slice(item.block.start, item.block.stop)
            writer.write_block(item.block, records_of(item.block.view, rows))
    trim_cache(path, num_views=1)
    opened = TeacherCache.open(path)
    assert (opened.sample_digest == DIGESTS).all()
    assert opened.faults() == []


def test_a_cache_that_was_trimmed_grows_again(cache: Path) -> None:
    trim_cache(cache, num_views=1)
    with pytest.raises(IndexError, match=r"planned for 1 view\n"):
        TeacherCache.open(cache, num_views=2)
    with open_writer(cache, block_rows=8, num_views=3, taps=TAPS | ATTENTION) as writer:
        assert [item.block.view for item in writer.work] == [1, 1, 2, 2]
    with pytest.raises(CacheIncomplete):
        TeacherCache.open(cache)
    assert TeacherCache.open(cache, num_views=1).measured["views"] == 1
    fill(cache, num_views=3, taps=TAPS | ATTENTION)
    assert TeacherCache.open(cache).faults() == []


class Killed(BaseException):
    """Stands for SIGKILL."""


def test_wherever_a_trim_is_killed_the_cache_is_sound_and_the_next_trim_finishes(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = shutil.copytree(cache, tmp_path / "trimmed")
    trim_cache(whole, num_views=2, drop_taps=["attention"])
    expected = files_of(whole)
    for step in itertools.count():
        path = shutil.copytree(cache, tmp_path / f"killed-{step}")
        if not killed_after(step, path, monkeypatch):
            break
        opened = TeacherCache.open(path, num_views=2, taps=BASE)
        assert opened.faults() == []
        assert opened.source.coverage.is_complete  # nothing that the manifest plans is forgotten
        assert no_line_without_a_chunk(path)
        other = TapSpec((4,), "float16", stage="stage2")  # the same bytes, with another meaning
        grown = shutil.copytree(path, tmp_path / f"grown-{step}")
        if "attention1" not in opened.manifest.taps:
            with open_writer(grown, num_views=3, taps=TAPS | {"attention1": other}) as writer:
                assert {w.block for w in writer.work if "attention1" in w.taps} == set(
                    writer.manifest.blocks()
                )
        trim_cache(path, num_views=2, drop_taps=["attention"])
        assert files_of(path) == expected
    assert step > 20


def killed_after(step: int, path: Path, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether a trim that dies after `step` changes to the folder had more to do."""
    left = [step]

    def dying(change: str) -> None:
        real = getattr(os, change)

        def changed(name: str, *arguments: Any, **options: Any) -> object:
            if str(name).endswith(".tmp") and change == "unlink":
                return real(name, *arguments, **options)  # tidying up, which a kill would leave out
            if left[0] == 0:
                raise Killed
            left[0] -= 1
            return real(name, *arguments, **options)

        patched.setattr(os, change, changed)

    with monkeypatch.context() as patched:
        for change in ("rename", "unlink", "rmdir"):
            dying(change)
        try:
            trim_cache(path, num_views=2, drop_taps=["attention"])
        except Killed:
            return True
    return False


def no_line_without_a_chunk(path: Path) -> bool:
    arrays = TAPS | ATTENTION | {SAMPLE_DIGEST: DIGEST_SPEC}
    return all(
        chunk_path(path, array, arrays[array].arrays(array)[array], block).is_file()
        for array, view, index in journal_of(path).committed
        for block in [TeacherCache.open(path, num_views=1, taps=()).manifest.block(view, index)]
    )


def test_what_cannot_be_trimmed_is_refused(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files_of(cache)
    for arguments, told in (
        (["--views", "4"], "is planned for 3 views"),
        (["--drop-taps", "logits"], "the hint and the embedding can be dropped: not 'logits'"),
    ):
        assert cli(["trim", str(cache), *arguments]) == 2
        assert told in capsys.readouterr().err
    assert cli(["trim", str(tmp_path), "--views", "1"]) == 2
    assert "is not a cache" in capsys.readouterr().err
    assert not (tmp_path / "writer.lock").exists()
    assert cli(["export", str(cache), str(tmp_path / "x.h5")]) == 0
    assert cli(["trim", str(tmp_path / "x.h5"), "--views", "1"]) == 2
    assert "only a cache folder can be made smaller" in capsys.readouterr().err
    with open_writer(cache, block_rows=8), pytest.raises(CacheBusy):
        trim_cache(cache, num_views=1)
    assert files_of(cache) == before
