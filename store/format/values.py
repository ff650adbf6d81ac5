"""The valid values of a cache: finite floats, `correct` 0 or 1, labels of the classes.

Checksums prove that a block has the bytes that were written, not that a teacher could have computed
them. A single NaN would make a student's loss NaN many steps later; this check finds its block
first.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from teach_once.store.format.manifest import Manifest
from teach_once.store.format.spec import CLASS, Block

Check = Callable[[NDArray[np.uint8]], str | None]  # the fault of a piece of values
Seen = dict[str, NDArray[np.bool_]]  # array -> (views, blocks)
# Reads a block (into an array if given; `num_bytes` of values; checked) and returns its fault.
Read = Callable[[NDArray[Any] | None, int, Check | None], str | None]

# A float is not finite if its exponent's bits are all ones. Read as an integer such a number is
# larger than every finite one, of either sign; the maximum of integers is far faster than isfinite.
_SIGNED = {"float16": ("<i2", 0x7C00), "float32": ("<i4", 0x7F800000)}
_UNSIGNED = {"float16": ("<u2", 0xFC00), "float32": ("<u4", 0xFF800000)}


def value_fault(array: str, dtype: str, num_classes: int, values: NDArray[np.uint8]) -> str | None:
    """Return the problem of an array's values, None if they are valid.

    values: bytes of any number of whole values.
    """
    if values.size == 0:
        return None
    if array.endswith(CLASS) and (largest := int(values.view("<u2").max())) >= num_classes:
        return f"holds the class {largest}, expected 0 to {num_classes - 1}"
    if array == "correct":
        return "holds something else than 0 and 1" if values.max() > 1 else None
    if dtype in _SIGNED and not is_finite(values, dtype):
        return "holds NaN or infinity"
    return None


def is_finite(values: NDArray[np.uint8], dtype: str) -> bool:
    """Return True if all of these floats, little endian and given as bytes, are finite."""
    return all(
        int(values.view(integer).max()) < limit
        for integer, limit in (_SIGNED[dtype], _UNSIGNED[dtype])
    )


def scale_fault(scale: str, values: NDArray[np.float32]) -> str | None:
    """Return the problem of the lows and steps of codes; None if valid. scale: "row" or "block"."""
    low, step = (values[:, 0], values[:, 1]) if scale == "row" else (values[0, 0], values[0, 1])
    with np.errstate(all="ignore"):
        highest = low + np.float32(255) * step
    if not (np.isfinite(low).all() and np.isfinite(highest).all()):
        return "encodes values that are NaN or infinite"
    return "has a negative step" if (step < 0).any() else None


def label_fault(labels: NDArray[Any], num_classes: int) -> str | None:
    """Return the problem of the labels; None if they are valid."""
    lowest, highest = int(labels.min()), int(labels.max())
    if lowest >= 0 and highest < num_classes:
        return None
    found = lowest if lowest < 0 else highest
    return f"holds the label {found}, expected 0 to {num_classes - 1}"


def checked_read(
    manifest: Manifest,
    array: str,
    block: Block,
    out: NDArray[Any] | None,
    seen: Seen,
    read: Read,
) -> str | None:
    """Read a block, into `out` if given, and return its fault or its values' fault.

    seen: the blocks whose values were checked. One check is enough, because checksums cover the
    values afterwards.
    """
    spec, scale = manifest.arrays[array], manifest.scale_of(array)
    position, rows = (block.view, block.index), manifest.rows_in(spec, block)
    if (done := seen.get(array)) is None:
        shape = (manifest.num_views, manifest.blocks_per_view)
        done = seen.setdefault(array, np.zeros(shape, np.bool_))
    if scale is not None and out is None:
        out = np.empty((rows, *spec.shape), spec.dtype)
    classes = manifest.num_classes
    check = None if done[position] else partial(value_fault, array, spec.dtype, classes)
    what = read(out, rows * spec.bytes_per_row, check)
    if what is None and scale is not None and out is not None:
        what = scale_fault(scale, out)
    if what is None:
        done[position] = True
    return what
