"""A student trained by several processes equals one trained by a single process."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

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
from tests.support.shortened import TEST_IMAGES
from tests.support.training.rank_training import Asked, Found, train_on_ranks, trained

# A learning rate that does not amplify rounding; 60 digits, in batches of 16: the last one is 12.
SHORT = (
    *("training.epochs=2", "training.batch_size=16", "training.learning_rate=1e-3"),
    *("training.schedule.milestones=[1]",),
    *(f"methods.cd+gkd+edt.{term}.start_epoch=2" for term in (0, 1)),
)
# What has state of its own, or looks at a batch in parts; and losses of a user's.
HARD = (
    *("training.gradient_accumulation=3", "training.ema.decay=0.9", "training.max_grad_norm=0.5"),
    *("training.optimizer={type: adamw}", "training.freeze_idle_classifier=false"),
    "methods.own=[{loss: ce}, {loss: 'tests.support.own_losses:spread'},"
    " {loss: 'tests.support.own_losses:centered'}]",
)
MIXED = "views.augment={type: pad-crop-flip, pad_px: 1, flip: false, mix: {type: mixup}}"
# In percent of the digits that are tested: those that rounding may move to another class.
TWO_IMAGES = 100 * 2.1 / TEST_IMAGES
# Every loss at once, but for that of a pair of students: a term is compared by its own name.
EVERY_LOSS = (
    "methods.all=[{loss: ce}, {loss: kd, weight: 1, temperature: 4}, {loss: at, weight: 60},"
    " {loss: fitnets, weight: 1}, {loss: rkd, distance_weight: 25, angle_weight: 50},"
    " {loss: cd, weight: 6}, {loss: gkd, weight: 0.1}, {loss: dkd, alpha: 1, beta: 2,"
    " temperature: 4, warmup_epochs: 5}, {loss: dist, weight: 2, temperature: 4},"
    " {loss: lskd, weight: 9, temperature: 2}]"
)
TAPS = (
    *("taps.logits=float32", "taps.channel_means=float32", "taps.attention=float32"),
    "taps.hint={stage: stage2, dtype: float32}",
)


class Study(Protocol):
    """Makes a study of small digits, and its cache."""

    def __call__(
        self, methods: Sequence[str], student: Sequence[str], *teacher: str, **options: object
    ) -> Asked: ...


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("caches")


@pytest.fixture(scope="module")
def study(
    small_teacher: Callable[..., TeacherConfig], teacher_weights: Path, caches: Path
) -> Study:
    def study(
        methods: Sequence[str], student: Sequence[str], *teacher: str, **options: object
    ) -> Asked:
        overrides = [*TAPS, "views.count=3", *teacher]
        make_cache(small_teacher(*overrides), caches)
        small = [
            "teacher.arch=resnet8",
            f"teacher.weights={teacher_weights}",
            "dataset.max_per_class=6",
        ]
        return Asked([*small, *overrides], [*SHORT, *student], str(caches), methods, **options)

    return study


@pytest.fixture(scope="module")
def asked(study: Study, photographs: Path, caches: Path) -> list[Asked]:
    """Every loss; some with all that makes a step harder; images to read."""
    return [
        study(["all"], [EVERY_LOSS]),
        study(["residual"], ()),
        study(["cd+gkd+edt", "own"], HARD, "dataset.validation_fraction=0.3"),
        study(["cd+gkd", "rkd"], ["training.gradient_accumulation=2"], MIXED),
        study(["cd+gkd"], (), placement="window"),
        study(["kd"], (), seed=1, placement="host"),
        study(["kd"], (), live=True),
        of_photographs(photographs, caches),
    ]


def of_photographs(root: Path, caches: Path) -> Asked:
    """Images that workers read and cut, in batches of 7, 7 and 6."""
    weights = caches / "rgb.pt"
    save_atomically(build("resnet8", num_classes=2, in_channels=3).state_dict(), weights)
    _, teacher = configs_of(root, weights, {**PLAIN, "mix": {"type": "cutmix"}})
    make_cache(teacher, caches)
    assert teacher.source is not None
    student = [*SHORT, "training.batch_size=7", "training.epochs=3"]
    return Asked(list(teacher.source.overrides), student, str(caches), ["cd+gkd"], workers=1)


def test_three_processes_train_every_loss_as_one_does(asked: list[Asked], tmp_path: Path) -> None:
    methods = load_student("digits-resnet8", [EVERY_LOSS]).methods
    shipped = {term.loss for name, terms in methods.items() if name != "all" for term in terms}
    assert {term.loss for term in methods["all"]} == shipped - {"residual"}
    assert_ranks_train_as_one(3, asked, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("world", [2, 3])
def test_several_processes_train_every_method_as_one_does(
    world: int, study: Study, tmp_path: Path
) -> None:
    methods = list(load_student("digits-resnet8").methods)
    assert len(methods) == 12
    assert_ranks_train_as_one(world, [study(methods, ())], tmp_path)


def assert_ranks_train_as_one(world: int, asked: list[Asked], folder: Path) -> None:
    alone = trained(asked, folder / "alone")
    together = train_on_ranks(world, asked, folder / "together")
    assert set(together) == set(alone)
    assert len(alone) == sum(len(each.methods) for each in asked)
    for name, one in alone.items():
        assert_the_same(one, together[name], name)


def assert_the_same(one: Found, other: Found, where: str) -> None:
    assert one.sha256 == other.sha256
    assert len(one.step_losses) > 4
    # Rounding grows with each step, by a factor that depends on the processor.
    for step, (loss, theirs) in enumerate(zip(one.step_losses, other.step_losses, strict=True)):
        assert theirs == pytest.approx(loss, rel=min(1e-5 * 2**step, 1e-3)), (where, step)
    assert np.abs(np.subtract(one.errors, other.errors)).max() <= TWO_IMAGES, where
    assert set(one.weights) == set(other.weights)
    for name, tensors in one.weights.items():
        for key, weight in tensors.items():
            close = torch.allclose(weight, other.weights[name][key], rtol=1e-3, atol=1e-3)
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
    training = dataclasses.replace(recipe, batch_size=batch_size, gradient_accumulation=num_parts)
    with pytest.raises(TrainError, match=f"training.batch_size is {batch_size}") as refusal:
        check_idle_ranks(training, 60, world)
    if better is None:
        assert refusal.value.fix == "use fewer processes or more images"
        return
    assert refusal.value.fix == f"set training.batch_size={better}, or use fewer processes"
    check_idle_ranks(dataclasses.replace(training, batch_size=better), 60, world)


def test_batch_norm_of_its_own_needs_two_samples_on_each_rank() -> None:
    recipe = load_student("digits-resnet8", ["training.batch_size=8"]).training
    check_idle_ranks(recipe, 60, 4)
    with pytest.raises(TrainError, match="has a batch without 2 samples, for its own batch norm,"):
        check_idle_ranks(dataclasses.replace(recipe, batch_norm="local"), 60, 4)
