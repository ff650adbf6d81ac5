"""Single words of a Philox stream, wherever they lie: numpy's generator only reads one in order.

Philox4x64-10 (Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3") turns a counter
and a key into four words. numpy counts up before each four, so words 4i ... 4i+3 are those of
counter i + 1. This is the same arithmetic on whole arrays; a test compares the two.
"""

from __future__ import annotations

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
    """`num_words` consecutive words from each position of `firsts` (M,) on: (M, W) uint64.

    key: two words. stream: the highest word of the counter, whose other three count.
    """
    counts, skipped = np.divmod(firsts, WORDS_PER_COUNT)
    num_counts = (num_words + 2 * WORDS_PER_COUNT - 2) // WORDS_PER_COUNT
    counters = (counts[:, None] + np.arange(1, num_counts + 1)).astype(np.uint64)
    words = _philox(counters.reshape(-1), key, stream).reshape(len(firsts), -1)
    columns = skipped[:, None] + np.arange(num_words)
    return np.take_along_axis(words, columns, axis=1)


def _philox(counters: Words, key: tuple[int, int], stream: int) -> Words:
    """(M,) lowest words of counters -> (M, 4)."""
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
    """The upper and the lower 64 bits of the products, (M,) each, from products of halves."""
    low, high = values & _LOW, values >> _HALF
    factor_low, factor_high = factor & _LOW, factor >> _HALF
    middle = high * factor_low + ((low * factor_low) >> _HALF)
    other = low * factor_high + (middle & _LOW)
    upper = high * factor_high + (middle >> _HALF) + (other >> _HALF)
    return upper, values * factor
