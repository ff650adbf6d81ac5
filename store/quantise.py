"""Eight-bit codes with a lowest value and a step: a quarter of float32's bytes.

A code q means `low + q * step`. Each record's logits have their own low and step, because their
range varies between samples; channel means share those of their channel within a block.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_TOP = 255


def quantise_rows(values: NDArray[np.float32]) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """(R, K) -> codes (R, K) uint8 and (R, 2) float32 `low, step` of each row."""
    low, step = _range(values, axis=1)
    return _codes(values, low[:, None], step[:, None]), np.stack([low, step], axis=1)


def quantise_channels(values: NDArray[np.float32]) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """(R, C) -> codes (R, C) uint8 and (1, 2, C) float32 `low, step` of each channel."""
    low, step = _range(values, axis=0)
    return _codes(values, low, step), np.stack([low, step])[None]


def restore_rows(codes: NDArray[np.uint8], scale: NDArray[np.float32]) -> NDArray[np.float32]:
    """The inverse of `quantise_rows`, to within half a step: (R, K) float32."""
    return np.asarray(codes * scale[:, 1:2] + scale[:, 0:1], dtype=np.float32)


def restore_channels(codes: NDArray[np.uint8], scale: NDArray[np.float32]) -> NDArray[np.float32]:
    """The inverse of `quantise_channels`, to within half a step: (R, C) float32."""
    return np.asarray(codes * scale[0, 1] + scale[0, 0], dtype=np.float32)


def restored(
    codes: NDArray[np.uint8], scale: NDArray[np.float32], kind: str
) -> NDArray[np.float32]:
    """The inverse for a tap whose `TapSpec.scale` is `kind`, "row" or "block"."""
    return restore_rows(codes, scale) if kind == "row" else restore_channels(codes, scale)


def _range(
    values: NDArray[np.float32], axis: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    low = values.min(axis=axis)
    return low, ((values.max(axis=axis) - low) / np.float32(_TOP)).astype(np.float32)


def _codes(
    values: NDArray[np.float32], low: NDArray[np.float32], step: NDArray[np.float32]
) -> NDArray[np.uint8]:
    safe = np.where(step > 0, step, np.float32(1))
    return np.clip(np.rint((values - low) / safe), 0, _TOP).astype(np.uint8)
