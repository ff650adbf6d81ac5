"""Index and integer operations that accept numpy arrays and torch tensors.

Each returns the type of its arguments: an array for arrays, a tensor on the same device for
tensors. torch is imported only when a tensor is passed.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

    # A numpy array or a torch tensor; one call uses a single kind. Docstrings give the dtype, which
    # torch's type does not include.
    Array = TypeVar("Array", NDArray[Any], torch.Tensor)


def arange_like(array: Array, stop: int) -> Array:
    """Return 0 ... stop - 1, (stop,), with the dtype and device of `array`."""
    if isinstance(array, np.ndarray):
        return np.arange(stop, dtype=array.dtype)
    import torch

    return torch.arange(stop, dtype=array.dtype, device=array.device)


def take_rows(table: Array, index: Array) -> Array:
    """Return rows `index` (M,) of `table` (N, ...) as (M, ...)."""
    if isinstance(table, np.ndarray):
        return table.take(index, axis=0)
    return table.index_select(0, index)


def where(condition: Array, yes: Array, no: Array) -> Array:
    """Return `yes` where the condition holds, else `no`; all three are broadcast."""
    if isinstance(no, np.ndarray):
        return np.where(condition, yes, no)
    import torch

    return torch.where(condition, yes, no)


def as_int32(values: Array) -> Array:
    """Convert to int32."""
    return values.astype(np.int32) if isinstance(values, np.ndarray) else values.int()


def as_uint8(values: Array) -> Array:
    """Convert values in [0, 255] to uint8."""
    return values.astype(np.uint8) if isinstance(values, np.ndarray) else values.byte()


def color_like(images: Array, color: tuple[int, ...]) -> Array:
    """Return a color as (C,) uint8 on the device of `images`."""
    if isinstance(images, np.ndarray):
        return np.array(color, dtype=np.uint8)
    return _color_on(images.device, color)


@functools.lru_cache(maxsize=16)
def _color_on(device: torch.device, color: tuple[int, ...]) -> torch.Tensor:
    """Return a color from a cache on the device, because copying it in each step would block."""
    import torch

    return torch.tensor(color, dtype=torch.uint8, device=device)
