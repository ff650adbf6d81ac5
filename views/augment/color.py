"""Color jitter and trivial-augment on one image: draws -> integers, (image, integers) -> image.

Both use Pillow's operations on uint8. The integers are strengths in 1,024ths and numbers of
operations, so a view can be described exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageOps

from teach_once.configs.schema import ColorJitter, TrivialAugment
from teach_once.views.seeds import unit

JITTER_DRAWS = 8  # four strengths, then four keys that order the operations
TRIVIAL_DRAWS = 3  # operation, strength, sign
_UNIT = 1024


class JitterStep(NamedTuple):
    """A step of color jitter: brightness, contrast, saturation or hue; amount in 1,024ths."""

    kind: str
    amount: int


class TrivialStep(NamedTuple):
    """An operation of trivial-augment, the bin of its strength, and -1 for a reversed sign."""

    kind: str
    bin: int
    sign: int


def jitter_steps(words: NDArray[np.uint64], jitter: ColorJitter) -> list[JitterStep]:
    """Return the steps for one view, in order; `words` are JITTER_DRAWS draws of (sample, view).

    Factors are in [max(0, 1 - x), 1 + x] and the hue is in [-x, x] of a turn. Steps with x = 0 are
    omitted.
    """
    ranges = {
        "brightness": _factors(jitter.brightness),
        "contrast": _factors(jitter.contrast),
        "saturation": _factors(jitter.saturation),
        "hue": (-jitter.hue, jitter.hue),
    }
    drawn = unit(words[:4]).tolist()
    steps = [
        JitterStep(kind, round(_UNIT * (low + (high - low) * at)))
        for (kind, (low, high)), at in zip(ranges.items(), drawn, strict=True)
    ]
    order = np.argsort(words[4:], kind="stable")
    return [steps[i] for i in order if ranges[steps[i].kind][0] < ranges[steps[i].kind][1]]


def jittered(picture: Image.Image, steps: list[JitterStep]) -> Image.Image:
    """Apply the steps in order. Saturation and hue leave a gray picture unchanged."""
    for kind, amount in steps:
        if kind == "hue":
            picture = _hue_turned(picture, amount / _UNIT)
        else:
            picture = _ENHANCERS[kind](picture).enhance(amount / _UNIT)
    return picture


def trivial_step(words: NDArray[np.uint64], trivial: TrivialAugment) -> TrivialStep:
    """Return the operation for one view; `words` are TRIVIAL_DRAWS draws of (sample, view).

    Source: Mueller and Hutter 2021, "TrivialAugment: Tuning-free Yet State-of-the-Art Data
    Augmentation", with the wide space of strengths.
    """
    operation, strength, sign = (int(word) for word in words)
    kind = TRIVIAL_KINDS[operation % len(TRIVIAL_KINDS)]
    turned = kind in _SIGNED and sign % 2 == 1
    return TrivialStep(kind, strength % trivial.bins, -1 if turned else 1)


def trivially_augmented(
    picture: Image.Image, step: TrivialStep, trivial: TrivialAugment
) -> Image.Image:
    """Apply one operation; pixels from outside the picture are black."""
    kind, number, sign = step
    strength = number / (trivial.bins - 1)
    return _OPERATIONS[kind](picture, strength * sign if kind in _SIGNED else strength)


def _factors(width: float) -> tuple[float, float]:
    return max(0.0, 1.0 - width), 1.0 + width


def _hue_turned(picture: Image.Image, turns: float) -> Image.Image:
    """Shift the hue, a circle of 256 steps, by a fraction of a turn."""
    if picture.mode == "L":
        return picture
    hue, saturation, value = picture.convert("HSV").split()
    turned = np.asarray(hue) + np.uint8(int(turns * 255) % 256)
    return Image.merge("HSV", (Image.fromarray(turned), saturation, value)).convert("RGB")


def _mapped(picture: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
    return picture.transform(picture.size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST)


def _shear_x(picture: Image.Image, at: float) -> Image.Image:
    return _mapped(picture, (1.0, 0.99 * at, 0.0, 0.0, 1.0, 0.0))


def _shear_y(picture: Image.Image, at: float) -> Image.Image:
    return _mapped(picture, (1.0, 0.0, 0.0, 0.99 * at, 1.0, 0.0))


def _translate_x(picture: Image.Image, at: float) -> Image.Image:
    return _mapped(picture, (1.0, 0.0, -float(int(32.0 * at)), 0.0, 1.0, 0.0))


def _translate_y(picture: Image.Image, at: float) -> Image.Image:
    return _mapped(picture, (1.0, 0.0, 0.0, 0.0, 1.0, -float(int(32.0 * at))))


def _rotate(picture: Image.Image, at: float) -> Image.Image:
    return picture.rotate(135.0 * at, Image.Resampling.NEAREST)


def _enhanced(kind: str) -> Callable[[Image.Image, float], Image.Image]:
    return lambda picture, at: _ENHANCERS[kind](picture).enhance(1.0 + 0.99 * at)


def _posterize(picture: Image.Image, at: float) -> Image.Image:
    return ImageOps.posterize(picture, 8 - round(6 * at))


def _solarize(picture: Image.Image, at: float) -> Image.Image:
    threshold = 255.0 - round(255.0 * at, 6)  # 187, not 187.00000000000003
    return ImageOps.solarize(picture, threshold)  # type: ignore[arg-type]


_ENHANCERS: dict[str, Callable[[Image.Image], ImageEnhance._Enhance]] = {
    "brightness": ImageEnhance.Brightness,
    "contrast": ImageEnhance.Contrast,
    "saturation": ImageEnhance.Color,
    "sharpness": ImageEnhance.Sharpness,
}

_OPERATIONS: dict[str, Callable[[Image.Image, float], Image.Image]] = {
    "identity": lambda picture, at: picture,
    "shear-x": _shear_x,
    "shear-y": _shear_y,
    "translate-x": _translate_x,
    "translate-y": _translate_y,
    "rotate": _rotate,
    "brightness": _enhanced("brightness"),
    "saturation": _enhanced("saturation"),
    "contrast": _enhanced("contrast"),
    "sharpness": _enhanced("sharpness"),
    "posterize": _posterize,
    "solarize": _solarize,
    "autocontrast": lambda picture, at: ImageOps.autocontrast(picture),
    "equalize": lambda picture, at: ImageOps.equalize(picture),
}
TRIVIAL_KINDS = tuple(_OPERATIONS)
_SIGNED = frozenset(TRIVIAL_KINDS[1:10])
