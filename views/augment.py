"""From stored image to view, as two pure functions: draws -> integers, (image, integers) -> view.

Pad, crop and flip are one gather by computed indices, so that a view has the same bytes from numpy,
torch on a CPU and torch on a GPU. The module imports no torch: it works on whatever it is given.
Leaves out every augmentation whose result depends on a library's interpolation.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from configs.schema import Normalisation, PadCropFlip, ViewsConfig
from views.datasets import DatasetError, Split
from views.seeds import choice, distinct_codes

if TYPE_CHECKING:
    import torch


AUGMENT_VERSION = 1  # raise it when the pixels of any view change
_CANARY_SAMPLES = 8
_CANARY_VIEWS = 2
_PREVIEW_VIEWS = 12
_CALIBRATION_SAMPLES, _CALIBRATION_BATCH = 16_384, 256


def view_of_epoch(epoch: int, num_views: int) -> int:
    """The view (from 0) that epoch `epoch` (from 1) shows."""
    return (epoch - 1) % num_views


def view_parameters(views: ViewsConfig, view: int, num_samples: int) -> NDArray[np.int64]:
    """(N, 3) int64 `top, left, flip` of one view; top, left in [0, 2 * pad_px], flip 0 or 1."""
    augment = views.augment
    codes = distinct_codes(views.seed, augment.num_distinct_views, view, num_samples)
    side = 2 * augment.pad_px + 1
    position, flip = np.divmod(codes.astype(np.int64), 2 if augment.flip else 1)
    top, left = np.divmod(position, side)
    return np.stack([top, left, flip], axis=1)


def render(images: Any, parameters: Any, augment: PadCropFlip) -> Any:
    """Pad, crop and flip: (B, H, W, C) uint8 and (B, 3) integers -> (B, H, W, C) uint8.

    Both arguments are numpy arrays, or torch tensors on one device; the result is of that kind.
    """
    batch, height, width, channels = images.shape
    arange: Any = _arange_like(parameters)
    columns = arange(width)[None, :]
    columns = columns + parameters[:, 2:3] * (width - 1 - 2 * columns)  # flip comes after the crop
    rows = arange(height)[None, :] + parameters[:, 0:1] - augment.pad_px
    columns = columns + parameters[:, 1:2] - augment.pad_px
    inside = _both(_within(rows, height), _within(columns, width))
    if augment.padding == "reflect":
        rows, columns = _reflected(rows, height), _reflected(columns, width)
    else:
        rows, columns = rows.clip(0, height - 1), columns.clip(0, width - 1)
    pixel = (rows + (arange(batch) * height)[:, None])[:, :, None] * width + columns[:, None, :]
    found = _take_rows(images.reshape(-1, channels), pixel.reshape(-1))
    view = found.reshape(batch, height, width, channels)
    return view if augment.padding == "reflect" else view * inside[:, :, :, None]


def normalise(view: torch.Tensor, normalisation: Normalisation) -> torch.Tensor:
    """(B, H, W, C) uint8 -> (B, C, H, W) float32 in channels-last memory, on the same device."""
    mean, std = _moments(normalisation, view.device)
    return ((view.to(mean.dtype) / 255.0 - mean) / std).permute(0, 3, 1, 2)


@functools.lru_cache(maxsize=16)
def _moments(
    normalisation: Normalisation, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation on the device, kept there: a copy per step would make it wait."""
    import torch

    mean = torch.tensor(normalisation.mean, dtype=torch.float32, device=device)
    return mean, torch.tensor(normalisation.std, dtype=torch.float32, device=device)


def calibration_batches(
    images: torch.Tensor, views: ViewsConfig, normalisation: Normalisation
) -> Iterator[torch.Tensor]:
    """View 0 of at most 16,384 samples chosen by key, normalised: (256, C, H, W) batches.

    images: (N, H, W, C) uint8 on the device. The same batches whatever a pass's batch size.
    """
    import torch

    samples = choice(0, len(images), min(_CALIBRATION_SAMPLES, len(images)))
    parameters = view_parameters(views, 0, len(images))[samples]
    for start in range(0, len(samples), _CALIBRATION_BATCH):
        rows = slice(start, start + _CALIBRATION_BATCH)
        some = images.index_select(0, torch.from_numpy(samples[rows]).to(images.device))
        drawn = torch.from_numpy(parameters[rows]).to(images.device)
        yield normalise(render(some, drawn, views.augment), normalisation)


def pixel_canary(split: Split, views: ViewsConfig) -> dict[str, Any]:
    """A few replayed views, hashed: {"samples": ids, "views": numbers, "sha256": hex}.

    A cache keeps it, so that a reader whose pixels come out differently (another image decoder,
    another numpy) finds out before it trains. Reads only those few images.
    """
    num_views = min(_CANARY_VIEWS, views.augment.num_distinct_views)
    samples = choice(0, len(split), min(_CANARY_SAMPLES, len(split)))
    images = split.read_some(samples)
    digest = hashlib.sha256()
    for view in range(num_views):
        parameters = view_parameters(views, view, len(split))[samples]
        digest.update(render(images, parameters, views.augment).tobytes())
    return {
        "samples": samples.tolist(),
        "views": list(range(num_views)),
        "sha256": digest.hexdigest(),
    }


def preview_views(split: Split, views: ViewsConfig) -> NDArray[np.uint8]:
    """The first views of sample 0, for looking at: (n, H, W, C) uint8, n at most 12."""
    num_views = min(_PREVIEW_VIEWS, views.augment.num_distinct_views)
    image = split.read_some(np.array([0]))
    rows = [view_parameters(views, view, len(split))[:1] for view in range(num_views)]
    found = [render(image, parameters, views.augment)[0] for parameters in rows]
    return np.stack(found)


def check_augmentable(image_shape: Sequence[int], augment: PadCropFlip) -> None:
    """DatasetError if images of (H, W, C) cannot be padded as asked."""
    smallest = min(image_shape[:2])
    if augment.padding == "reflect" and augment.pad_px >= smallest:
        raise DatasetError(
            f"views.augment.pad_px is {augment.pad_px}, but reflecting an image of "
            f"{image_shape[0]}x{image_shape[1]} allows at most {smallest - 1}"
        )


def _reflected(index: Any, size: int) -> Any:
    """Mirror indices about the first and the last pixel, which are not repeated."""
    return (size - 1) - abs((size - 1) - abs(index))


def _within(index: Any, size: int) -> Any:
    return (index >= 0) & (index < size)


def _both(rows: Any, columns: Any) -> Any:
    return rows[:, :, None] & columns[:, None, :]


def _arange_like(array: Any) -> Any:
    if isinstance(array, np.ndarray):
        return lambda stop: np.arange(stop, dtype=array.dtype)
    import torch

    return lambda stop: torch.arange(stop, dtype=array.dtype, device=array.device)


def _take_rows(table: Any, index: Any) -> Any:
    if isinstance(table, np.ndarray):
        return table.take(index, axis=0)
    return table.index_select(0, index)
