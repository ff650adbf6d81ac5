"""Draw the crop, erased box and mixing partner of each view as a table of integers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from teach_once.configs.schema import PadCropFlip, ViewsConfig
from teach_once.views.augment.mixing import erased_boxes, mixes
from teach_once.views.seeds import FLIP_STREAM, distinct_codes, draws_of

# Columns of the table: crop and flip; the erased box; the mixing partner and its box.
CROP, ERASED, MIXED = slice(0, 3), slice(3, 7), slice(7, 13)
FLIP, PARTNER = 2, 7
_NUM_COLUMNS = 13

Ids = NDArray[np.int64]


def view_of_epoch(epoch: int, num_views: int) -> int:
    """Return the view (from 0) that epoch `epoch` (from 1) trains on."""
    return (epoch - 1) % num_views


def view_parameters(
    config: ViewsConfig,
    view: int,
    num_samples: int,
    shape: Sequence[int] = (0, 0),
    *,
    ids: Ids | None = None,
) -> NDArray[np.int64]:
    """Return the integers of view `view` for the second step: (M, 3) or (M, 13) int64.

    num_samples: size of the dataset, from which partners are sampled. shape: (height, width, ...)
    of the view, needed for erasing and mixing. ids: (M,) samples; default: all.

    Columns 0-2: top, left in [0, 2 * pad_px], flip 0 or 1. With erasing or mixing also 3-6: erased
    top, left, height, width; and 7-12: partner, own share in 256ths, mixed top, left, height,
    width.
    """
    augment, height, width = config.augment, shape[0], shape[1]
    ids = np.arange(num_samples) if ids is None else ids
    crops = crop_parameters(config, view, num_samples, ids)
    if augment.random_erasing is None and augment.mix is None:
        return crops
    table = np.zeros((len(ids), _NUM_COLUMNS), dtype=np.int64)
    table[:, CROP] = crops
    if augment.random_erasing is not None:
        boxes = erased_boxes(augment.random_erasing, config.seed, view, ids, height, width)
        table[:, ERASED] = boxes
    if augment.mix is not None:
        table[:, MIXED] = mixes(augment.mix, config.seed, view, num_samples, ids, height, width)
    return table


def crop_parameters(
    config: ViewsConfig, view: int, num_samples: int, ids: Ids
) -> NDArray[np.int64]:
    """Return (M, 3) int64 `top, left, flip` of samples `ids`.

    The crops of pad-crop-flip differ from view to view. If there are more views than crops, the
    crops repeat.
    """
    augment = config.augment
    if isinstance(augment, PadCropFlip):
        space = augment.num_crops
        if augment.num_distinct_views is None:
            view %= space
        codes = distinct_codes(config.seed, space, view, num_samples)[ids]
        position, flip = np.divmod(codes.astype(np.int64), 2 if augment.flip else 1)
        top, left = np.divmod(position, 2 * augment.pad_px + 1)
        return np.stack([top, left, flip], axis=1)
    crops = np.zeros((len(ids), 3), dtype=np.int64)
    if augment.flip:
        crops[:, FLIP] = _flips(config, view, num_samples, ids)
    return crops


def _flips(config: ViewsConfig, view: int, num_samples: int, ids: Ids) -> NDArray[np.int64]:
    """Return (M,) flips, 0 or 1. If flipping is the only augmentation, views 0 and 1 differ."""
    if config.augment.num_distinct_views is not None:
        return distinct_codes(config.seed, 2, view, num_samples)[ids].astype(np.int64)
    words = draws_of(ids, config.seed, view, 1, stream=FLIP_STREAM)[:, 0]
    return (words >> np.uint64(63)).astype(np.int64)
