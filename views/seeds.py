"""Counter-based randomness: every draw is a pure function of (seed, view, sample).

Uses raw Philox bits only: numpy guarantees their stream, but not the stream of its distribution
methods, and torch guarantees none. A sample's draws do not depend on batch, order, worker, rank or
device.
"""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray

WORDS_PER_COUNT = 4
_ROUNDS = 10
_MULTIPLIERS = (np.uint64(0xD2E7470EE14C6C93), np.uint64(0xCA5A826395121157))
_KEY_STEPS = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
_LOW, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)
_MASK = 2**64 - 1

Words = NDArray[np.uint64]


def words_from(
    firsts: NDArray[np.int64], num_words: int, *, key: tuple[int, int], stream: int
) -> Words:
    """Return `num_words` consecutive words from each position in `firsts` (M,): (M, W) uint64.

    key: two words. stream: highest word of the counter; the other three words count.
    """
    counts, skipped = np.divmod(firsts, WORDS_PER_COUNT)
    num_counts = (num_words + 2 * WORDS_PER_COUNT - 2) // WORDS_PER_COUNT
    counters = (counts[:, None] + np.arange(1, num_counts + 1)).astype(np.uint64)
    words = _philox(counters.reshape(-1), key, stream).reshape(len(firsts), -1)
    columns = skipped[:, None] + np.arange(num_words)
    return np.take_along_axis(words, columns, axis=1)


def _philox(counters: Words, key: tuple[int, int], stream: int) -> Words:
    """Return the words (M, 4) for counters with lowest words (M,)."""
    a, b, c = counters, np.zeros_like(counters), np.zeros_like(counters)
    d = np.full_like(counters, stream)
    for turn in range(_ROUNDS):
        first, second = (
            np.uint64((part + turn * step) & _MASK)
            for part, step in zip(key, _KEY_STEPS, strict=True)
        )
        high_a, low_a = _product(a, _MULTIPLIERS[0])
        high_c, low_c = _product(c, _MULTIPLIERS[1])
        a, b, c, d = high_c ^ b ^ first, low_c, high_a ^ d ^ second, low_a
    return np.stack([a, b, c, d], axis=1)


def _product(values: Words, factor: np.uint64) -> tuple[Words, Words]:
    """Return the upper and lower 64 bits of the products, (M,) each, computed from halves."""
    low, high = values & _LOW, values >> _HALF
    factor_low, factor_high = factor & _LOW, factor >> _HALF
    middle = high * factor_low + ((low * factor_low) >> _HALF)
    other = low * factor_high + (middle & _LOW)
    upper = high * factor_high + (middle >> _HALF) + (other >> _HALF)
    return upper, values * factor


# Streams separate uses of the same (seed, number) pair, in the counter's highest word.
VIEW_STREAM = 0
ORDER_STREAM = 1
CHOICE_STREAM = 2
HELD_OUT_STREAM = 4  # precompute.compare uses 3
FLIP_STREAM = 5
JITTER_STREAM = 6
TRIVIAL_STREAM = 7
ERASING_STREAM = 8
MIX_STREAM = 9
STEP_STREAM = 10  # draws of a training step
SUBSET_STREAM = 11

_SAMPLES_PER_CHUNK = 65_536
_WORTH_WORDS = 64  # sequential words in the time of four words at random positions
_MOST_WORDS = 2**22  # most words read sequentially to select some of them


def draws(
    seed: int,
    view: int,
    num_samples: int,
    num_draws: int,
    *,
    first_sample: int = 0,
    stream: int = VIEW_STREAM,
) -> NDArray[np.uint64]:
    """Return uniform 64-bit draws for `num_samples` samples from `first_sample` on: (N, D) uint64.

    Rows do not depend on the range of samples, but they depend on D.
    """
    bits = np.random.Philox(
        counter=np.array([0, 0, 0, stream], dtype=np.uint64),
        key=np.array([seed, view], dtype=np.uint64),
    )
    counts, skipped = divmod(first_sample * num_draws, WORDS_PER_COUNT)
    bits.advance(counts)
    words: NDArray[np.uint64] = bits.random_raw(skipped + num_samples * num_draws)
    return words[skipped:].reshape(num_samples, num_draws)


def draws_of(
    ids: NDArray[np.int64], seed: int, view: int, num_draws: int, *, stream: int = VIEW_STREAM
) -> NDArray[np.uint64]:
    """Return the rows of `draws` for samples `ids` (M,), in any order: (M, D) uint64.

    The time depends on M, not on the size of the dataset.
    """
    if not len(ids):
        return np.empty((0, num_draws), dtype=np.uint64)
    first = int(ids.min())
    span = int(ids.max()) + 1 - first
    if span * num_draws <= min(_WORTH_WORDS * len(ids) * (num_draws // 4 + 2), _MOST_WORDS):
        rows = draws(seed, view, span, num_draws, first_sample=first, stream=stream)
        return rows if span == len(ids) and _ascends(ids) else rows[ids - first]
    return words_from(ids * num_draws, num_draws, key=(seed, view), stream=stream)


def _ascends(ids: NDArray[np.int64]) -> bool:
    return bool((np.diff(ids) == 1).all())


def unit(words: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Convert draws to numbers in [0, 1), from the upper 53 bits; same shape."""
    return np.asarray((words >> np.uint64(11)) * 2.0**-53)


def permutation(seed: int, epoch: int, num_samples: int) -> NDArray[np.int64]:
    """Return the order of samples in an epoch: (N,) int64, a pure function of the arguments."""
    keys = draws(seed, epoch, num_samples, 1, stream=ORDER_STREAM)[:, 0]
    return np.argsort(keys, kind="stable")


def choice(seed: int, num_items: int, num_chosen: int) -> NDArray[np.int64]:
    """Return `num_chosen` distinct items of range(num_items), ascending, int64."""
    keys = draws(seed, 0, num_items, 1, stream=CHOICE_STREAM)[:, 0]
    return np.sort(np.argsort(keys, kind="stable")[:num_chosen])


def distinct_codes(seed: int, space: int, view: int, num_samples: int) -> NDArray[np.uint16]:
    """Return each sample's code for view `view`, one of `space` codes, never repeated: (N,) uint16.

    Per sample, the codes of views 0 ... space-1 are a random permutation, of which any prefix is
    independent of the number of views. Raises ValueError if `view` is not below `space`.
    """
    if not 0 <= view < space <= 2**16:
        raise ValueError(f"view {view} is outside a space of {space} (at most 65536) views")
    codes = _first_codes(seed, space, _rounded_up(view + 1, space), num_samples)
    return np.asarray(codes[view])


def _rounded_up(steps: int, space: int) -> int:
    """Return the next power of two, so that view-by-view requests recompute only a few times."""
    return min(1 << (steps - 1).bit_length(), space)


@functools.lru_cache(maxsize=4)
def _first_codes(seed: int, space: int, steps: int, num_samples: int) -> NDArray[np.uint16]:
    """Return (steps, N) uint16: `steps` rounds of a Fisher-Yates shuffle per sample, vectorized."""
    codes = np.empty((steps, num_samples), dtype=np.uint16)
    for first in range(0, num_samples, _SAMPLES_PER_CHUNK):
        stop = min(first + _SAMPLES_PER_CHUNK, num_samples)
        rows = np.arange(stop - first)
        deck = np.tile(np.arange(space, dtype=np.uint16), (stop - first, 1))
        for step in range(steps):
            draw = draws(seed, step, stop - first, 1, first_sample=first)[:, 0]
            swap = step + (draw % np.uint64(space - step)).astype(np.int64)
            codes[step, first:stop] = deck[rows, swap]
            deck[rows, swap] = deck[:, step]
    codes.flags.writeable = False
    return codes
