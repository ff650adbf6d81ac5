"""Encode a block of a tap's records as the arrays that are stored, and decode them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from teach_once.store.errors import BadTeacherOutput
from teach_once.store.format.spec import Block, TapSpec, cut_rows
from teach_once.store.format.values import scale_fault

_TOP = 255


def quantize_rows(values: NDArray[np.float32]) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Quantize values (R, K) to codes (R, K) uint8 and `low, step` per row (R, 2) float32."""
    low, step = _range(values, axis=1)
    return _codes(values, low[:, None], step[:, None]), np.stack([low, step], axis=1)


def quantize_channels(values: NDArray[np.float32]) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Quantize values (R, C) to codes (R, C) uint8 and channels' `low, step` (1, 2, C) float32."""
    low, step = _range(values, axis=0)
    return _codes(values, low, step), np.stack([low, step])[None]


def restore_rows(codes: NDArray[np.uint8], scale: NDArray[np.float32]) -> NDArray[np.float32]:
    """Invert `quantize_rows` to within half a step: (R, K) float32."""
    return np.asarray(codes * scale[:, 1:2] + scale[:, 0:1], dtype=np.float32)


def restore_channels(codes: NDArray[np.uint8], scale: NDArray[np.float32]) -> NDArray[np.float32]:
    """Invert `quantize_channels` to within half a step: (R, C) float32."""
    return np.asarray(codes * scale[0, 1] + scale[0, 0], dtype=np.float32)


def restored(
    codes: NDArray[np.uint8], scale: NDArray[np.float32], kind: str
) -> NDArray[np.float32]:
    """Invert the coding of a tap whose `TapSpec.scale` is `kind`, "row" or "block"."""
    return restore_rows(codes, scale) if kind == "row" else restore_channels(codes, scale)


def _range(
    values: NDArray[np.float32], axis: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    low = values.min(axis=axis)
    return low, ((values.max(axis=axis) - low) / np.float32(_TOP)).astype(np.float32)


def _codes(
    values: NDArray[np.float32], low: NDArray[np.float32], step: NDArray[np.float32]
) -> NDArray[np.uint8]:
    safe = np.where(step > 0, step, np.float32(1))
    return np.clip(np.rint((values - low) / safe), 0, _TOP).astype(np.uint8)


def stored_arrays(
    stored: Mapping[str, TapSpec], block: Block, records: Mapping[str, NDArray[Any]]
) -> dict[str, NDArray[Any]]:
    """Encode records as {array name: rows of the block}; raises as `arrays_to_store`.

    stored: taps of the cache. Raises ValueError if it does not contain a tap of `records`.
    """
    if unknown := set(records) - set(stored):
        raise ValueError(f"taps {sorted(unknown)} are not among {sorted(stored)}")
    return {
        array: values
        for tap, given in records.items()
        for array, values in arrays_to_store(tap, stored[tap], block, given).items()
    }


def arrays_to_store(
    tap: str, spec: TapSpec, block: Block, values: NDArray[Any]
) -> dict[str, NDArray[Any]]:
    """Encode a tap's records as {array name: rows of the block} in the stored dtypes.

    Raises ValueError if `values` does not have the tap's shape. Raises BadTeacherOutput (with tap,
    view and sample) if a value is not finite or overflows the dtype.
    """
    if values.shape != (block.rows, *spec.shape):
        raise ValueError(f"tap {tap} has shape {values.shape}, not {(block.rows, *spec.shape)}")
    stored = stored_values(tap, spec, block.view, block.start, values)
    if spec.top:
        cut = cut_rows(stored, spec.top)
        for name, part in cut.items():
            if part.dtype.kind == "f" and not np.isfinite(part).all():
                raise BadTeacherOutput(
                    f"the teacher's outputs of tap {tap}{name}, view {block.view}, block "
                    f"{block.index} do not fit {spec.dtype}"
                )
        return {tap + name: part for name, part in cut.items()}
    if spec.scale is None:
        return {tap: stored}
    with np.errstate(over="ignore", invalid="ignore"):  # checked below
        codes, scale = (quantize_rows if spec.scale == "row" else quantize_channels)(stored)
    if scale_fault(spec.scale, scale) is not None:
        raise _too_wide(tap, spec, block, stored)
    return {tap: codes, f"{tap}.scale": scale}


def _too_wide(
    tap: str, spec: TapSpec, block: Block, values: NDArray[np.float32]
) -> BadTeacherOutput:
    """Return the error for the row or channel whose range overflows float32."""
    axis = 1 if spec.scale == "row" else 0
    low, high = (extreme(values.astype(np.float64), axis) for extreme in (np.min, np.max))
    widest = int(np.argmax(high - low))
    where = f"sample {block.start + widest}" if axis else f"block {block.index}, channel {widest}"
    key = "logits" if tap == "logits" else "channel_means"
    return BadTeacherOutput(
        f"the teacher's outputs of tap {tap}, view {block.view}, {where} range from "
        f"{low[widest]:g} to {high[widest]:g}, which codes of {spec.dtype} cannot span",
        fix=f"taps.{key}=float32",
    )


def stored_values(
    tap: str, spec: TapSpec, view: int, start: int, values: NDArray[Any]
) -> NDArray[Any]:
    """Convert values (M, ...) of the samples from `start` on to the dtype that readers get.

    Raises BadTeacherOutput if a value is not finite or overflows that dtype.
    """
    with np.errstate(over="ignore"):
        stored = values.astype(spec.read_dtype)
    if stored.dtype.kind == "f" and not np.isfinite(stored).all():
        raise _bad_output(tap, spec, view, start, values, np.isfinite(stored))
    return stored


def _bad_output(
    tap: str,
    spec: TapSpec,
    view: int,
    start: int,
    values: NDArray[Any],
    finite: NDArray[np.bool_],
) -> BadTeacherOutput:
    """Return the error for the first value that is not finite after the conversion."""
    row = int(np.argwhere(~finite)[0][0])
    first = values[row].ravel()[np.argmax(~finite[row].ravel())]
    return BadTeacherOutput(
        f"the teacher's output {first} of tap {tap}, view {view}, sample {start + row} does not "
        f"fit {spec.dtype}"
    )
