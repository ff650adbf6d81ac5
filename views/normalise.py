"""Views as the networks take them: normalised float32."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from configs.schema import Normalisation


def normalise(view: Tensor, normalisation: Normalisation) -> Tensor:
    """(B, H, W, C) uint8 -> (B, C, H, W) float32 in channels-last memory, on the same device."""
    mean, std = _moments(normalisation, view.shape[2], view.device)
    rows = view.flatten(2).to(mean.dtype, copy=True)  # of W * C values: three would be too few
    rows.div_(255.0).sub_(mean).div_(std)  # in place: new memory costs more than the arithmetic
    return rows.reshape(view.shape).permute(0, 3, 1, 2)


@functools.lru_cache(maxsize=16)
def _moments(
    normalisation: Normalisation, width: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each value of a row of pixels, (width * C,) float32.

    Kept on the device: a copy per step would make it wait.
    """
    mean = torch.tensor(normalisation.mean * width, dtype=torch.float32, device=device)
    return mean, torch.tensor(normalisation.std * width, dtype=torch.float32, device=device)
