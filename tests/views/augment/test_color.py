"""Color jitter and trivial-augment give torchvision's bytes for the same parameters."""

from __future__ import annotations

import hashlib
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from teach_once.configs.schema import ColorJitter, PadCropFlip, TrivialAugment, ViewsConfig
from teach_once.runtime.machine.torchvision_shim import import_torchvision
from teach_once.views.augment.augment import view_pixels
from teach_once.views.augment.color import (
    JITTER_DRAWS,
    TRIVIAL_DRAWS,
    TRIVIAL_KINDS,
    JitterStep,
    TrivialStep,
    jitter_steps,
    jittered,
    trivial_step,
    trivially_augmented,
)
from teach_once.views.seeds import JITTER_STREAM, TRIVIAL_STREAM, draws
from teach_once.views.splits import array_split
from tests.support.datasets.images import image_of

import_torchvision()
from torchvision.transforms import InterpolationMode, autoaugment  # noqa: E402
from torchvision.transforms import functional as reference  # noqa: E402

ADJUST = {
    "brightness": reference.adjust_brightness,
    "contrast": reference.adjust_contrast,
    "saturation": reference.adjust_saturation,
    "hue": reference.adjust_hue,
}
JITTER = ColorJitter(brightness=0.4, contrast=0.3, saturation=1.5, hue=0.1)


def steps_of(jitter: ColorJitter, num: int) -> list[list[JitterStep]]:
    return [
        jitter_steps(row, jitter) for row in draws(0, 0, num, JITTER_DRAWS, stream=JITTER_STREAM)
    ]


def test_jitter_has_torchvisions_bytes_for_the_same_factors_in_the_same_order() -> None:
    picture = Image.fromarray(image_of(40, 30))
    for steps in steps_of(JITTER, 30):
        expected = picture
        for kind, amount in steps:
            expected = ADJUST[kind](expected, amount / 1024)
        assert (np.asarray(jittered(picture, steps)) == np.asarray(expected)).all()


def test_strengths_fill_their_ranges_and_orders_are_all_there() -> None:
    every = steps_of(JITTER, 2000)
    assert len({tuple(kind for kind, _ in steps) for steps in every}) == 24
    for kind, low, high in (
        ("brightness", 0.6, 1.4),
        ("contrast", 0.7, 1.3),
        ("saturation", 0.0, 2.5),
        ("hue", -0.1, 0.1),
    ):
        amounts = np.array([dict(steps)[kind] for steps in every]) / 1024
        width = high - low
        assert low - 0.001 <= amounts.min() < low + width / 50
        assert high - width / 50 < amounts.max() <= high + 0.001
        assert abs(amounts.mean() - (low + high) / 2) < width / 50


def test_what_is_zero_is_left_out_and_gray_pictures_keep_their_hue() -> None:
    only = steps_of(ColorJitter(contrast=0.5), 3)
    assert [[step.kind for step in steps] for steps in only] == [["contrast"]] * 3
    gray = Image.fromarray(image_of(9, 9, 1)[:, :, 0])
    turned = jittered(gray, [JitterStep("hue", 100), JitterStep("saturation", 100)])
    assert (np.asarray(turned) == np.asarray(gray)).all()


NAMES = {
    "identity": "Identity",
    "shear-x": "ShearX",
    "shear-y": "ShearY",
    "translate-x": "TranslateX",
    "translate-y": "TranslateY",
    "rotate": "Rotate",
    "brightness": "Brightness",
    "saturation": "Color",
    "contrast": "Contrast",
    "sharpness": "Sharpness",
    "posterize": "Posterize",
    "solarize": "Solarize",
    "autocontrast": "AutoContrast",
    "equalize": "Equalize",
}


@pytest.mark.parametrize("kind", TRIVIAL_KINDS)
def test_every_operation_and_strength_equals_torchvisions(kind: str) -> None:
    space = autoaugment.TrivialAugmentWide()._augmentation_space(31)
    theirs, signed = space[NAMES[kind]]
    # The same strengths, but not rounded to float32, which would tip pixels here and there.
    ends = (float(theirs[0]), float(theirs[-1])) if theirs.ndim else (0.0, 0.0)
    magnitudes = theirs.numpy() if kind == "posterize" else np.linspace(*np.round(ends, 6), 31)
    picture = Image.fromarray(image_of(64, 48))
    for number in range(31):
        for sign in (1, -1) if signed else (1,):
            magnitude = float(magnitudes[number]) * sign
            expected = autoaugment._apply_op(
                picture, NAMES[kind], magnitude, InterpolationMode.NEAREST, None
            )
            ours = trivially_augmented(picture, TrivialStep(kind, number, sign), TrivialAugment())
            assert (np.asarray(ours) == np.asarray(expected)).all(), (kind, number, sign)


def test_operations_strengths_and_signs_are_drawn_evenly() -> None:
    words = draws(0, 0, 14_000, TRIVIAL_DRAWS, stream=TRIVIAL_STREAM)
    steps = [trivial_step(row, TrivialAugment()) for row in words]
    kinds = Counter(step.kind for step in steps)
    assert set(kinds) == set(TRIVIAL_KINDS) == set(NAMES)
    assert min(kinds.values()) > 850
    assert max(kinds.values()) < 1150
    assert {step.bin for step in steps} == set(range(31))
    assert {step.sign for step in steps if step.kind == "rotate"} == {1, -1}
    assert {step.sign for step in steps if step.kind == "posterize"} == {1}


def test_pixels_are_the_golden_ones() -> None:
    split = array_split(np.stack([image_of(16, 16)] * 4), np.zeros(4, dtype=np.int64), "waves")
    augment = PadCropFlip(trivial_augment=TrivialAugment(), color_jitter=JITTER)
    pixels = view_pixels(split, ViewsConfig(augment=augment, seed=3), 2, np.arange(4))
    assert hashlib.sha256(pixels.tobytes()).hexdigest() == GOLDEN_PIXELS


GOLDEN_PIXELS = "f127d66229738b1f2bae4597b1f9b44b785a1f108035f45e813a2e464180e53e"


def test_without_color_the_same_crop_comes_out() -> None:
    split = array_split(np.stack([image_of(16, 16)] * 4), np.zeros(4, dtype=np.int64), "waves")
    plain = PadCropFlip()
    idle = PadCropFlip(color_jitter=ColorJitter())
    for view in (0, 5):
        views = [
            view_pixels(split, ViewsConfig(augment=a), view, np.arange(4)) for a in (plain, idle)
        ]
        assert (views[0] == views[1]).all()
