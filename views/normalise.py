"""Views as the networks take them: normalised float32."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from configs.schema import Normalisation


def normalise(view: Tensor, normalisation: Normalisation) -> Tensor:
    """(B, H, W, C) uint8 -> (B, C, H, W) float32 in channels-last memory, on the same device."""
    mean, std = _moments(normalisation, view.device)
    return ((view.to(mean.dtype) / 255.0 - mean) / std).permute(0, 3, 1, 2)


@functools.lru_cache(maxsize=16)
def _moments(normalisation: Normalisation, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, kept on the device: a copy per step would make it wait."""
    mean = torch.tensor(normalisation.mean, dtype=torch.float32, device=device)
    return mean, torch.tensor(normalisation.std, dtype=torch.float32, device=device)
