"""Each process's slices, outputs and seeds."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch

from teach_once.configs.load import load_teacher
from teach_once.train.engine.evaluation import evaluation_batches
from teach_once.train.engine.ranks import Ranks
from teach_once.train.engine.train_state import capture_maps
from teach_once.train.runs.study import Study
from teach_once.train.sessions.student import open_context
from teach_once.views.datasets import load_dataset
from teach_once.views.pixels.resident import open_pixels
from teach_once.views.splits import Split


@pytest.fixture(scope="module")
def digits() -> Split:
    return load_dataset(load_teacher("digits-resnet20").dataset).test


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_every_test_sample_is_counted_on_one_rank(digits: Split, world: int) -> None:
    config = load_teacher("digits-resnet20")
    pixels = open_pixels(
        digits, config.views, config.dataset.normalization, torch.device("cpu"), num_workers=0
    )
    of_each = [
        [int(i) for batch in evaluation_batches(pixels, Ranks(rank, world)) for i in batch.ids]
        for rank in range(world)
    ]
    assert [i for ids in of_each for i in ids] == list(range(len(digits)))
    sizes = [len(ids) for ids in of_each]
    assert max(sizes) - min(sizes) <= 1


def test_more_ranks_than_test_samples_leave_some_idle() -> None:
    slices = [Ranks(rank, 5).slice_of(3) for rank in range(5)]
    assert np.concatenate([np.arange(3)[each] for each in slices]).tolist() == [0, 1, 2]


def test_random_draws_differ_between_ranks_and_rank_0_draws_as_one_process_does() -> None:
    seeds = [Ranks(rank, 8).seed(2**64 - 5) for rank in range(8)]
    assert seeds[0] == 2**64 - 5
    assert len(set(seeds)) == 8
    assert all(0 <= seed < 2**64 for seed in seeds)


def test_blank_images_that_try_the_maps_leave_no_trace(make_study: Callable[..., Study]) -> None:
    context = open_context(make_study().run("cd", 0), torch.device("cpu"))
    train_state = context.train_state
    assert train_state.connectors is not None
    before = copy.deepcopy([train_state.network.state_dict(), train_state.connectors.state_dict()])
    with capture_maps(train_state, context.data.train, 16):
        pass
    context.teacher.close()
    after = [train_state.network.state_dict(), train_state.connectors.state_dict()]
    for one, other in zip(before, after, strict=True):
        assert all(torch.equal(value, other[name]) for name, value in one.items())
