"""Crops: boxes from draws and image sizes, cropping and resizing.

Images that need no resizing are cropped by index arithmetic. Pillow resizes the other crops with
integer arithmetic on uint8, so a view has the same bytes on every machine with the same Pillow. A
cache's canary detects a difference.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from teach_once.configs.schema import Border, CenterCrop, PadCropFlip, RandomResizedCrop, Squash
from teach_once.views.augment.array_ops import arange_like, take_rows
from teach_once.views.seeds import unit
from teach_once.views.splits import DatasetError, Decoded

if TYPE_CHECKING:
    from teach_once.views.augment.array_ops import Array


CROP_ATTEMPTS = 10
CROP_DRAWS = 4 * CROP_ATTEMPTS  # per attempt: area, aspect ratio, top, left

_MOST_RESIZED_PIXELS = 2**27  # an image of 1 x 10,000,000 pixels would take gigabytes

_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


class Box(NamedTuple):
    """A rectangle of pixels; `top` and `left` are its first row and column."""

    top: int
    left: int
    height: int
    width: int


def resized_crop_box(
    words: NDArray[np.uint64], height: int, width: int, augment: RandomResizedCrop
) -> Box:
    """Return the box of one view; `words` are CROP_DRAWS draws of (sample, view).

    The first of ten attempts that fits is used, or else the middle of the image with the nearest
    allowed aspect ratio. Source: Szegedy et al. 2014, "Going Deeper with Convolutions", in
    torchvision's form: the area is uniform and the logarithm of the ratio is uniform.
    """
    low, high = (math.log(edge) for edge in augment.ratio)
    for area, aspect, top, left in unit(words).reshape(CROP_ATTEMPTS, 4).tolist():
        smallest, largest = augment.scale
        pixels = height * width * (smallest + area * (largest - smallest))
        ratio = math.exp(low + aspect * (high - low))
        box_width = round(math.sqrt(pixels * ratio))
        box_height = round(math.sqrt(pixels / ratio))
        if 0 < box_width <= width and 0 < box_height <= height:
            rows, columns = height - box_height + 1, width - box_width + 1
            return Box(int(top * rows), int(left * columns), box_height, box_width)
    return _middle_box(height, width, augment.ratio)


def _middle_box(height: int, width: int, ratio: tuple[float, float]) -> Box:
    narrowest, widest = ratio
    box_height, box_width = height, width
    if width / height < narrowest:
        box_height = max(1, round(width / narrowest))
    elif width / height > widest:
        box_width = max(1, round(height * widest))
    return Box((height - box_height) // 2, (width - box_width) // 2, box_height, box_width)


def cut_and_resize(image: Decoded, box: Box, augment: RandomResizedCrop) -> NDArray[np.uint8]:
    """Crop and resize (H, W, C) uint8, or Pillow's image of any size, to (size, size, C) uint8."""
    size = (augment.size_px, augment.size_px)
    bottom, right = box.top + box.height, box.left + box.width
    # resize(box=...) is not used, because its filter would read pixels outside the box.
    if isinstance(image, Image.Image):
        cut = image.crop((box.left, box.top, right, bottom))
    else:
        cut = as_picture(image[box.top : bottom, box.left : right])
    if augment.antialias:
        return as_array(cut.resize(size, _FILTERS[augment.interpolation]))
    corners = (0, 0, box.width, box.height)
    sampled = cut.transform(size, Image.Transform.EXTENT, corners, Image.Resampling.BILINEAR)
    return as_array(sampled)


def center_crop(image: NDArray[np.uint8], augment: CenterCrop, name: str) -> NDArray[np.uint8]:
    """Crop the center of (H, W, C) uint8 to (crop_px, crop_px, C); unchanged without crop_px.

    Raises DatasetError with `name` if the image is too small.
    """
    if augment.crop_px is None:
        return image
    if augment.resize_px is not None:
        image = _short_side_resized(image, augment.resize_px, augment.interpolation, name)
    height, width, size = image.shape[0], image.shape[1], augment.crop_px
    if min(height, width) < size:
        raise DatasetError(
            f"{name} is {width}x{height}, too small for a center crop of {size} pixels",
            fix=f"set views.augment.resize_px={size}",
        )
    return _middle(image, size)


def squashed(image: NDArray[np.uint8], augment: Squash) -> NDArray[np.uint8]:
    """Resize (H, W, C) uint8 to a square and crop its center to (crop_px, crop_px, C).

    Source: `crop_mode: squash` of timm's evaluation transform.
    """
    size = (augment.resize_px, augment.resize_px)
    whole = as_picture(image).resize(size, _FILTERS[augment.interpolation])
    return _middle(as_array(whole), augment.crop_px)


def bordered(image: NDArray[np.uint8], augment: Border) -> NDArray[np.uint8]:
    """Resize the long side of (H, W, C) uint8 and pad or crop it to (crop_px, crop_px, C).

    Source: `crop_mode: border` of timm's evaluation transform.
    """
    height, width, size = image.shape[0], image.shape[1], augment.crop_px
    ratio = max(height / augment.resize_px, width / augment.resize_px)
    fitted = max(1, round(width / ratio)), max(1, round(height / ratio))
    inner = as_array(as_picture(image).resize(fitted, _FILTERS[augment.interpolation]))
    inner_height, inner_width = inner.shape[:2]
    above, left = max(0, size - inner_height) // 2, max(0, size - inner_width) // 2
    shape = (max(size, inner_height), max(size, inner_width), inner.shape[2])
    framed = np.empty(shape, dtype=np.uint8)
    framed[:] = augment.fill
    framed[above : above + inner_height, left : left + inner_width] = inner
    return _middle(framed, size)


def _middle(image: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    # Round halves to even, as Python's round and torchvision do.
    top, left = round((image.shape[0] - size) / 2), round((image.shape[1] - size) / 2)
    return image[top : top + size, left : left + size]


def _short_side_resized(
    image: NDArray[np.uint8], short_px: int, interpolation: str, name: str
) -> NDArray[np.uint8]:
    height, width = image.shape[:2]
    if min(height, width) == short_px:
        return image
    long_px = int(short_px * max(height, width) / min(height, width))
    if short_px * long_px > _MOST_RESIZED_PIXELS:
        raise DatasetError(
            f"{name} is {width}x{height}: resized to {short_px} pixels on the short side it would "
            f"have {long_px:,} pixels on the long side",
            fix="remove it or crop it",
        )
    size = (short_px, long_px) if width <= height else (long_px, short_px)
    return as_array(as_picture(image).resize(size, _FILTERS[interpolation]))


def size_of(image: Decoded) -> tuple[int, int]:
    """Return height and width in pixels."""
    if isinstance(image, Image.Image):
        return image.height, image.width
    return image.shape[0], image.shape[1]


def as_picture(image: NDArray[np.uint8]) -> Image.Image:
    """Convert (H, W, 1 or 3) uint8 to Pillow's image."""
    return Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)


def as_array(picture: Image.Image) -> NDArray[np.uint8]:
    """Convert Pillow's image to (H, W, 1 or 3) uint8."""
    found = np.asarray(picture)
    return found[:, :, None] if found.ndim == 2 else found


def crop_and_flip(images: Array, parameters: Array, augment: PadCropFlip) -> Array:
    """Pad, crop and flip images (B, H, W, C) uint8.

    parameters: (B, 3) integers `top, left, flip`, as sampled by `view_parameters`. Both are numpy
    arrays, or torch tensors on one device; the result, (B, H, W, C) uint8, is of the same kind.
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
    """Mirror left to right those images (B, H, W, C) uint8 whose `flips` (B,) is 1 instead of 0."""
    batch, height, width, channels = images.shape
    columns = arange_like(flips, width)[None, :]
    columns = columns + flips[:, None] * (width - 1 - 2 * columns)
    rows = arange_like(flips, batch * height).reshape(batch, height, 1) * width
    pixels = (rows + columns[:, None, :]).reshape(-1)
    flipped: Array = take_rows(images.reshape(-1, channels), pixels).reshape(images.shape)
    return flipped


def _reflected(index: Array, size: int) -> Array:
    """Reflect indices at the first and the last pixel, which are not repeated."""
    mirrored: Array = (size - 1) - abs((size - 1) - abs(index))
    return mirrored


def _within(index: Array, size: int) -> Array:
    return (index >= 0) & (index < size)
