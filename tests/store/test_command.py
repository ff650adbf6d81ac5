"""python -m store: references to caches on the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from teach_once.store.command import cache_named
from teach_once.store.errors import CacheError


@pytest.fixture
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("digits-resnet20-0123abcd", "digits-resnet20-adamw-0123abcd", "other-notahash"):
        (tmp_path / "caches" / name).mkdir(parents=True)
    return tmp_path / "caches"


@pytest.mark.parametrize("teacher", ["digits-resnet20", "digits-resnet20-adamw"])
def test_cache_named_by_its_teacher_is_the_one_folder(teacher: str, caches: Path) -> None:
    assert cache_named(teacher) == Path("caches") / f"{teacher}-0123abcd"


@pytest.mark.parametrize(
    "text", ["other", "elsewhere/digits-resnet20", "s3://bucket/digits-resnet20", "caches"]
)
def test_cache_named_otherwise_is_the_path_as_it_is(text: str, caches: Path) -> None:
    assert str(cache_named(text)) == text


def test_cache_named_by_an_existing_file_is_that_file(caches: Path) -> None:
    (caches.parent / "digits-resnet20").touch()
    assert cache_named("digits-resnet20") == Path("digits-resnet20")


def test_cache_named_by_a_teacher_of_two_caches_is_refused_with_both(caches: Path) -> None:
    (caches / "digits-resnet20-89abcdef").mkdir()
    with pytest.raises(CacheError, match="0123abcd, caches/digits-resnet20-89abcdef"):
        cache_named("digits-resnet20")
