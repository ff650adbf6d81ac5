"""Views: compared with torchvision's pad, crop and flip; equal in numpy and torch."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch

from teach_once.configs.schema import Normalization, PadCropFlip, ViewsConfig
from teach_once.runtime.machine.torchvision_shim import import_torchvision
from teach_once.views.augment.augment import check_augmentable, pixel_canary
from teach_once.views.augment.crops import crop_and_flip
from teach_once.views.augment.parameters import view_of_epoch, view_parameters
from teach_once.views.pixels.batches import normalize
from teach_once.views.splits import array_split

import_torchvision()
from torchvision.transforms import functional as reference  # noqa: E402


def images_of(num: int, height: int = 32, width: int = 32, channels: int = 3) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (num, height, width, channels), dtype=np.uint8)


def all_parameters(augment: PadCropFlip) -> np.ndarray:
    side = 2 * augment.pad_px + 1
    flips = 2 if augment.flip else 1
    return np.array([(t, le, f) for t in range(side) for le in range(side) for f in range(flips)])


@pytest.mark.parametrize(("padding", "mode"), [("reflect", "reflect"), ("zero", "constant")])
@pytest.mark.parametrize(("height", "width", "pad_px"), [(32, 32, 4), (8, 10, 1), (5, 7, 4)])
def test_every_crop_and_flip_equals_torchvisions(
    padding: str, mode: str, height: int, width: int, pad_px: int
) -> None:
    augment = PadCropFlip(pad_px=pad_px, padding=padding)
    parameters = all_parameters(augment)
    image = images_of(1, height, width)
    views = crop_and_flip(np.repeat(image, len(parameters), axis=0), parameters, augment)
    chw = torch.from_numpy(image[0]).permute(2, 0, 1)
    padded = reference.pad(chw, [pad_px] * 4, padding_mode=mode)
    for view, (top, left, flip) in zip(views, parameters, strict=True):
        expected = reference.crop(padded, int(top), int(left), height, width)
        expected = reference.hflip(expected) if flip else expected
        assert (view == expected.permute(1, 2, 0).numpy()).all(), (top, left, flip)


def test_numpy_and_torch_give_the_same_bytes() -> None:
    images = images_of(64)
    for padding in ("reflect", "zero"):
        views = ViewsConfig(augment=PadCropFlip(padding=padding), seed=3)
        parameters = view_parameters(views, 2, 64)
        ours = crop_and_flip(images, parameters, views.augment)
        theirs = crop_and_flip(
            torch.from_numpy(images), torch.from_numpy(parameters), views.augment
        )
        assert theirs.dtype == torch.uint8
        assert (ours == theirs.numpy()).all()


def test_pixels_depend_on_neither_batch_nor_order() -> None:
    images = images_of(50)
    views = ViewsConfig(augment=PadCropFlip(), seed=5)
    parameters = view_parameters(views, 7, 50)
    whole = crop_and_flip(images, parameters, views.augment)
    order = np.random.default_rng(1).permutation(50)
    for size in (1, 7, 50):
        for start in range(0, 50, size):
            rows = order[start : start + size]
            part = crop_and_flip(images[rows], parameters[rows], views.augment)
            assert (part == whole[rows]).all()


def test_cifar_settings_have_162_views_each_shown_once() -> None:
    views = ViewsConfig(augment=PadCropFlip(pad_px=4, padding="zero"), seed=0, count="all")
    assert views.num_views == 162
    image = np.arange(1, 32 * 32 * 3 + 1).reshape(1, 32, 32, 3).astype(np.uint8)
    shown = {
        crop_and_flip(image, view_parameters(views, v, 1), views.augment).tobytes()
        for v in range(162)
    }
    assert len(shown) == 162


def test_parameters_are_the_golden_ones() -> None:
    views = ViewsConfig(augment=PadCropFlip(pad_px=4), seed=1)
    assert view_parameters(views, 0, 4).tolist() == [[1, 8, 1], [7, 7, 1], [4, 7, 0], [6, 1, 0]]


def test_pixels_are_the_golden_ones() -> None:
    images = (np.arange(2 * 8 * 8).reshape(2, 8, 8, 1) % 251).astype(np.uint8)
    views = ViewsConfig(augment=PadCropFlip(pad_px=2), seed=1)
    pixels = crop_and_flip(images, view_parameters(views, 3, 2), views.augment)
    assert hashlib.sha256(pixels.tobytes()).hexdigest() == GOLDEN_PIXELS


GOLDEN_PIXELS = "054c76f6c93911f3fa996baac7958e23eaa90ff12de85dda63f2f72a553e644a"


def test_epochs_walk_through_the_views_and_begin_again() -> None:
    assert [view_of_epoch(epoch, 3) for epoch in (1, 2, 3, 4)] == [0, 1, 2, 0]


def test_normalization_is_that_of_the_formula_in_channels_last_memory() -> None:
    image = torch.tensor([[[[0, 255, 51]]]], dtype=torch.uint8)
    out = normalize(image, Normalization(mean=(0.5, 0.5, 0.2), std=(0.5, 0.25, 1.0)))
    assert out.flatten().tolist() == pytest.approx([-1.0, 2.0, 0.0], abs=1e-7)
    batch = normalize(
        torch.zeros(2, 4, 4, 3, dtype=torch.uint8),
        Normalization(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)),
    )
    assert batch.shape == (2, 3, 4, 4)
    assert batch.is_contiguous(memory_format=torch.channels_last)


def test_the_canary_notices_one_changed_pixel_of_a_sample_it_looks_at() -> None:
    images = images_of(4)
    views = ViewsConfig(augment=PadCropFlip(), seed=0)
    labels = np.zeros(4, dtype=np.int64)
    before = pixel_canary(array_split(images, labels, "four"), views)
    changed = images.copy()
    changed[2, 16, 16, 0] ^= 1
    after = pixel_canary(array_split(changed, labels, "four"), views)
    assert before["samples"] == [0, 1, 2, 3]
    assert before != after


def test_an_image_too_small_to_reflect_is_refused() -> None:
    with pytest.raises(ValueError, match="by at most 7"):
        check_augmentable((8, 8, 1), PadCropFlip(pad_px=8, padding="reflect"))
