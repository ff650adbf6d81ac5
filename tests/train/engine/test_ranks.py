"""A student trained by several processes is the one that a single process trains."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from teach_once.configs.load import load_student
from teach_once.configs.schema import TeacherConfig
from teach_once.nets.networks.zoo import build
from teach_once.nets.weights.files import save_atomically
from teach_once.train.engine.idle_ranks import check_idle_ranks
from teach_once.train.engine.ranks import ALONE, Ranks
from teach_once.train.engine.slices import Slices
from teach_once.train.errors import TrainError
from teach_once.views.pixels.batches import ViewBatch
from tests.support.caches.teacher_cache import make_cache
from tests.support.datasets.photograph_study import PLAIN, configs_of
from tests.support.training.rank_training import Asked, Found, train_on_ranks, trained
from tests.support.training.training_runs import largest_relative

# A learning rate that does not amplify rounding; 60 digits, in batches of 16: the last one is 12.
SHORT = (
    *("training.epochs=2", "training.batch_size=16", "training.learning_rate=1e-3"),
    *("training.schedule.milestones=[1]",),
    *(f"methods.cd+gkd+edt.{term}.start_epoch=2" for term in (0, 1)),
)
# What has state of its own, or looks at a batch in parts; and losses of a user's.
HARD = (
    *("training.accumulate=3", "training.ema.decay=0.9", "training.clip_gradient_norm=0.5"),
    *("training.optimizer={kind: adamw}", "training.freeze_idle_classifier=false"),
    "methods.own=[{loss: ce}, {loss: 'tests.support.own_losses:spread'},"
    " {loss: 'tests.support.own_losses:centred'}]",
)
MIXED = "views.augment={kind: pad-crop-flip, pad_px: 1, flip: false, mix: {kind: mixup}}"
# Of the digits' 797 test images, in percent: those that rounding may move to another class.
TWO_IMAGES = 0.26
TAPS = (
    *("taps.logits=float32", "taps.means=float32", "taps.energy=float32"),
    "taps.hint={stage: stage2, dtype: float32}",
)


@pytest.fixture(scope="module")
def asked(
    small_teacher: Callable[..., TeacherConfig],
    teacher_weights: Path,
    photographs: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> list[Asked]:
    """Every method of the digits file; some with all that makes a step harder; images to read."""
    caches = tmp_path_factory.mktemp("caches")

    def study(
        methods: Sequence[str], student: Sequence[str], *teacher: str, **options: object
    ) -> Asked:
        overrides = [*TAPS, "views.count=3", *teacher]
        make_cache(small_teacher(*overrides), caches)
        small = ["teacher.arch=resnet8", f"teacher.weights={teacher_weights}", "dataset.limit=6"]
        return Asked([*small, *overrides], [*SHORT, *student], str(caches), methods, **options)

    return [
        study(list(load_student("digits-resnet8").methods), ()),
        study(["cd+gkd+edt", "own"], HARD, "dataset.validation_fraction=0.3"),
        study(["cd+gkd", "rkd"], ["training.accumulate=2"], MIXED),
        study(["cd+gkd"], (), feed="window"),
        study(["kd"], (), seed=1, feed="host"),
        study(["kd"], (), live=True),
        of_photographs(photographs, caches),
    ]


def of_photographs(root: Path, caches: Path) -> Asked:
    """Images that workers read and cut, in batches of 7, 7 and 6."""
    weights = caches / "rgb.pt"
    save_atomically(build("resnet8", num_classes=2, in_channels=3).state_dict(), weights)
    _, teacher = configs_of(root, weights, {**PLAIN, "mix": {"kind": "cutmix"}})
    make_cache(teacher, caches)
    assert teacher.source is not None
    student = [*SHORT, "training.batch_size=7", "training.epochs=3"]
    return Asked(list(teacher.source.overrides), student, str(caches), ["cd+gkd"], workers=1)


@pytest.fixture(scope="module")
def alone(asked: list[Asked], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Found]:
    return trained(asked, tmp_path_factory.mktemp("alone"))


@pytest.mark.parametrize("world", [pytest.param(2, marks=pytest.mark.long), 3])
def test_every_method_is_trained_as_by_one_process(
    world: int, asked: list[Asked], alone: dict[str, Found], tmp_path: Path
) -> None:
    together = train_on_ranks(world, asked, tmp_path)
    assert set(together) == set(alone)
    assert len(alone) == 12 + 2 + 2 + 2 + 1 + 1
    for name, one in alone.items():
        assert_the_same(one, together[name], name)


def assert_the_same(one: Found, other: Found, where: str) -> None:
    assert one.sha256 == other.sha256
    assert len(one.step_losses) > 4
    assert largest_relative(one.step_losses, other.step_losses) < 1e-5, where
    assert np.abs(np.subtract(one.errors, other.errors)).max() <= TWO_IMAGES, where
    assert set(one.weights) == set(other.weights)
    for name, tensors in one.weights.items():
        for key, weight in tensors.items():
            close = torch.allclose(weight, other.weights[name][key], rtol=1e-4, atol=1e-4)
            assert close, (where, name, key)
    for losses, others in zip(one.losses, other.losses, strict=True):
        assert losses == pytest.approx(others, rel=1e-4), where


# ---- which samples are whose


@pytest.mark.parametrize(("batch_size", "num_parts"), [(16, 1), (16, 3), (60, 4), (7, 1)])
def test_the_ranks_have_every_sample_once_and_each_part_is_that_of_one_process(
    batch_size: int, num_parts: int
) -> None:
    order = np.random.default_rng(0).permutation(60)
    alone = Slices(ALONE, batch_size, num_parts)
    expected = [part.ids for batch in batches_of(alone, order) for part in parts_of(alone, batch)]
    of_each = []
    for rank in range(3):
        slices = Slices(Ranks(rank, 3), batch_size, num_parts)
        of_each.append([p.ids for b in batches_of(slices, order) for p in parts_of(slices, b)])
    for number, ids in enumerate(expected):
        pieces = [of_one[number] for of_one in of_each]
        assert torch.equal(torch.cat(pieces), ids)
        assert max(map(len, pieces)) - min(map(len, pieces)) <= 1


def batches_of(slices: Slices, order: np.ndarray) -> list[tuple[ViewBatch, int]]:
    """This rank's share of each batch of an epoch, and the size of the whole batch."""
    sizes = iter([slices.batch_size] * (len(order) // slices.batch_size) + [len(order)])
    found = []
    for ids, own_size in slices.of_epoch(order):
        for start in range(0, len(ids), own_size):
            some = torch.from_numpy(ids[start : start + own_size])
            batch = ViewBatch(0, some, some, some.float(), some)
            whole = min(next(sizes), len(order) - sum(size for _, size in found))
            found.append((batch, whole))
    return found


def parts_of(slices: Slices, batch: tuple[ViewBatch, int]) -> list[ViewBatch]:
    return [part for part, _ in slices.parts(*batch)]


@pytest.mark.parametrize(
    ("world", "batch_size", "num_parts", "better"),
    [(4, 59, 1, 60), (2, 2, 2, 4), (8, 27, 1, 30), (61, 60, 1, None)],
)
def test_a_batch_with_fewer_samples_than_ranks_is_refused_with_a_size_that_fits(
    world: int, batch_size: int, num_parts: int, better: int | None
) -> None:
    recipe = load_student("digits-resnet8").training
    training = dataclasses.replace(recipe, batch_size=batch_size, accumulate=num_parts)
    with pytest.raises(TrainError, match=f"training.batch_size is {batch_size}") as refusal:
        check_idle_ranks(training, 60, world)
    if better is None:
        assert refusal.value.fix == "fewer processes, or more images"
        return
    assert refusal.value.fix == f"training.batch_size={better}, or fewer processes"
    check_idle_ranks(dataclasses.replace(training, batch_size=better), 60, world)


def test_batch_norm_of_its_own_needs_two_samples_on_each_rank() -> None:
    recipe = load_student("digits-resnet8", ["training.batch_size=8"]).training
    check_idle_ranks(recipe, 60, 4)
    with pytest.raises(TrainError, match="does not have 2 samples, for its own batch norm,"):
        check_idle_ranks(dataclasses.replace(recipe, batch_norm="local"), 60, 4)
