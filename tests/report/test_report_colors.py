"""The colors of the report's lines with the three kinds of dichromacy."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from teach_once.report.page_assets import DARK, DARK_PAPER, LIGHT, LIGHT_PAPER, STYLE

# Machado, Oliveira, Fernandes 2009, severity 1.0, on linear RGB.
SIGHTS = {
    "normal": np.eye(3),
    "protanopia": np.array(
        [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ]
    ),
    "deuteranopia": np.array(
        [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.011820, 0.042940, 0.968881],
        ]
    ),
    "tritanopia": np.array(
        [
            [1.255528, -0.076749, -0.178779],
            [-0.078411, 0.930809, 0.147602],
            [0.004733, 0.691367, 0.303900],
        ]
    ),
}
TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
WHITE = TO_XYZ.sum(axis=1)
SCHEMES = pytest.mark.parametrize(
    ("colors", "paper"), [(LIGHT, LIGHT_PAPER), (DARK, DARK_PAPER)], ids=["light", "dark"]
)


def linear(color: str) -> np.ndarray:
    values = np.array([int(color[at : at + 2], 16) for at in (1, 3, 5)]) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    """CIE 1976 L*a*b* of linear RGB."""
    xyz = TO_XYZ @ rgb / WHITE
    x, y, z = np.where(xyz > 216 / 24389, np.cbrt(xyz), xyz * 841 / 108 + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def contrast(one: str, other: str) -> float:
    """WCAG 2: from 1 to 21."""
    dark, bright = sorted(float(TO_XYZ[1] @ linear(color)) for color in (one, other))
    return (bright + 0.05) / (dark + 0.05)


def closest(colors: tuple[str, ...], sight: np.ndarray) -> float:
    seen = [lab(np.clip(sight @ linear(color), 0, 1)) for color in colors]
    return min(float(np.linalg.norm(a - b)) for a, b in itertools.combinations(seen, 2))


@pytest.mark.parametrize("sight", SIGHTS)
@SCHEMES
def test_any_two_colors_differ_with_any_sight(
    colors: tuple[str, ...], paper: str, sight: str
) -> None:
    assert closest(colors, SIGHTS[sight]) > 20  # 2.3 is just noticeable


@SCHEMES
def test_every_color_stands_out_from_the_page(colors: tuple[str, ...], paper: str) -> None:
    assert min(contrast(color, paper) for color in colors) >= 3
    assert f"--paper: {paper};" in STYLE


def test_the_measure_notices_colors_that_look_alike_to_some() -> None:
    red_and_green = ("#b03a2e", "#6b6b00")
    assert closest(red_and_green, SIGHTS["normal"]) > 20
    assert closest(red_and_green, SIGHTS["deuteranopia"]) < 15
