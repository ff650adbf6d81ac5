"""Image folders at half size: every pixel is the mean of four pixels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.results.__main__ import cli


def test_pixels_are_means_of_four(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    source, dest = tmp_path / "whole", tmp_path / "half"
    (source / "train/cat").mkdir(parents=True)
    Image.fromarray(pixels).save(source / "train/cat/1.png")
    assert cli(["half-size", str(source), str(dest)]) == 0
    with Image.open(dest / "train/cat/1.png") as image:
        half = np.asarray(image, dtype=np.float64)
    means = pixels.reshape(3, 2, 4, 2, 3).mean((1, 3))
    assert half.shape == (3, 4, 3)
    assert np.abs(half - means).max() <= 0.5


def test_a_second_call_makes_only_what_is_missing(tmp_path: Path) -> None:
    source, dest = tmp_path / "whole", tmp_path / "half"
    source.mkdir()
    for name in ("a.jpg", "b.jpg"):
        Image.new("RGB", (4, 4)).save(source / name)
    assert cli(["half-size", str(source), str(dest)]) == 0
    first = (dest / "a.png").stat()
    (dest / "b.png").unlink()
    assert cli(["half-size", str(source), str(dest)]) == 0
    assert (dest / "a.png").stat().st_mtime_ns == first.st_mtime_ns
    assert {each.name for each in dest.iterdir()} == {"a.png", "b.png"}


def test_a_folder_without_images_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli(["half-size", str(tmp_path), str(tmp_path / "half")]) == 2
    assert "contains no images" in capsys.readouterr().err
