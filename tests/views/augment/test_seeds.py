"""Random draws are pinned by literal values: a change of one invalidates every cache."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from teach_once.views.seeds import choice, distinct_codes, draws, draws_of, permutation, words_from


def test_draws_are_the_golden_ones() -> None:
    assert draws(0, 0, 2, 3).tolist() == [
        [0x2F4BA6408E4D89B, 0x3DD62B0B9CA8C5B2, 0x1C8667A55D902E79],
        [0x907D7A052FD5B4DC, 0x809BF322883987C3, 0x471128B9E807F7DD],
    ]
    assert draws(12345, 7, 2, 2, first_sample=5).tolist() == [
        [0x71F8A7D4415FF854, 0x2122BDB34BBDA3DB],
        [0x7CE5056D6C417325, 0x543DFBC2DD736142],
    ]


def test_orders_and_codes_are_the_golden_ones() -> None:
    assert permutation(3, 1, 10).tolist() == [0, 9, 2, 6, 7, 8, 5, 3, 4, 1]
    assert choice(0, 100, 5).tolist() == [18, 25, 56, 67, 75]
    assert [distinct_codes(0, 162, view, 4).tolist() for view in range(3)] == [
        [149, 50, 117, 138],
        [161, 99, 16, 83],
        [130, 72, 132, 18],
    ]


@given(
    seed=st.integers(0, 2**64 - 1),
    view=st.integers(0, 10**6),
    first=st.integers(0, 300),
    count=st.integers(1, 40),
    num_draws=st.integers(1, 9),
)
def test_a_sample_draws_the_same_in_whatever_range_it_is_asked_for(
    seed: int, view: int, first: int, count: int, num_draws: int
) -> None:
    whole = draws(seed, view, first + count, num_draws)
    part = draws(seed, view, count, num_draws, first_sample=first)
    assert (whole[first:] == part).all()


@given(
    seed=st.integers(0, 2**64 - 1),
    view=st.integers(0, 10**6),
    ids=st.lists(st.integers(0, 400), max_size=30).map(np.array),
    num_draws=st.integers(1, 9),
    stream=st.integers(0, 10),
)
def test_samples_in_any_order_draw_what_the_whole_range_draws(
    seed: int, view: int, ids: np.ndarray, num_draws: int, stream: int
) -> None:
    ids = ids.astype(np.int64)
    expected = draws(seed, view, 401, num_draws, stream=stream)[ids]
    assert (draws_of(ids, seed, view, num_draws, stream=stream) == expected).all()
    if len(ids):
        single = words_from(ids * num_draws, num_draws, key=(seed, view), stream=stream)
        assert (single == expected).all()


def test_few_samples_of_many_take_no_time_by_the_number_of_all() -> None:
    ids = np.array([10**12, 3, 999_999_999])
    assert draws_of(ids, 0, 0, 41)[1].tolist() == draws(0, 0, 4, 41)[3].tolist()


@given(space=st.integers(1, 300), seed=st.integers(0, 2**32), num_samples=st.integers(1, 5))
def test_the_views_of_a_sample_are_a_permutation_of_the_space(
    space: int, seed: int, num_samples: int
) -> None:
    codes = np.stack([distinct_codes(seed, space, v, num_samples) for v in range(space)])
    assert (np.sort(codes, axis=0) == np.arange(space)[:, None]).all()


def test_asking_for_later_views_first_changes_nothing() -> None:
    late_first = distinct_codes(9, 50, 49, 7).copy(), distinct_codes(9, 50, 3, 7).copy()
    early_first = distinct_codes(9, 50, 3, 7), distinct_codes(9, 50, 49, 7)
    assert (late_first[0] == early_first[1]).all()
    assert (late_first[1] == early_first[0]).all()


def test_codes_do_not_depend_on_how_many_samples_there_are() -> None:
    assert (distinct_codes(4, 162, 5, 70_000)[:10] == distinct_codes(4, 162, 5, 10)).all()
    assert (
        distinct_codes(4, 10, 5, 70_000)[65_530:65_540] == distinct_codes(4, 10, 5, 65_540)[-10:]
    ).all()


def test_codes_are_spread_evenly() -> None:
    counts = np.bincount(distinct_codes(1, 162, 17, 162_000), minlength=162)
    chi_squared = ((counts - 1000) ** 2 / 1000).sum()
    assert chi_squared < 240  # 161 degrees of freedom: above this once in 20,000 honest draws


def test_a_view_past_the_space_is_refused() -> None:
    with pytest.raises(ValueError, match="outside a space of 9"):
        distinct_codes(0, 9, 9, 3)


def test_streams_are_apart() -> None:
    assert (draws(0, 1, 10, 1)[:, 0].argsort() != permutation(0, 1, 10)).any()
