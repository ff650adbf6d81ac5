"""Eight-bit codes are within half a step, exact if possible, and never out of range."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from teach_once.store import TapSpec, TeacherCache
from teach_once.store.errors import BadTeacherOutput
from teach_once.store.format.coding import (
    quantize_channels,
    quantize_rows,
    restore_channels,
    restore_rows,
)
from tests.support.caches.random_cache import DIGESTS, open_writer, records_of

FLOATS = st.floats(-1000, 1000, width=32)
TINY = 1e-36  # a step below float32's smallest normal number is lost


@given(arrays(np.float32, array_shapes(min_dims=2, max_dims=2, max_side=9), elements=FLOATS))
def test_rows_come_back_within_half_a_step(values: np.ndarray) -> None:
    codes, scale = quantize_rows(values)
    spread = values.max(axis=1, keepdims=True) - values.min(axis=1, keepdims=True)
    allowed = spread / 255 / 2 * 1.01 + np.abs(values).max() * 1e-6 + TINY
    assert (np.abs(restore_rows(codes, scale) - values) <= allowed).all()


@given(arrays(np.float32, array_shapes(min_dims=2, max_dims=2, max_side=9), elements=FLOATS))
def test_channels_come_back_within_half_a_step(values: np.ndarray) -> None:
    codes, scale = quantize_channels(values)
    spread = values.max(axis=0) - values.min(axis=0)
    allowed = spread / 255 / 2 * 1.01 + np.abs(values).max() * 1e-6 + TINY
    assert (np.abs(restore_channels(codes, scale) - values) <= allowed).all()


def test_by_hand() -> None:
    codes, scale = quantize_rows(np.array([[0, 51, 255], [7, 7, 7]], dtype=np.float32))
    assert codes.tolist() == [[0, 51, 255], [0, 0, 0]]
    assert scale.tolist() == [[0, 1], [7, 0]]
    assert restore_rows(codes, scale).tolist() == [[0, 51, 255], [7, 7, 7]]


def test_a_cache_of_codes_reads_as_float32_and_takes_a_quarter_of_the_bytes(tmp_path) -> None:
    taps = {"logits": TapSpec((3,), "uint8", "row"), "stage1": TapSpec((5,), "uint8", "block")}
    assert taps["stage1"].bytes_per_record == 5
    assert taps["logits"].bytes_per_record == 3 + 8
    with open_writer(tmp_path / "c", taps=taps) as writer:
        for item in writer.work:
            rows = records_of(item.block.view, slice(item.block.start, item.block.stop))
            writer.write_block(item.block, {tap: rows[tap] for tap in item.taps})
    opened = TeacherCache.open(tmp_path / "c")
    for tap, values in opened.read_view(1).items():
        exact = records_of(1, slice(None))[tap].astype(np.float32)
        assert values.dtype == np.float32
        assert 0 < np.abs(values - exact).max() < 0.02


def test_numbers_that_are_not_finite_are_refused_before_they_are_coded(tmp_path) -> None:
    taps = {"logits": TapSpec((3,), "uint8", "row")}
    values = np.zeros((4, 3), dtype=np.float32)
    values[1, 2] = np.inf
    with (
        open_writer(tmp_path / "c", taps=taps) as writer,
        pytest.raises(BadTeacherOutput, match="inf of tap logits, view 0, sample 1"),
    ):
        writer.write_block(writer.work[0].block, {"logits": values})


LARGEST = float(np.finfo(np.float32).max)


@pytest.mark.parametrize(("scale", "place"), [("row", "sample 1"), ("block", "block 0, channel 2")])
@pytest.mark.parametrize("extremes", [(-LARGEST, LARGEST), (-2e38, 1.5e38)])
def test_a_range_that_codes_cannot_span_is_refused_and_never_stored_as_nan(
    tmp_path: Path, scale: str, place: str, extremes: tuple[float, float]
) -> None:
    tap = {"row": "logits", "block": "stage1"}[scale]
    taps = {tap: TapSpec((3,), "uint8", scale)}
    values = np.ones((4, 3), dtype=np.float32)
    values[1, 2], values[1 if scale == "row" else 3, 2 if scale == "block" else 0] = extremes
    with (
        open_writer(tmp_path / "c", taps=taps) as writer,
        pytest.raises(BadTeacherOutput, match=f"{tap}, view 0, {place} range from") as error,
    ):
        writer.write_block(writer.work[0].block, {tap: values})
    assert str(error.value).endswith(
        f"fix: taps.{'logits' if scale == 'row' else 'channel_means'}=float32"
    )
    assert not list((tmp_path / "c" / "teacher.zarr").glob(f"{tap}*/c.*"))


def test_a_range_that_codes_just_span_is_stored_and_read_back(tmp_path: Path) -> None:
    taps = {"logits": TapSpec((3,), "uint8", "row")}
    values = np.tile(np.array([-1.6e38, 0, 1.6e38], dtype=np.float32), (11, 1))
    with open_writer(tmp_path / "c", taps=taps) as writer:
        for item in writer.work:
            rows = slice(item.block.start, item.block.stop)
            writer.write_block(item.block, {"logits": values[rows], "sample_digest": DIGESTS[rows]})
    read = TeacherCache.open(tmp_path / "c").read_view(0)["logits"]
    assert np.abs(read / np.float32(1e38) - values / np.float32(1e38)).max() <= 3.2 / 255 / 2 * 1.01


@pytest.mark.parametrize("low", [0.0, 1.0, -7.5])
def test_rows_of_the_smallest_ranges_come_back_as_their_lowest_value_or_nearer(low: float) -> None:
    tiny = np.array([low, np.nextafter(np.float32(low), np.float32(np.inf)), low], dtype=np.float32)
    for values in (tiny[None], tiny[:, None]):
        rows = restore_rows(*quantize_rows(values))
        channels = restore_channels(*quantize_channels(values))
        spread = values.max() - values.min()
        assert np.abs(rows - values).max() <= spread
        assert np.abs(channels - values).max() <= spread
    ordinary = np.array([[0, 1e-30, 2e-30]], dtype=np.float32)
    assert np.abs(restore_rows(*quantize_rows(ordinary)) - ordinary).max() <= 2e-30 / 255 / 2 * 1.01
