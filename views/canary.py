"""A few replayed views, hashed, by which a reader finds out that its pixels come out differently.

Another image decoder or another numpy may do that. A cache stores the canary of the pass that made
it; every program that trains from the cache first computes it again.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from configs.schema import ViewsConfig
from views.augment import view_pixels
from views.seeds import choice
from views.splits import Split

CANARY_SAMPLES = 8
CANARY_VIEWS = 2


def pixel_canary(split: Split, config: ViewsConfig) -> dict[str, Any]:
    """{"samples": their ids, "views": their numbers, "sha256": hex}; reads only those images."""
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
