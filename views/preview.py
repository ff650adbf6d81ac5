"""The picture of a cache's first views, for a look at the augmentation."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from configs.schema import ViewsConfig
from views.augment import view_pixels
from views.splits import Split

_MOST_VIEWS = 12


def preview_views(split: Split, config: ViewsConfig) -> NDArray[np.uint8]:
    """The first views of sample 0: (n, H, W, C) uint8, n at most 12."""
    num_views = min(_MOST_VIEWS, config.augment.num_distinct_views or _MOST_VIEWS)
    sample = np.array([0])
    return np.concatenate([view_pixels(split, config, v, sample) for v in range(num_views)])
