"""What a run is identified by: everything that decides its result, and nothing that passes by."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from configs.schema import StudentConfig, TeacherConfig
from store import CacheError
from tests.conftest import make_cache
from train.study import Study, open_study

MakeStudy = Callable[..., Study]


@pytest.fixture
def study_of(
    small_student: Callable[..., StudentConfig], tmp_path: Path
) -> Callable[[TeacherConfig], Study]:
    """The study of a teacher whose cache lies in tmp_path/caches."""

    def make(teacher: TeacherConfig, *student: str) -> Study:
        caches, runs = tmp_path / "caches", tmp_path / "runs"
        return open_study(small_student(*student), teacher, caches_dir=caches, runs_dir=runs)

    return make


def test_a_cache_that_grows_leaves_runs_what_they_are(
    small_teacher: Callable[..., TeacherConfig], study_of: MakeStudy, tmp_path: Path
) -> None:
    make_cache(small_teacher(), tmp_path / "caches")
    before = study_of(small_teacher())
    make_cache(small_teacher("views.count=5"), tmp_path / "caches")
    after = study_of(small_teacher())
    assert after.num_views == before.num_views == after.cache.num_views == 3
    assert after.run_identity("cd", 0) == before.run_identity("cd", 0)
    assert study_of(small_teacher(), "num_views=2").num_views == 2


def test_a_cache_with_fewer_views_than_the_teachers_file_asks_for_is_refused(
    small_teacher: Callable[..., TeacherConfig], study_of: MakeStudy, tmp_path: Path
) -> None:
    make_cache(small_teacher(), tmp_path / "caches")
    with pytest.raises(CacheError, match=r"3 views.*\n  fix: make cache-teacher .*views.count=5"):
        study_of(small_teacher("views.count=5"))
