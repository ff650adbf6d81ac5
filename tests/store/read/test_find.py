"""Finding the requested cache among several in a folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from teach_once.store import CacheMismatch, CacheMissing, TeacherCache
from teach_once.store.inspect.find import find_cache
from tests.support.caches.random_cache import CANARY, IDENTITY, LABELS, fill


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return fill(tmp_path / "t-e4812202")


def test_missing_weights_are_not_compared(cache: Path) -> None:
    unknown = {**IDENTITY, "teacher": {"arch": "resnet20", "weights_sha256": None}}
    TeacherCache.open(cache).refuse_unless(unknown, labels=LABELS, canary=CANARY)
    assert find_cache(cache.parent, "t", unknown).path == cache


def test_the_nearest_cache_is_named_where_none_fits(cache: Path) -> None:
    other = {**IDENTITY, "dataset": {"digest": "e"}}
    with pytest.raises(CacheMismatch) as caught:
        find_cache(cache.parent, "t", other)
    assert "t-e4812202 differs in" in str(caught.value)
    assert "dataset.digest: expected 'e', found 'd'" in str(caught.value)
    with pytest.raises(CacheMissing, match="no cache of the teacher 'u'"):
        find_cache(cache.parent, "u", other)


def test_a_broken_cache_beside_the_right_one_does_no_harm(cache: Path) -> None:
    broken = fill(cache.parent / "t-11111111")
    (broken / "manifest.json").write_text("{")
    with pytest.raises(CacheMismatch, match="t-e4812202 differs in"):
        find_cache(cache.parent, "t", {**IDENTITY, "dataset": {"digest": "e"}})
