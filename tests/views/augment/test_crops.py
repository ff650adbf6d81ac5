"""Resized and center crops: pinned boxes, and torchvision's pixels for the same box."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from PIL import Image

from teach_once.configs.schema import Border, CenterCrop, RandomResizedCrop, Squash, ViewsConfig
from teach_once.runtime.machine.torchvision_shim import import_torchvision
from teach_once.views.augment.augment import view_pixels
from teach_once.views.augment.crops import (
    CROP_DRAWS,
    bordered,
    center_crop,
    cut_and_resize,
    resized_crop_box,
)
from teach_once.views.seeds import draws, unit
from teach_once.views.splits import DatasetError, array_split
from tests.support.datasets.images import image_of

import_torchvision()
from timm.data.transforms_factory import transforms_imagenet_eval  # noqa: E402
from torchvision import transforms  # noqa: E402
from torchvision.transforms import functional as reference  # noqa: E402


def boxes_of(augment: RandomResizedCrop, num: int, height: int, width: int) -> np.ndarray:
    words = draws(0, 0, num, CROP_DRAWS)
    return np.array([resized_crop_box(row, height, width, augment) for row in words])


def test_boxes_are_the_golden_ones() -> None:
    boxes = boxes_of(RandomResizedCrop(size_px=32), 4, 375, 500)
    assert boxes.tolist() == GOLDEN_BOXES


GOLDEN_BOXES = [[26, 214, 140, 121], [19, 1, 351, 459], [23, 129, 286, 359], [76, 223, 250, 222]]


@pytest.mark.parametrize(("height", "width"), [(375, 500), (64, 64), (500, 120)])
def test_boxes_lie_inside_and_have_the_area_and_ratio_asked_for(height: int, width: int) -> None:
    augment = RandomResizedCrop(scale=(0.2, 0.5), ratio=(0.5, 2.0))
    top, left, box_height, box_width = boxes_of(augment, 2000, height, width).T
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + box_height <= height).all()
    assert (left + box_width <= width).all()
    area, ratio = box_height * box_width / (height * width), box_width / box_height
    assert 0.19 < area.min() < 0.22
    assert 0.47 < area.max() < 0.51
    assert ratio.min() > 0.48
    assert ratio.max() < 2.05


def test_boxes_are_distributed_as_torchvisions() -> None:
    augment = RandomResizedCrop()
    ours = boxes_of(augment, 4000, 300, 400)
    image = torch.zeros(3, 300, 400)
    torch.manual_seed(0)
    theirs = np.array(
        [
            transforms.RandomResizedCrop.get_params(image, list(augment.scale), list(augment.ratio))
            for _ in range(4000)
        ]
    )
    for ours_of, theirs_of in zip(ours.T, theirs.T, strict=True):
        deviation = np.hypot(ours_of.std(), theirs_of.std()) / np.sqrt(4000)
        assert abs(ours_of.mean() - theirs_of.mean()) < 4 * deviation


def test_where_no_attempt_fits_the_middle_is_taken_as_torchvision_does() -> None:
    augment = RandomResizedCrop(scale=(1.0, 1.0), ratio=(3.0, 4.0))
    for height, width in ((100, 100), (400, 90)):
        expected = transforms.RandomResizedCrop.get_params(
            torch.zeros(3, height, width), [1.0, 1.0], [3.0, 4.0]
        )
        box = resized_crop_box(draws(0, 0, 1, CROP_DRAWS)[0], height, width, augment)
        assert tuple(box) == expected


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_resized_crop_has_torchvisions_bytes(interpolation: str, channels: int) -> None:
    augment = RandomResizedCrop(size_px=48, interpolation=interpolation)
    image = image_of(90, 130, channels)
    picture = Image.fromarray(image[:, :, 0] if channels == 1 else image)
    mode = transforms.InterpolationMode(interpolation)
    for box in (resized_crop_box(row, 90, 130, augment) for row in draws(1, 0, 20, CROP_DRAWS)):
        expected = reference.resized_crop(picture, *box, [48, 48], interpolation=mode)
        ours = cut_and_resize(image, box, augment)
        assert (ours == np.asarray(expected).reshape(48, 48, channels)).all()


def test_without_antialiasing_it_is_torchs_bilinear_sampling_to_a_level() -> None:
    augment = RandomResizedCrop(size_px=24, antialias=False)
    image = image_of(90, 130)
    chw = torch.from_numpy(image).permute(2, 0, 1).float()
    for box in (resized_crop_box(row, 90, 130, augment) for row in draws(1, 0, 20, CROP_DRAWS)):
        expected = reference.resized_crop(chw, *box, [24, 24], antialias=False)
        difference = cut_and_resize(image, box, augment) - expected.permute(1, 2, 0).numpy()
        assert np.abs(difference).max() < 1.001


@pytest.mark.parametrize(("height", "width"), [(90, 131), (131, 90), (57, 57)])
def test_a_center_crop_has_torchvisions_bytes(height: int, width: int) -> None:
    image = image_of(height, width)
    ours = center_crop(image, CenterCrop(resize_px=57, crop_px=50), "x.jpg")
    resized = reference.resize(Image.fromarray(image), 57)
    assert (ours == np.asarray(reference.center_crop(resized, [50, 50]))).all()


def test_center_without_a_crop_leaves_the_image_and_a_small_image_is_refused_by_name() -> None:
    image = image_of(20, 30)
    assert center_crop(image, CenterCrop(), "x.jpg") is image
    with pytest.raises(
        DatasetError, match=r"x\.jpg is 30x20, too small .*\n  fix: set .*resize_px="
    ):
        center_crop(image, CenterCrop(crop_px=24), "x.jpg")


def test_pixels_of_a_whole_view_are_the_golden_ones() -> None:
    images = np.stack([image_of(40, 60)] * 3)
    split = array_split(images, np.zeros(3, dtype=np.int64), "waves")
    views = ViewsConfig(augment=RandomResizedCrop(size_px=16), seed=2)
    pixels = view_pixels(split, views, 1, np.arange(3))
    assert pixels.shape == (3, 16, 16, 3)
    assert hashlib.sha256(pixels.tobytes()).hexdigest() == GOLDEN_PIXELS


GOLDEN_PIXELS = "6f1513ef1e2392057f6b7ac8778c2c9ef316095d16c718719d6a8c4ff0821a0b"


def test_half_of_the_views_are_flipped_and_a_flip_mirrors_the_same_crop() -> None:
    images = np.stack([image_of(40, 60)] * 400)
    split = array_split(images, np.zeros(400, dtype=np.int64), "waves")
    with_flips, without = (
        view_pixels(
            split, ViewsConfig(augment=RandomResizedCrop(size_px=8, flip=flip)), 0, np.arange(400)
        )
        for flip in (True, False)
    )
    mirrored = (with_flips == without[:, :, ::-1]).all(axis=(1, 2, 3))
    same = (with_flips == without).all(axis=(1, 2, 3))
    assert (mirrored ^ same).all()
    assert 150 < mirrored.sum() < 250


def test_units_are_the_upper_bits_of_the_words() -> None:
    words = np.array([0, 2**63, 2**64 - 1], dtype=np.uint64)
    assert unit(words).tolist() == [0.0, 0.5, 1.0 - 2.0**-53]


@pytest.mark.parametrize("shape", [(40, 60), (61, 33), (33, 61), (24, 24), (7, 90)])
@pytest.mark.parametrize("resize_px", [24, 27])
@pytest.mark.parametrize("kind", ["squash", "border"])
def test_squash_and_border_give_timms_evaluation_pixels(
    kind: str, resize_px: int, shape: tuple[int, int]
) -> None:
    mean = (0.48, 0.45, 0.41)
    theirs = transforms_imagenet_eval(
        24, 24 / resize_px, kind, interpolation="bicubic", mean=mean, normalize=False
    )
    image = image_of(*shape)
    settings = {"resize_px": resize_px, "crop_px": 24, "interpolation": "bicubic"}
    color = tuple(round(255 * each) for each in mean)
    augment = Squash(**settings) if kind == "squash" else Border(**settings, fill=color)
    split = array_split(image[None], np.zeros(1, dtype=np.int64), "x")
    (ours,) = view_pixels(split, ViewsConfig(augment=augment, count=1), 0, np.array([0]))
    assert np.array_equal(ours, theirs(Image.fromarray(image)).permute(1, 2, 0).numpy())


def test_a_bordered_image_of_extreme_proportions_keeps_a_row() -> None:
    augment = Border(resize_px=24, crop_px=24, fill=(1, 2, 3))
    (ours,) = [bordered(np.full((1, 900, 3), 9, dtype=np.uint8), augment)]
    assert (ours == 9).all(axis=2).any(axis=1).tolist().count(True) == 1
    assert (ours[0, 0] == (1, 2, 3)).all()
