"""Images to crop and to color."""

from __future__ import annotations

import numpy as np


def image_of(height: int, width: int, channels: int = 3) -> np.ndarray:
    """Return an image that is smooth like a photograph, with some noise."""
    rng = np.random.default_rng(height * width)
    rows, columns = np.mgrid[0:height, 0:width]
    waves = 127 + 90 * np.sin(rows / 7)[..., None] * np.cos(
        columns / np.arange(3, 3 + channels)[:, None, None]
    ).transpose(1, 2, 0)
    return np.clip(waves + rng.normal(0, 12, waves.shape), 0, 255).astype(np.uint8)
