"""Converting a full cache to a smaller one without the teacher."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from teach_once.configs.schema import StudentConfig, TeacherConfig
from teach_once.store import CacheError, TeacherCache
from teach_once.store.command import cli
from teach_once.store.format.certificate import certificate_in
from teach_once.store.move.convert import convert_cache
from teach_once.train.runs.study import open_study
from teach_once.train.sessions.student import train_student
from tests.support.caches.teacher_cache import make_cache

Make = Callable[..., TeacherConfig]


@pytest.fixture
def full(small_teacher: Make, tmp_path: Path) -> TeacherCache:
    return make_cache(small_teacher(), tmp_path)


def test_a_converted_cache_holds_what_was_there_as_the_asked_types_store_it(
    full: TeacherCache, small_teacher: Make, tmp_path: Path
) -> None:
    changes = ["taps.logits={top_k: 3}", "taps.channel_means=uint8"]
    direct = make_cache(small_teacher(*changes), tmp_path / "direct")
    made = convert_cache(full.path, tmp_path / "made", logits="top:3", channel_means="uint8")
    assert made.faults() == []
    assert made.taps == direct.taps
    assert made.identity["taps"] == direct.identity["taps"]
    assert made.identity["converted_from"] == full.identity["taps"]
    assert (made.sample_digest == full.sample_digest).all()
    for view in range(full.num_views):
        ours, theirs = made.read_view(view), direct.read_view(view)
        assert (ours["correct"] == theirs["correct"]).all()
        for tap in ("logits", "stage1", "stage3"):
            step = (theirs[tap].max() - theirs[tap].min()) / 255
            assert np.abs(ours[tap] - theirs[tap]).max() < 1.5 * step


def test_its_certificate_says_what_was_lost(full: TeacherCache, tmp_path: Path) -> None:
    kl = []
    for top in (1, 4, 9):
        made = convert_cache(full.path, tmp_path / str(top), logits=f"top:{top}")
        kl.append([made.measured["kl_t1"], made.measured["kl_t4"]])
        assert "means_mean_error" not in made.measured
    assert 0 <= kl[2][0] < kl[1][0] < kl[0][0]
    assert kl[2][1] < kl[1][1] < kl[0][1]
    made = convert_cache(full.path, tmp_path / "means", channel_means="uint8")
    lost = np.abs(full.read_view(0)["stage2"].astype(float) - made.read_view(0)["stage2"])
    assert lost.max() <= made.measured["means_largest_error"]
    assert 0 < made.measured["means_mean_error"] < made.measured["means_largest_error"]


def test_an_interrupted_conversion_is_resumed(
    full: TeacherCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[int] = []

    def stop(rows: int) -> None:
        written.append(rows)
        if len(written) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_cache(full.path, tmp_path / "made", channel_means="uint8", on_block=stop)
    with pytest.raises(CacheError, match="is not finished"):
        TeacherCache.open(tmp_path / "made")
    made = convert_cache(
        full.path, tmp_path / "made", channel_means="uint8", on_block=written.append
    )
    assert made.faults() == []
    assert sum(written) == full.num_samples * full.num_views


def test_students_train_from_it(
    full: TeacherCache,
    small_teacher: Make,
    small_student: Callable[..., StudentConfig],
    tmp_path: Path,
) -> None:
    assert cli(["convert", str(full.path), str(full.path) + "-small", "--logits", "top:3"]) == 0
    teacher = small_teacher("taps.logits={top_k: 3}")
    runs = {"caches_dir": full.path.parent, "runs_dir": tmp_path / "runs"}
    study = open_study(small_student(), teacher, **runs)
    assert study.cache.path.name == f"{full.path.name}-small"
    assert train_student(study.run("kd", 0), device="cpu")["is_taught"]


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({}, "has these types already"),
        ({"channel_means": "float16"}, "has these types already"),
        ({"channel_means": "float32"}, "stage1 is stored as float16, and cannot become float32"),
        ({"logits": "top:10"}, "--logits top:10: the cache has 10 classes"),
        ({"logits": "top:0"}, "the cache has 10 classes"),
        ({"logits": "top:x"}, "the cache has 10 classes"),
        ({"logits": "int4"}, "cannot become int4"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_written(
    full: TeacherCache, tmp_path: Path, asked: dict[str, str], told: str
) -> None:
    with pytest.raises(CacheError, match=told):
        convert_cache(full.path, tmp_path / "made", **asked)
    assert not (tmp_path / "made").exists()


def test_a_cut_cache_can_be_cut_further_and_not_back(full: TeacherCache, tmp_path: Path) -> None:
    cut = convert_cache(full.path, tmp_path / "a", logits="top:5")
    again = convert_cache(cut.path, tmp_path / "b", logits="top:2")
    assert again.identity["converted_from"] == full.identity["taps"]
    with pytest.raises(CacheError, match="cannot become float16"):
        convert_cache(cut.path, tmp_path / "c", logits="float16")
    with pytest.raises(CacheError, match="top:6"):
        convert_cache(cut.path, tmp_path / "c", logits="top:6")


def test_a_second_conversion_certifies_itself_and_keeps_nothing_of_the_first(
    full: TeacherCache, tmp_path: Path
) -> None:
    first = convert_cache(full.path, tmp_path / "a", channel_means="uint8")
    assert "means_mean_error" in first.measured
    assert "kl_t1" not in first.measured
    second = convert_cache(first.path, tmp_path / "b", logits="top:2")
    direct = convert_cache(full.path, tmp_path / "c", logits="top:2")
    assert certificate_in(second.measured) == certificate_in(direct.measured)
    assert second.measured["train_agreement"] == full.measured["train_agreement"]
    third = convert_cache(second.path, tmp_path / "d", logits="top:1")
    assert third.measured["kl_t1"] != second.measured["kl_t1"]
