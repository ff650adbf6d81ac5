"""From a block of a tap's records to the arrays that are stored."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from store.errors import BadTeacherOutput
from store.layout import Block, TapSpec
from store.quantise import quantise_channels, quantise_rows


def arrays_to_store(
    tap: str, spec: TapSpec, block: Block, values: NDArray[Any]
) -> dict[str, NDArray[Any]]:
    """Array name -> rows of the block, in the dtype that is stored.

    Raises ValueError where the shape is not the tap's, BadTeacherOutput (with tap, view and sample)
    where a value is not finite or overflows the dtype.
    """
    if values.shape != (block.rows, *spec.shape):
        raise ValueError(f"tap {tap} has shape {values.shape}, not {(block.rows, *spec.shape)}")
    with np.errstate(over="ignore"):
        stored = values.astype(spec.read_dtype)
    if stored.dtype.kind == "f" and not np.isfinite(stored).all():
        raise _bad_output(tap, spec, block, values, np.isfinite(stored))
    if spec.scale is None:
        return {tap: stored}
    codes, scale = (quantise_rows if spec.scale == "row" else quantise_channels)(stored)
    return {tap: codes, f"{tap}.scale": scale}


def _bad_output(
    tap: str, spec: TapSpec, block: Block, values: NDArray[Any], finite: NDArray[np.bool_]
) -> BadTeacherOutput:
    """The error for the first value that is not `finite` once stored."""
    row = int(np.argwhere(~finite)[0][0])
    first = values[row].ravel()[np.argmax(~finite[row].ravel())]
    return BadTeacherOutput(
        f"the teacher's output {first} of tap {tap}, view {block.view}, sample "
        f"{block.start + row} does not fit {spec.dtype}"
    )
