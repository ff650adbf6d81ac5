"""Pad, crop and flip by index arithmetic, on whole batches: the same bytes from numpy and torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from configs.schema import PadCropFlip
from views.array_ops import arange_like, take_rows

if TYPE_CHECKING:
    from views.array_ops import Array


def crop_and_flip(images: Array, parameters: Array, augment: PadCropFlip) -> Array:
    """Pad, crop and flip: (B, H, W, C) uint8 and (B, 3) integers -> (B, H, W, C) uint8.

    parameters: `top, left, flip` of each image, as `view_parameters` draws them. Both are numpy
    arrays, or torch tensors on one device; the result is of that kind.
    """
    batch, height, width, channels = images.shape
    columns = arange_like(parameters, width)[None, :]
    columns = columns + parameters[:, 2:3] * (width - 1 - 2 * columns)  # flip comes after the crop
    rows = arange_like(parameters, height)[None, :] + parameters[:, 0:1] - augment.pad_px
    columns = columns + parameters[:, 1:2] - augment.pad_px
    inside: Array = _within(rows, height)[:, :, None] & _within(columns, width)[:, None, :]
    if augment.padding == "reflect":
        rows, columns = _reflected(rows, height), _reflected(columns, width)
    else:
        rows, columns = rows.clip(0, height - 1), columns.clip(0, width - 1)
    first_rows = (arange_like(parameters, batch) * height)[:, None]
    pixels = (rows + first_rows)[:, :, None] * width + columns[:, None, :]
    cropped: Array = take_rows(images.reshape(-1, channels), pixels.reshape(-1))
    cropped = cropped.reshape(images.shape)
    if augment.padding == "zero":
        cropped = cropped * inside[:, :, :, None]
    return cropped


def flip(images: Array, flips: Array) -> Array:
    """Mirror, left to right, the images (B, H, W, C) uint8 whose `flips` (B,) is 1, not 0."""
    batch, height, width, channels = images.shape
    columns = arange_like(flips, width)[None, :]
    columns = columns + flips[:, None] * (width - 1 - 2 * columns)
    rows = arange_like(flips, batch * height).reshape(batch, height, 1) * width
    pixels = (rows + columns[:, None, :]).reshape(-1)
    flipped: Array = take_rows(images.reshape(-1, channels), pixels).reshape(images.shape)
    return flipped


def _reflected(index: Array, size: int) -> Array:
    """Mirror indices about the first and the last pixel, which are not repeated."""
    mirrored: Array = (size - 1) - abs((size - 1) - abs(index))
    return mirrored


def _within(index: Array, size: int) -> Array:
    return (index >= 0) & (index < size)
