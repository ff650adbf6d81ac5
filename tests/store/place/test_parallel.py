"""Many items in a few threads: ordered results, and few items at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from teach_once.store import TeacherCache
from teach_once.store.format.journal import ChunkKey
from teach_once.store.place.bucket import in_parallel
from teach_once.store.place.parallel import in_threads
from teach_once.store.read.zarr_source import ZarrSource

MANY_BYTES = 2**30


def test_results_come_in_order_and_few_items_are_taken_before_they_are_asked_for() -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for number in range(1000):
            taken.append(number)
            yield number

    results = in_threads(lambda number: -number, items(), MANY_BYTES)
    assert next(results) == 0
    assert len(taken) < 50
    assert list(results) == [-number for number in range(1, 1000)]


def test_few_objects_are_asked_for_before_the_first_answer_is_taken() -> None:
    asked: list[int] = []

    def ask(number: int) -> int:
        asked.append(number)
        return number

    answers = in_parallel(ask, iter(range(1000)))
    assert next(answers) == 0
    assert len(asked) < 100
    assert list(answers) == list(range(1, 1000))
    assert list(in_parallel(ask, iter([]))) == []
    assert list(in_parallel(ask, iter([7]))) == [7]


def test_an_error_of_one_item_ends_the_rest() -> None:
    def fail(number: int) -> int:
        if number == 7:
            raise ZeroDivisionError
        return number

    with pytest.raises(ZeroDivisionError):
        list(in_threads(fail, range(100), MANY_BYTES))


def test_a_check_of_many_chunks_lists_few_of_them_before_the_first_is_checked(
    small_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed, real = 0, ZarrSource._keys

    def many_keys(source: ZarrSource, num_views: int) -> Iterator[ChunkKey]:
        nonlocal listed
        for key in 200 * list(real(source, num_views)):
            listed += 1
            yield key

    first: list[int] = []
    monkeypatch.setattr(ZarrSource, "_keys", many_keys)
    monkeypatch.setattr("teach_once.store.place.parallel._WORTH_BYTES", 0)
    opened = TeacherCache.open(small_cache)
    assert opened.faults(on_chunk=lambda num_bytes: first.append(listed)) == []
    assert first[0] < 50
    assert len(first) == listed == 200 * 24
