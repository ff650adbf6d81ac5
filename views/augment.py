"""What a view looks like: draws -> integers, (uint8 image, integers) -> uint8 view.

A view is made in two steps. The first works on one decoded image and is Pillow's: resized crops,
trivial-augment, colour jitter; many configs need none of it. The second works on whole batches and
is index and integer arithmetic: pad, crop and flip, erasing, mixing; it gives the same bytes from
numpy, torch on a CPU and torch on a GPU, and needs no torch to be there.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from configs.schema import (
    AugmentConfig,
    Centre,
    Normalisation,
    PadCropFlip,
    RandomResizedCrop,
    ViewsConfig,
)
from views.colour import (
    JITTER_DRAWS,
    TRIVIAL_DRAWS,
    jitter_steps,
    jittered,
    trivial_step,
    trivially_augmented,
)
from views.crops import (
    CROP_DRAWS,
    as_array,
    as_picture,
    centre_crop,
    cut_and_resize,
    resized_crop_box,
)
from views.mixing import erased, erased_boxes, mixed, mixes, other_shares
from views.seeds import (
    FLIP_STREAM,
    JITTER_STREAM,
    TRIVIAL_STREAM,
    VIEW_STREAM,
    choice,
    distinct_codes,
    draws,
)
from views.splits import Checksums, DatasetError, Split, refuse_other_size

if TYPE_CHECKING:
    import torch


AUGMENT_VERSION = 1  # raise it when the pixels of any view change
_CANARY_SAMPLES = 8
_CANARY_VIEWS = 2
_PREVIEW_VIEWS = 12

# Columns of a view's parameters: the crop and flip; where something is erased; what is mixed in.
_CROP, _ERASED, _MIXED = slice(0, 3), slice(3, 7), slice(7, 13)
PARTNER = 7


def view_of_epoch(epoch: int, num_views: int) -> int:
    """The view (from 0) that epoch `epoch` (from 1) shows."""
    return (epoch - 1) % num_views


def is_cut_first(augment: AugmentConfig) -> bool:
    """Whether images need work one by one, by Pillow, before a batch can be made of them."""
    if augment.trivial_augment is not None or augment.colour_jitter is not None:
        return True
    return isinstance(augment, RandomResizedCrop) or (
        isinstance(augment, Centre) and augment.crop_px is not None
    )


def view_shape(image_shape: Sequence[int], augment: AugmentConfig) -> tuple[int, int, int]:
    """(H, W, C) of the views of images of that shape."""
    height, width, channels = image_shape
    if isinstance(augment, RandomResizedCrop):
        height = width = augment.size_px
    elif isinstance(augment, Centre) and augment.crop_px is not None:
        height = width = augment.crop_px
    return height, width, channels


def view_parameters(
    views: ViewsConfig, view: int, num_samples: int, shape: Sequence[int] = (0, 0)
) -> NDArray[np.int64]:
    """What the second step does to view `view` of every sample: (N, 3) or (N, 13) int64.

    Columns 0-2: top, left in [0, 2 * pad_px], flip 0 or 1. With erasing or mixing, which need the
    view's (height, width, ...) as `shape`, also 3-6: erased top, left, height, width; and
    7-12: partner, own share in 256ths, mixed top, left, height, width.
    """
    augment, height, width = views.augment, shape[0], shape[1]
    crops = _crops(views, view, num_samples)
    if augment.erasing is None and augment.mix is None:
        return crops
    table = np.zeros((num_samples, 13), dtype=np.int64)
    table[:, _CROP] = crops
    if augment.erasing is not None:
        boxes = erased_boxes(augment.erasing, views.seed, view, num_samples, height, width)
        table[:, _ERASED] = boxes
    if augment.mix is not None:
        table[:, _MIXED] = mixes(augment.mix, views.seed, view, num_samples, height, width)
    return table


def _crops(views: ViewsConfig, view: int, num_samples: int) -> NDArray[np.int64]:
    """(N, 3) int64 `top, left, flip`. Where crops run out, extras making more views, they recur."""
    augment = views.augment
    if isinstance(augment, PadCropFlip):
        space = augment.num_crops
        if augment.num_distinct_views is None:
            view %= space
        codes = distinct_codes(views.seed, space, view, num_samples)
        position, flip = np.divmod(codes.astype(np.int64), 2 if augment.flip else 1)
        top, left = np.divmod(position, 2 * augment.pad_px + 1)
        return np.stack([top, left, flip], axis=1)
    crops = np.zeros((num_samples, 3), dtype=np.int64)
    if augment.flip:
        crops[:, 2] = _flips(views, view, num_samples)
    return crops


def _flips(views: ViewsConfig, view: int, num_samples: int) -> NDArray[np.int64]:
    """(N,) 0 or 1. Where flipping is all there is, views 0 and 1 are the two ways round."""
    if views.augment.num_distinct_views is not None:
        return distinct_codes(views.seed, 2, view, num_samples).astype(np.int64)
    words = draws(views.seed, view, num_samples, 1, stream=FLIP_STREAM)[:, 0]
    return (words >> np.uint64(63)).astype(np.int64)


def cut_views(
    split: Split,
    views: ViewsConfig,
    numbers: Sequence[int],
    ids: NDArray[np.int64],
    shape: tuple[int, int, int],
) -> tuple[NDArray[np.uint8], Checksums]:
    """The first step: (V, M, *shape) uint8, views `numbers` of samples `ids`, not yet flipped.

    Behind them (M,) uint32, the checksums of the samples' bytes. Each image is read once.
    Raises DatasetError, also for a view that is not of that shape.
    """
    cuts = np.empty((len(numbers), len(ids), *shape), dtype=np.uint8)
    checksums = np.empty(len(ids), dtype=np.uint32)
    crops = [_crops(views, view, len(split))[ids] for view in numbers]
    read = zip(ids.tolist(), split.read_each(ids), strict=True)
    for row, (sample, (image, checksums[row])) in enumerate(read):
        for place, view in enumerate(numbers):
            cut = _cut(image, views, view, sample, crops[place][row], split.name_of(sample))
            refuse_other_size(shape, cut, split.name_of(sample))
            cuts[place, row] = cut
    return cuts, checksums


def _cut(
    image: NDArray[np.uint8],
    views: ViewsConfig,
    view: int,
    sample: int,
    crop: NDArray[np.int64],
    name: str,
) -> NDArray[np.uint8]:
    augment = views.augment

    def words(stream: int, num_draws: int) -> NDArray[np.uint64]:
        found = draws(views.seed, view, 1, num_draws, first_sample=sample, stream=stream)
        return np.asarray(found[0])

    if isinstance(augment, RandomResizedCrop):
        height, width = image.shape[:2]
        box = resized_crop_box(words(VIEW_STREAM, CROP_DRAWS), height, width, augment)
        image = cut_and_resize(image, box, augment)
    elif isinstance(augment, Centre):
        image = centre_crop(image, augment, name)
    elif is_cut_first(augment):
        image = render(image[None], (crop * [1, 1, 0])[None], augment)[0]
    if augment.trivial_augment is None and augment.colour_jitter is None:
        return image
    picture = as_picture(image)
    if augment.trivial_augment is not None:
        step = trivial_step(words(TRIVIAL_STREAM, TRIVIAL_DRAWS), augment.trivial_augment)
        picture = trivially_augmented(picture, step, augment.trivial_augment)
    if augment.colour_jitter is not None:
        steps = jitter_steps(words(JITTER_STREAM, JITTER_DRAWS), augment.colour_jitter)
        picture = jittered(picture, steps)
    return as_array(picture)


def finish(
    images: Any, parameters: Any, partners: Any, partner_parameters: Any, augment: AugmentConfig
) -> Any:
    """The second step: (B, H, W, C) uint8 of the first, and their rows of `view_parameters`.

    partners: the same of each sample's partner, where `augment.mix` is set; else None. All are
    numpy arrays, or torch tensors on one device; the result, (B, H, W, C) uint8, is of that kind.
    """
    views = _erased_crop(images, parameters, augment)
    if augment.mix is None:
        return views
    others = _erased_crop(partners, partner_parameters, augment)
    return mixed(views, others, parameters[:, _MIXED])


def partner_shares(parameters: Any, shape: Sequence[int]) -> Any:
    """(B,) how much of each view of (height, width, ...) is its partner, a fraction."""
    return other_shares(parameters[:, _MIXED], shape[0], shape[1])


def _erased_crop(images: Any, parameters: Any, augment: AugmentConfig) -> Any:
    if isinstance(augment, PadCropFlip) and not is_cut_first(augment):
        images = render(images, parameters[:, _CROP], augment)
    elif augment.flip:
        images = _flipped(images, parameters[:, 2])
    if augment.erasing is None:
        return images
    return erased(images, parameters[:, _ERASED], _fill(images, augment.erasing.fill))


def _flipped(images: Any, flip: Any) -> Any:
    width = images.shape[2]
    columns: Any = _arange_like(flip)(width)[None, :]
    columns = columns + flip[:, None] * (width - 1 - 2 * columns)
    batch, height = images.shape[:2]
    rows = _arange_like(flip)(batch * height).reshape(batch, height, 1) * width
    pixel = (rows + columns[:, None, :]).reshape(-1)
    return _take_rows(images.reshape(-1, images.shape[3]), pixel).reshape(images.shape)


def shown(split: Split, views: ViewsConfig, view: int, ids: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Views of some samples as everything else must produce them: (M, H, W, C) uint8, in numpy."""
    shape = view_shape(split.first_shape, views.augment)
    (cut,), _ = cut_views(split, views, [view], ids, shape)
    table = view_parameters(views, view, len(split), shape)
    partners = cut_partners = None
    if views.augment.mix is not None:
        partners = table[ids, PARTNER]
        (cut_partners,), _ = cut_views(split, views, [view], partners, shape)
    rows = None if partners is None else table[partners]
    return np.asarray(finish(cut, table[ids], cut_partners, rows, views.augment))


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


def pixel_canary(split: Split, views: ViewsConfig) -> dict[str, Any]:
    """A few replayed views, hashed: {"samples": ids, "views": numbers, "sha256": hex}.

    A cache keeps it, so that a reader whose pixels come out differently (another image decoder,
    another numpy) finds out before it trains. Reads only those few images.
    """
    num_views = _at_most(_CANARY_VIEWS, views)
    samples = choice(0, len(split), min(_CANARY_SAMPLES, len(split)))
    digest = hashlib.sha256()
    for view in range(num_views):
        digest.update(np.ascontiguousarray(shown(split, views, view, samples)).tobytes())
    return {
        "samples": samples.tolist(),
        "views": list(range(num_views)),
        "sha256": digest.hexdigest(),
    }


def preview_views(split: Split, views: ViewsConfig) -> NDArray[np.uint8]:
    """The first views of sample 0, for looking at: (n, H, W, C) uint8, n at most 12."""
    numbers = range(_at_most(_PREVIEW_VIEWS, views))
    return np.concatenate([shown(split, views, view, np.array([0])) for view in numbers])


def _at_most(number: int, views: ViewsConfig) -> int:
    space = views.augment.num_distinct_views
    return number if space is None else min(number, space)


def check_augmentable(image_shape: Sequence[int], augment: AugmentConfig) -> None:
    """DatasetError if images of (H, W, C) cannot be shown as asked."""
    smallest, channels = min(image_shape[:2]), image_shape[2]
    if (
        isinstance(augment, PadCropFlip)
        and augment.padding == "reflect"
        and augment.pad_px >= smallest
    ):
        raise DatasetError(
            f"views.augment.pad_px is {augment.pad_px}, but reflecting an image of "
            f"{image_shape[0]}x{image_shape[1]} allows at most {smallest - 1}"
        )
    if augment.erasing is not None and len(augment.erasing.fill) not in (1, channels):
        raise DatasetError(
            f"views.augment.erasing.fill has {len(augment.erasing.fill)} values, the images have "
            f"{channels} channels"
        )
    if channels not in (1, 3) and is_cut_first(augment):
        raise DatasetError(f"views.augment: Pillow cannot cut images of {channels} channels")


def _fill(images: Any, fill: tuple[int, ...]) -> Any:
    if isinstance(images, np.ndarray):
        return np.array(fill, dtype=np.uint8)
    return _fill_on(images.device, fill)


@functools.lru_cache(maxsize=16)
def _fill_on(device: torch.device, fill: tuple[int, ...]) -> torch.Tensor:
    import torch

    return torch.tensor(fill, dtype=torch.uint8, device=device)


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
