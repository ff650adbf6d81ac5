"""Erasing, mixup and cutmix: correct boxes and weights, equal bytes in numpy and torch."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from scipy import stats

from teach_once.configs.schema import CenterCrop, Mix, PadCropFlip, RandomErasing, ViewsConfig
from teach_once.runtime.machine.torchvision_shim import import_torchvision
from teach_once.views.augment.augment import finish, view_pixels
from teach_once.views.augment.mixing import erased, erased_boxes, mixed, mixes, other_shares
from teach_once.views.augment.parameters import view_parameters
from teach_once.views.splits import array_split

import_torchvision()
from torchvision.transforms import functional as reference  # noqa: E402

H, W = 24, 36


def images_of(num: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (num, H, W, channels), dtype=np.uint8)


def test_an_erased_box_is_filled_as_torchvision_fills_it() -> None:
    images, fill = images_of(200), np.array([1, 2, 3], dtype=np.uint8)
    boxes = erased_boxes(RandomErasing(probability=0.7), 0, 0, np.arange(200), H, W)
    ours = erased(images, boxes, fill)
    for image, box, view in zip(images, boxes.tolist(), ours, strict=True):
        chw = torch.from_numpy(image).permute(2, 0, 1)
        value = torch.from_numpy(fill)[:, None, None]
        expected = reference.erase(chw, *box, value) if box[2] else chw
        assert (view == expected.permute(1, 2, 0).numpy()).all()


def test_erased_boxes_have_the_probability_areas_and_ratios_asked_for() -> None:
    erasing = RandomErasing(probability=0.3, scale=(0.1, 0.2), ratio=(0.5, 2.0))
    boxes = erased_boxes(erasing, 1, 0, np.arange(20_000), 100, 200)
    _, _, heights, widths = boxes[boxes[:, 2] > 0].T
    assert abs((boxes[:, 2] > 0).mean() - 0.3) < 0.01
    areas, ratios = heights * widths / 20_000, heights / widths
    assert 0.098 < areas.min() < 0.102
    assert 0.198 < areas.max() < 0.203
    assert 0.48 < ratios.min() < 0.53
    assert 1.9 < ratios.max() < 2.1
    assert (boxes[:, 0] + boxes[:, 2] <= 100).all()
    assert (boxes[:, 1] + boxes[:, 3] <= 200).all()


def test_erased_boxes_are_the_same_however_many_samples_are_drawn_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ids = np.random.default_rng(0).permutation(100)[:10]
    whole = erased_boxes(RandomErasing(probability=0.7), 0, 0, ids, H, W)
    monkeypatch.setattr("teach_once.views.augment.mixing._SAMPLES_PER_CHUNK", 4)
    assert (erased_boxes(RandomErasing(probability=0.7), 0, 0, ids, H, W) == whole).all()
    assert (whole[4:, 2] > 0).any()


def test_a_box_that_never_fits_erases_nothing() -> None:
    erasing = RandomErasing(probability=1.0, scale=(1.0, 1.0), ratio=(1.0, 1.0))
    assert (erased_boxes(erasing, 0, 0, np.arange(50), 8, 8) == 0).all()


@pytest.mark.parametrize("alpha", [0.2, 1.0, 3.0])
def test_shares_follow_the_beta_distribution(alpha: float) -> None:
    share = mixes(Mix(type="mixup", alpha=alpha), 0, 0, 200_000, np.arange(200_000), H, W)[:, 1]
    edges = (np.arange(257) + 0.5) / 256
    expected = np.diff(stats.beta(alpha, alpha).cdf(np.concatenate([[0.0], edges])))
    found = np.bincount(share, minlength=257) / len(share)
    assert np.abs(np.cumsum(found) - np.cumsum(expected)).max() < 1.63 / np.sqrt(len(share))


def test_nobody_is_mixed_with_himself_and_everybody_may_be_a_partner() -> None:
    partners = np.stack(
        [mixes(Mix(type="mixup"), 0, view, 7, np.arange(7), H, W)[:, 0] for view in range(200)]
    )
    assert (partners != np.arange(7)).all()
    for sample in range(7):
        assert set(partners[:, sample]) == set(range(7)) - {sample}
    assert mixes(Mix(type="mixup"), 0, 0, 1, np.arange(1), H, W)[:, 0].tolist() == [0]


def test_mixup_is_the_weighted_mean_to_half_a_level() -> None:
    images, partners = images_of(50), images_of(100)[50:]
    rows = mixes(Mix(type="mixup"), 0, 0, 50, np.arange(50), H, W)
    share = rows[:, 1, None, None, None] / 256
    assert (
        np.abs(mixed(images, partners, rows) - (share * images + (1 - share) * partners)).max()
        <= 0.5
    )
    assert other_shares(rows, H, W) == pytest.approx(1 - rows[:, 1] / 256)


def test_cutmix_pastes_a_box_whose_area_is_the_partners_share() -> None:
    images, partners = np.zeros((500, H, W, 1), np.uint8), np.ones((500, H, W, 1), np.uint8)
    rows = mixes(Mix(type="cutmix"), 0, 0, 500, np.arange(500), H, W)
    found = mixed(images, partners, rows)
    assert found.mean(axis=(1, 2, 3)) == pytest.approx(other_shares(rows, H, W))
    for view, (top, left, height, width) in zip(found, rows[:, 2:].tolist(), strict=True):
        assert view[top : top + height, left : left + width].all()
    # Without the cut at the edges the share would be uniform; with it, it is smaller.
    assert 0.15 < found.mean() < 0.5


def test_what_is_not_chosen_is_left_alone() -> None:
    images, partners = images_of(100), images_of(200)[100:]
    rows = mixes(Mix(type="mixup", probability=0.25), 0, 0, 100, np.arange(100), H, W)
    same = (mixed(images, partners, rows) == images).all(axis=(1, 2, 3))
    assert (same == (other_shares(rows, H, W) == 0)).all()
    assert 60 < same.sum() < 90


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_numpy_and_torch_give_the_same_bytes(kind: str) -> None:
    augment = PadCropFlip(random_erasing=RandomErasing(probability=0.5), mix=Mix(type=kind))
    images = images_of(64)
    table = view_parameters(ViewsConfig(augment=augment), 3, 64, (H, W))
    partners = table[:, 7]
    arguments = (images, table, images[partners], table[partners])
    ours = finish(*arguments, augment)
    theirs = finish(*(torch.from_numpy(argument) for argument in arguments), augment)
    assert theirs.dtype == torch.uint8
    assert (ours == theirs.numpy()).all()


def test_a_mixed_view_is_made_of_both_samples_own_views() -> None:
    images = images_of(6)
    split = array_split(images, np.zeros(6, dtype=np.int64), "noise")
    mix = ViewsConfig(augment=PadCropFlip(mix=Mix(type="cutmix")), seed=4)
    plain = ViewsConfig(augment=PadCropFlip(), seed=4)
    views, whole = (view_pixels(split, config, 2, np.arange(6)) for config in (mix, plain))
    table = view_parameters(mix, 2, 6, (H, W))
    for view, own, row in zip(views, whole, table, strict=True):
        top, left, height, width = row[9:]
        expected = own.copy()
        box = (slice(top, top + height), slice(left, left + width))
        expected[box] = whole[row[7]][box]
        assert (view == expected).all()


def test_pixels_are_the_golden_ones() -> None:
    split = array_split(images_of(5), np.zeros(5, dtype=np.int64), "noise")
    digest = hashlib.sha256()
    for kind in ("mixup", "cutmix"):
        augment = CenterCrop(
            flip=True, random_erasing=RandomErasing(probability=0.5), mix=Mix(type=kind)
        )
        digest.update(
            view_pixels(split, ViewsConfig(augment=augment, seed=1), 1, np.arange(5)).tobytes()
        )
    assert digest.hexdigest() == GOLDEN_PIXELS


GOLDEN_PIXELS = "633c7edf72d8b3b5603dc92e69f16f97840f2df70aa77d10b33d7f8d55b42c66"
