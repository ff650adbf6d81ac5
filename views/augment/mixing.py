"""Erasing, mixup and cutmix with index and integer arithmetic on batches of cropped views.

Gives the same bytes with numpy, torch on a CPU and torch on a GPU; does not import torch. One part
turns draws into integers for all samples of a view at once. The other applies integers to views.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from teach_once.configs.schema import Mix, RandomErasing
from teach_once.views.augment.array_ops import arange_like, as_int32, as_uint8, where
from teach_once.views.seeds import ERASING_STREAM, MIX_STREAM, draws_of, unit

if TYPE_CHECKING:
    from teach_once.views.augment.array_ops import Array

ERASING_ATTEMPTS = 10
_ERASING_DRAWS = 1 + 4 * ERASING_ATTEMPTS  # erase or not; each attempt: area, ratio, top, left
_MIX_DRAWS = 5  # apply or not, partner, weight, row, column
_SHARES = 256  # a blend's weights are whole 256ths
_SAMPLES_PER_CHUNK = 65_536

Ints = NDArray[np.int64]


def erased_boxes(
    erasing: RandomErasing, seed: int, view: int, ids: Ints, height: int, width: int
) -> Ints:
    """Return (M, 4) int64 `top, left, height, width` of the erased boxes of samples `ids` (M,).

    The first of ten attempts that leaves pixels on both axes is used. Height 0 means that nothing
    is erased, by chance or because all attempts failed. Source: Zhong et al. 2017, "Random Erasing
    Data Augmentation".
    """
    boxes = np.zeros((len(ids), 4), dtype=np.int64)
    for first in range(0, len(ids), _SAMPLES_PER_CHUNK):
        some = ids[first : first + _SAMPLES_PER_CHUNK]
        words = draws_of(some, seed, view, _ERASING_DRAWS, stream=ERASING_STREAM)
        boxes[first : first + len(some)] = _boxes_of(unit(words), erasing, height, width)
    return boxes


def _boxes_of(drawn: NDArray[np.float64], erasing: RandomErasing, height: int, width: int) -> Ints:
    chosen = drawn[:, 0] < erasing.probability
    area, aspect, top, left = (
        drawn[:, 1:].reshape(len(drawn), ERASING_ATTEMPTS, 4).transpose(2, 0, 1)
    )
    smallest, largest = erasing.scale
    low, high = np.log(erasing.ratio)
    pixels = height * width * (smallest + area * (largest - smallest))
    ratio = np.exp(low + aspect * (high - low))
    heights = np.rint(np.sqrt(pixels * ratio)).astype(np.int64)
    widths = np.rint(np.sqrt(pixels / ratio)).astype(np.int64)
    fits = (heights < height) & (widths < width)
    tops = (top * (height - heights + 1)).astype(np.int64)
    lefts = (left * (width - widths + 1)).astype(np.int64)
    first = fits.argmax(axis=1)
    rows = np.arange(len(drawn))
    boxes = np.stack([each[rows, first] for each in (tops, lefts, heights, widths)], axis=1)
    return np.where((chosen & fits.any(axis=1))[:, None], boxes, 0)


def mixes(
    mix: Mix, seed: int, view: int, num_samples: int, ids: Ints, height: int, width: int
) -> Ints:
    """Return (M, 6) int64 `partner, own share, top, left, height, width` of samples `ids` (M,).

    Inside the box a pixel is `own share` / 256 of the sample plus the rest of its partner. Height
    0: not mixed. partner: the id of another of the `num_samples` samples, or of the sample itself
    if it is the only one. Sources: Zhang et al. 2017, "mixup"; Yun et al. 2019, "CutMix".
    """
    words = draws_of(ids, seed, view, _MIX_DRAWS, stream=MIX_STREAM)
    chosen = unit(words[:, 0]) < mix.probability
    others = np.uint64(max(num_samples - 1, 1))
    partner = (ids + 1 + (words[:, 1] % others).astype(np.int64)) % num_samples
    share = np.searchsorted(_share_edges(mix.alpha), words[:, 2], side="right").astype(np.int64)
    if mix.type == "mixup":
        whole = np.broadcast_to(np.array([0, 0, height, width]), (len(ids), 4))
        found = np.column_stack([partner, share, whole])
    else:
        boxes = _pasted_boxes(share, unit(words[:, 3]), unit(words[:, 4]), height, width)
        found = np.column_stack([partner, np.zeros_like(share), boxes])
    found[~chosen, 4] = 0
    return found


def _pasted_boxes(
    share: Ints, row: NDArray[np.float64], column: NDArray[np.float64], height: int, width: int
) -> Ints:
    """Return (N, 4) boxes of about 1 - share/256 of the area, centered on a pixel and clipped."""
    side = 0.5 * np.sqrt(1.0 - share / _SHARES)
    middle_y, middle_x = (row * height).astype(np.int64), (column * width).astype(np.int64)
    half_y, half_x = (side * height).astype(np.int64), (side * width).astype(np.int64)
    top, left = np.maximum(middle_y - half_y, 0), np.maximum(middle_x - half_x, 0)
    bottom, right = np.minimum(middle_y + half_y, height), np.minimum(middle_x + half_x, width)
    return np.stack([top, left, bottom - top, right - left], axis=1)


@functools.lru_cache(maxsize=8)
def _share_edges(alpha: float) -> NDArray[np.uint64]:
    """Return (256,) uint64 edges: a draw between edges k-1 and k gives a weight of k / 256.

    The probability of k is that of Beta(alpha, alpha) between (k - 1/2) / 256 and (k + 1/2) / 256.
    """
    at = (np.arange(_SHARES // 2) + 0.5) / _SHARES
    weight = _beta_mass(at, alpha) / _beta_mass(np.array([0.5]), alpha) / 2
    edges = np.concatenate([weight, 1.0 - weight[::-1]])
    return np.minimum(edges * 2.0**64, 2.0**64 - 2048).astype(np.uint64)


def _beta_mass(upto: NDArray[np.float64], alpha: float) -> NDArray[np.float64]:
    """Integrate (t (1 - t))^(alpha - 1) from 0 to each of `upto` <= 1/2 by Gauss-Legendre.

    With s = t^alpha the integrand is smooth for alpha < 1 too.
    """
    nodes, weights = np.polynomial.legendre.leggauss(64)
    ends = upto[:, None] ** alpha
    at = ends * (nodes + 1) / 2
    values = (1.0 - at ** (1.0 / alpha)) ** (alpha - 1.0) / alpha
    return np.asarray((values * weights).sum(axis=1) * ends[:, 0] / 2)


def erased(views: Array, boxes: Array, fill: Array) -> Array:
    """Set each box (B, 4) of views (B, H, W, C) uint8 to `fill` (C,) uint8."""
    inside = _inside(views, boxes)
    return where(inside, fill, views)


def mixed(views: Array, partners: Array, rows: Array) -> Array:
    """Blend `partners` into `views`, both (B, H, W, C) uint8; `rows` (B, 6) are from `mixes`."""
    share = as_int32(rows[:, 1, None, None, None])
    own, other = as_int32(views) * share, as_int32(partners) * (_SHARES - share)
    blend = (own + other + _SHARES // 2) // _SHARES
    return where(_inside(views, rows[:, 2:6]), as_uint8(blend), views)


def other_shares(rows: Array, height: int, width: int) -> Array:
    """Return (B,), the partner's fraction of each view, an exact multiple of 1 / (256 * H * W)."""
    shares: Array = (_SHARES - rows[:, 1]) * rows[:, 4] * rows[:, 5] / (_SHARES * height * width)
    return shares


def _inside(views: Array, boxes: Array) -> Array:
    """Return (B, H, W, 1) bool: True for pixels inside the box of their image."""
    _, height, width, _ = views.shape
    rows, columns = arange_like(boxes, height)[None], arange_like(boxes, width)[None]
    top, left = boxes[:, 0:1], boxes[:, 1:2]
    in_rows = (rows >= top) & (rows < top + boxes[:, 2:3])
    in_columns = (columns >= left) & (columns < left + boxes[:, 3:4])
    inside: Array = (in_rows[:, :, None] & in_columns[:, None, :])[..., None]
    return inside
