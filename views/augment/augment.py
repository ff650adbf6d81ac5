"""Make views: (uint8 image, integers) -> uint8 view.

A view is made in two steps. The first step works on one decoded image and uses Pillow: resized
crops, trivial-augment, color jitter. Many configs do not need it. The second step works on whole
batches with index and integer arithmetic: pad, crop and flip, erasing, mixing. It gives the same
bytes with numpy, torch on a CPU and torch on a GPU, and does not import torch. The integers of the
second step are sampled in `views.augment.parameters`; the integers of the first step are sampled
here, image by image.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from teach_once.configs.schema import (
    AugmentConfig,
    Border,
    CenterCrop,
    PadCropFlip,
    RandomResizedCrop,
    Squash,
    ViewsConfig,
)
from teach_once.views.augment.array_ops import color_like
from teach_once.views.augment.color import (
    JITTER_DRAWS,
    TRIVIAL_DRAWS,
    jitter_steps,
    jittered,
    trivial_step,
    trivially_augmented,
)
from teach_once.views.augment.crops import (
    CROP_DRAWS,
    as_array,
    as_picture,
    bordered,
    center_crop,
    crop_and_flip,
    cut_and_resize,
    flip,
    resized_crop_box,
    size_of,
    squashed,
)
from teach_once.views.augment.mixing import erased, mixed, other_shares
from teach_once.views.augment.parameters import (
    CROP,
    ERASED,
    FLIP,
    MIXED,
    PARTNER,
    crop_parameters,
    view_parameters,
)
from teach_once.views.seeds import JITTER_STREAM, TRIVIAL_STREAM, VIEW_STREAM, choice, draws
from teach_once.views.splits import (
    DatasetError,
    Decoded,
    Digests,
    Split,
    check_same_size,
    stack_digests,
)

if TYPE_CHECKING:
    from teach_once.views.augment.array_ops import Array


def view_shape(image_shape: Sequence[int], augment: AugmentConfig) -> tuple[int, int, int]:
    """Return (H, W, C) of the views of images of shape `image_shape`."""
    height, width, channels = image_shape
    if augment.output_px is not None:
        height = width = augment.output_px
    return height, width, channels


def check_augmentable(image_shape: Sequence[int], augment: AugmentConfig) -> None:
    """Raise DatasetError if images of (H, W, C) cannot be augmented as configured."""
    height, width, channels = image_shape
    if isinstance(augment, PadCropFlip):
        _check_padding(height, width, augment)
    if augment.random_erasing is not None:
        _check_color("views.augment.random_erasing.fill", augment.random_erasing.fill, channels)
    if isinstance(augment, Border):
        _check_color("fill of type: border", augment.fill, channels)
    if channels not in (1, 3) and augment.needs_pillow:
        raise DatasetError(
            f"views.augment: Pillow cannot crop or recolor images of {channels} channels"
        )


def _check_color(key: str, color: Sequence[int], channels: int) -> None:
    if len(color) not in (1, channels):
        raise DatasetError(
            f"{key} has {len(color)} values, the images have {channels} channels",
            fix=f"give {channels} values, or one for all channels",
        )


def _check_padding(height: int, width: int, augment: PadCropFlip) -> None:
    most = min(height, width) - 1
    if augment.padding == "reflect" and augment.pad_px > most:
        raise DatasetError(
            f"views.augment.pad_px is {augment.pad_px}, but an image of {height}x{width} can be "
            f"padded by reflection by at most {most}",
            fix=f"set views.augment.pad_px={most} or views.augment.padding=zero",
        )


def cut_views(
    split: Split,
    config: ViewsConfig,
    views: Sequence[int],
    ids: NDArray[np.int64],
    shape: tuple[int, int, int],
) -> tuple[NDArray[np.uint8], Digests]:
    """Apply the first step to `views` of samples `ids`; each image is read once.

    Returns (V, M, *shape) uint8 views, not yet flipped, and (M, 16) uint8 digests of the samples'
    bytes. Raises DatasetError if an image cannot be read or a view has another shape.
    """
    cuts = np.empty((len(views), len(ids), *shape), dtype=np.uint8)
    digests = []
    crops = [_first_step_crops(split, config, view, ids) for view in views]
    is_resized = isinstance(config.augment, RandomResizedCrop)
    opened = split.open_each if is_resized and split.open_each else split.read_each
    read = zip(ids.tolist(), opened(ids), strict=True)
    for row, (sample, (image, digest)) in enumerate(read):
        digests.append(digest)
        for index, view in enumerate(views):
            cut = _cut(image, config, view, sample, crops[index][row], split.name_of)
            if cut.shape != shape:
                check_same_size(shape, cut, split.name_of(sample))
            cuts[index, row] = cut
    return cuts, stack_digests(digests)


def _first_step_crops(
    split: Split, config: ViewsConfig, view: int, ids: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Return (M, 3) as `crop_parameters`, or zeros if the first step draws its own crops."""
    if isinstance(config.augment, PadCropFlip) and config.augment.needs_pillow:
        return crop_parameters(config, view, len(split), ids)
    return np.zeros((len(ids), 3), dtype=np.int64)


def _cut(
    image: Decoded,
    config: ViewsConfig,
    view: int,
    sample: int,
    crop: NDArray[np.int64],
    name_of: Callable[[int], str],
) -> NDArray[np.uint8]:
    """Apply the first step to one view of one sample; `crop` is its row of `_first_step_crops`."""
    augment = config.augment
    if isinstance(augment, RandomResizedCrop):
        words = _draws_of(config, view, sample, VIEW_STREAM, CROP_DRAWS)
        cut = cut_and_resize(image, resized_crop_box(words, *size_of(image), augment), augment)
        return _recolored(cut, config, view, sample)
    pixels = np.asarray(image)
    if isinstance(augment, CenterCrop):
        pixels = center_crop(pixels, augment, name_of(sample))
    elif isinstance(augment, Squash):
        pixels = squashed(pixels, augment)
    elif isinstance(augment, Border):
        pixels = bordered(pixels, augment)
    elif augment.needs_pillow:
        unflipped = crop * np.array([1, 1, 0])
        pixels = crop_and_flip(pixels[None], unflipped[None], augment)[0]
    return _recolored(pixels, config, view, sample)


def _recolored(
    image: NDArray[np.uint8], config: ViewsConfig, view: int, sample: int
) -> NDArray[np.uint8]:
    """Apply trivial-augment and color jitter, if configured."""
    trivial, jitter = config.augment.trivial_augment, config.augment.color_jitter
    if trivial is None and jitter is None:
        return image
    picture = as_picture(image)
    if trivial is not None:
        words = _draws_of(config, view, sample, TRIVIAL_STREAM, TRIVIAL_DRAWS)
        picture = trivially_augmented(picture, trivial_step(words, trivial), trivial)
    if jitter is not None:
        words = _draws_of(config, view, sample, JITTER_STREAM, JITTER_DRAWS)
        picture = jittered(picture, jitter_steps(words, jitter))
    return as_array(picture)


def _draws_of(
    config: ViewsConfig, view: int, sample: int, stream: int, num_draws: int
) -> NDArray[np.uint64]:
    """Return (num_draws,) uint64 draws for one view of one sample."""
    words = draws(config.seed, view, 1, num_draws, first_sample=sample, stream=stream)
    return np.asarray(words[0])


def finish(
    images: Array,
    parameters: Array,
    partners: Array | None,
    partner_parameters: Array | None,
    augment: AugmentConfig,
) -> Array:
    """Apply the second step to images (B, H, W, C) uint8 and their rows of `view_parameters`.

    partners, partner_parameters: the same for each sample's partner if `augment.mix` is set, else
    None. All are numpy arrays, or torch tensors on one device; the result, (B, H, W, C) uint8, is
    of the same kind.
    """
    finished = _crop_flip_erase(images, parameters, augment)
    if partners is None or partner_parameters is None:
        return finished
    others = _crop_flip_erase(partners, partner_parameters, augment)
    return mixed(finished, others, parameters[:, MIXED])


def partner_shares(parameters: Array, shape: Sequence[int]) -> Array:
    """Return (B,), the fraction of each view of (height, width, ...) that shows its partner."""
    return other_shares(parameters[:, MIXED], shape[0], shape[1])


def _crop_flip_erase(images: Array, parameters: Array, augment: AugmentConfig) -> Array:
    if isinstance(augment, PadCropFlip) and not augment.needs_pillow:
        images = crop_and_flip(images, parameters[:, CROP], augment)
    elif augment.flip:
        images = flip(images, parameters[:, FLIP])
    if augment.random_erasing is None:
        return images
    return erased(images, parameters[:, ERASED], color_like(images, augment.random_erasing.fill))


def view_pixels(
    split: Split, config: ViewsConfig, view: int, ids: NDArray[np.int64]
) -> NDArray[np.uint8]:
    """Return one view of samples `ids`, both steps in numpy: (M, H, W, C) uint8.

    This is the reference: all other code that makes views must give the same bytes.
    """
    shape = view_shape(split.first_shape, config.augment)
    (cut,), _ = cut_views(split, config, [view], ids, shape)
    rows = view_parameters(config, view, len(split), shape, ids=ids)
    if config.augment.mix is None:
        return finish(cut, rows, None, None, config.augment)
    partners = rows[:, PARTNER]
    partner_rows = view_parameters(config, view, len(split), shape, ids=partners)
    (cut_partners,), _ = cut_views(split, config, [view], partners, shape)
    return finish(cut, rows, cut_partners, partner_rows, config.augment)


CANARY_SAMPLES = 8
CANARY_VIEWS = 2


def pixel_canary(split: Split, config: ViewsConfig) -> dict[str, Any]:
    """Return {"samples": ids, "views": view numbers, "sha256": hex}; reads only those images."""
    num_views = min(CANARY_VIEWS, config.augment.num_distinct_views or CANARY_VIEWS)
    samples = choice(0, len(split), min(CANARY_SAMPLES, len(split)))
    digest = hashlib.sha256()
    for view in range(num_views):
        pixels = view_pixels(split, config, view, samples)
        digest.update(np.ascontiguousarray(pixels).tobytes())
    return {
        "samples": samples.tolist(),
        "views": list(range(num_views)),
        "sha256": digest.hexdigest(),
    }
