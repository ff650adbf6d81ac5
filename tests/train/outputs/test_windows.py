"""The order of an epoch in windows of blocks is complete, reproducible and well shuffled."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from teach_once.train.outputs.shuffle_buffer import ShuffleBuffer, find_windows
from teach_once.views.seeds import permutation


@pytest.mark.parametrize(
    ("num_samples", "block_rows", "window_rows"), [(1000, 16, 64), (1003, 16, 100), (30, 64, 1)]
)
def test_every_sample_comes_once_and_only_from_the_windows_in_memory(
    num_samples: int, block_rows: int, window_rows: int
) -> None:
    layout = ShuffleBuffer(num_samples, block_rows, window_rows)
    order = layout.order(3, 7)
    assert np.array_equal(np.sort(order), np.arange(num_samples))
    place, window_of, windows = find_windows(order, num_samples, block_rows)
    assert (np.diff(window_of[order]) >= 0).all()
    assert sorted(np.concatenate(windows)) == list(range(-(-num_samples // block_rows)))
    for number, blocks in enumerate(windows):
        rows = np.concatenate(
            [np.arange(b * block_rows, min((b + 1) * block_rows, num_samples)) for b in blocks]
        )
        assert len(blocks) <= max(1, window_rows // block_rows)
        assert (rows[place[window_of == number]] == np.flatnonzero(window_of == number)).all()


def test_the_order_follows_seed_and_epoch_alone() -> None:
    layout = ShuffleBuffer(1000, 16, 64)
    assert np.array_equal(layout.order(1, 2), layout.order(1, 2))
    assert not np.array_equal(layout.order(1, 2), layout.order(1, 3))
    assert not np.array_equal(layout.order(1, 2), layout.order(2, 2))


def test_one_window_of_all_blocks_is_the_true_shuffle() -> None:
    assert np.array_equal(ShuffleBuffer(1000, 16, 10**6).order(5, 2), permutation(5, 2, 1000))


NUM_SAMPLES, BLOCK, CLASSES, BATCH = 32_768, 256, 16, 256
LABELS = np.repeat(np.arange(CLASSES), NUM_SAMPLES // CLASSES)  # sorted, as an image folder's


def imbalance(order: np.ndarray) -> float:
    """Mean chi-squared of the classes of each batch: 15 for a true shuffle of 16 classes."""
    counts = np.stack([np.bincount(LABELS[b], minlength=CLASSES) for b in order.reshape(-1, BATCH)])
    expected = BATCH / CLASSES
    return float((np.square(counts - expected) / expected).sum(axis=1).mean())


def test_class_balance_comes_near_a_true_shuffles_as_the_window_grows() -> None:
    true = np.mean([imbalance(permutation(0, epoch, NUM_SAMPLES)) for epoch in range(5)])
    found = {
        window: np.mean(
            [imbalance(ShuffleBuffer(NUM_SAMPLES, BLOCK, window).order(0, e)) for e in range(5)]
        )
        for window in (BLOCK, 4096, 16_384)
    }
    assert true == pytest.approx(CLASSES - 1, rel=0.05)
    assert found[BLOCK] > 3000  # one block is one class: why a window holds many
    # 16 random blocks of 128: the sampling of blocks adds about B/16 times as much again.
    assert true < found[16_384] < found[4096] < found[BLOCK] / 10


def test_positions_are_uniform_over_epochs() -> None:
    layout = ShuffleBuffer(2048, 32, 256)
    positions = np.stack([np.argsort(layout.order(0, epoch)) for epoch in range(400)])
    one = positions[:, 5]
    assert stats.kstest(one / 2048, "uniform").pvalue > 1e-3
    assert abs(np.corrcoef(positions[:, 5], positions[:, 1500])[0, 1]) < 0.2
    # Neighbors share a block, so they always come in one window: that is the price.
    assert np.abs(positions[:, 5] - positions[:, 6]).max() < 256
