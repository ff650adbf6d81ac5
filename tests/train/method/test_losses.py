"""Losses compared with hand-computed values and float64 derivations, including edge cases."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from teach_once.train.errors import TrainError
from teach_once.train.losses import cd, ce, gkd, kd
from tests.support.training.reference_losses import kl64, logits_pair, softmax64


def test_cross_entropy_of_even_odds_is_log_2() -> None:
    assert ce(torch.zeros(3, 2), torch.tensor([0, 1, 0])).item() == pytest.approx(math.log(2))


@given(seed=st.integers(0, 10**6), batch=st.integers(1, 9))
def test_cross_entropy_of_mixed_images_weighs_both_labels(seed: int, batch: int) -> None:
    logits, _ = logits_pair(seed, batch, 5)
    rng = np.random.default_rng(seed)
    own, other = rng.integers(0, 5, (2, batch))
    shares = rng.random(batch) / 2
    wanted = np.zeros((batch, 5))  # what fraction of an image shows which class
    np.add.at(wanted, (np.arange(batch), own), 1 - shares)
    np.add.at(wanted, (np.arange(batch), other), shares)
    expected = -(wanted * np.log(softmax64(logits))).sum(axis=1).mean()
    found = ce(*map(torch.tensor, (logits, own, other, shares)))
    assert found.item() == pytest.approx(expected, rel=1e-9)


def test_kd_by_hand() -> None:
    # teacher (3/4, 1/4), student (1/2, 1/2): KL = 3/4 log 3/2 + 1/4 log 1/2
    teacher = torch.tensor([[math.log(3.0), 0.0]])
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert kd(torch.zeros(1, 2), teacher, temperature=1.0).item() == pytest.approx(expected)


@given(
    seed=st.integers(0, 10**6),
    batch=st.integers(1, 9),
    classes=st.integers(2, 12),
    temperature=st.floats(0.5, 8),
)
def test_kd_equals_the_float64_reference(
    seed: int, batch: int, classes: int, temperature: float
) -> None:
    student, teacher = logits_pair(seed, batch, classes)
    expected = temperature**2 * kl64(student, teacher, temperature).mean()
    found = kd(torch.tensor(student).float(), torch.tensor(teacher).float(), temperature)
    assert found.item() == pytest.approx(expected, rel=1e-4, abs=1e-5)


@given(seed=st.integers(0, 10**6), batch=st.integers(1, 9))
def test_gkd_is_the_mean_over_the_samples_that_the_teacher_gets_right(
    seed: int, batch: int
) -> None:
    student, teacher = logits_pair(seed, batch, 5)
    right = np.random.default_rng(seed).integers(0, 2, batch).astype(bool)
    per_sample = kl64(student, teacher, 1.0)
    expected = per_sample[right].mean() if right.any() else 0.0
    found = gkd(torch.tensor(student), torch.tensor(teacher), torch.tensor(right))
    assert found.item() == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_gkd_with_no_right_sample_is_exactly_zero_with_zero_gradient() -> None:
    student = torch.randn(4, 3, requires_grad=True)
    loss = gkd(student, torch.randn(4, 3), torch.zeros(4, dtype=torch.uint8))
    loss.backward()
    assert loss.item() == 0.0
    assert student.grad is not None
    assert (student.grad == 0).all()


def test_gkd_ignores_what_a_wrong_teacher_says_even_if_that_is_extreme() -> None:
    student = torch.randn(2, 3, requires_grad=True)
    teacher = torch.tensor([[1.0, 0.0, 0.0], [1e4, -1e4, 0.0]])
    loss = gkd(student, teacher, torch.tensor([1, 0], dtype=torch.uint8))
    loss.backward()
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()
    assert (student.grad[1] == 0).all()


def test_a_teacher_whose_probabilities_underflow_gives_the_true_divergence() -> None:
    # softmax of [150, 0, -10] is (1, 0, 0) in float32; KL to even odds is log 3, not 3.30.
    teacher = torch.tensor([[150.0, 0.0, -10.0]])
    right = torch.tensor([True])
    assert gkd(torch.zeros(1, 3), teacher, right).item() == pytest.approx(math.log(3), abs=1e-6)
    assert kd(torch.zeros(1, 3), teacher, 1.0).item() == pytest.approx(math.log(3), abs=1e-6)


def test_with_one_class_there_is_nothing_to_learn() -> None:
    one = torch.randn(4, 1)
    labels = torch.zeros(4, dtype=torch.int64)
    assert ce(one, labels).item() == 0.0
    assert kd(one, torch.randn(4, 1)).item() == 0.0
    assert gkd(one, torch.randn(4, 1), torch.ones(4)).item() == 0.0


def test_a_batch_of_one_is_its_own_mean() -> None:
    student, teacher = torch.randn(1, 5), torch.randn(1, 5)
    assert gkd(student, teacher, torch.ones(1)).item() == pytest.approx(
        kd(student, teacher, 1.0).item()
    )


def test_cd_by_hand() -> None:
    student = [torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0]])]
    teacher = [torch.tensor([[0.0, 4.0]]), torch.tensor([[3.0]])]
    assert cd(student, teacher).item() == pytest.approx((1 + 4) / 2 + 9)


def test_cd_normalized_divides_each_stage_by_its_mean_square() -> None:
    student = [torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0]])]
    teacher = [torch.tensor([[1.0, 2.0]]), torch.tensor([[4.0]])]
    found = cd(student, teacher, (2.5, 16.0), normalize=True)
    assert found.item() == pytest.approx(2.5 / 2.5 + 9 / 16)
    assert cd(student, teacher, (2.5, 16.0)).item() == pytest.approx(2.5 + 9)
    for unusable in ((), (2.5,), (2.5, 0.0)):
        with pytest.raises(TrainError, match="a mean square above 0 for each of 2 stages"):
            cd(student, teacher, unusable, normalize=True)


def test_cd_equals_the_float64_reference() -> None:
    rng = np.random.default_rng(2)
    student = [rng.normal(size=(6, c)) for c in (4, 8, 16)]
    teacher = [rng.normal(size=(6, c)) for c in (4, 8, 16)]
    expected = sum(((s - t) ** 2).mean() for s, t in zip(student, teacher, strict=True))
    found = cd([torch.tensor(s) for s in student], [torch.tensor(t) for t in teacher])
    assert found.item() == pytest.approx(expected, rel=1e-6)


def test_cd_refuses_stages_that_do_not_pair_up() -> None:
    with pytest.raises(ValueError, match="zip"):
        cd([torch.zeros(1, 2)], [torch.zeros(1, 2), torch.zeros(1, 2)])


def test_losses_compute_in_float32_when_given_bfloat16() -> None:
    student, teacher = torch.randn(8, 10), torch.randn(8, 10)
    rough = kd(student.bfloat16(), teacher.bfloat16())
    exact = kd(student.bfloat16().float(), teacher.bfloat16().float())
    assert rough.dtype == torch.float32
    assert rough.item() == exact.item()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_means_of_16_bits_give_the_loss_of_the_same_means_in_float32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    student, teacher = (100 * torch.rand(64, 32) for _ in range(2))
    rounded = [student.to(dtype)], [teacher.to(dtype)]
    exact = [np.float64(each[0].float()) for each in rounded]
    expected = np.square(exact[0] - exact[1]).mean()
    assert cd(*rounded).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("loss", ["kd", "gkd", "cd"])
def test_gradients_agree_with_finite_differences(loss: str) -> None:
    # float32 inside, so a coarse step and tolerance; a wrong sign or factor still shows.
    torch.manual_seed(0)
    student = torch.randn(3, 4, requires_grad=True)
    teacher = torch.randn(3, 4)
    compute = {
        "kd": lambda s: kd(s, teacher),
        "gkd": lambda s: gkd(s, teacher, torch.tensor([1, 0, 1])),
        "cd": lambda s: cd([s], [teacher]),
    }[loss]
    compute(student).backward()
    assert student.grad is not None
    step = 1e-2
    for index in np.ndindex(3, 4):
        up, down = student.detach().clone(), student.detach().clone()
        up[index] += step
        down[index] -= step
        slope = (compute(up) - compute(down)) / (2 * step)
        assert student.grad[index].item() == pytest.approx(slope.item(), rel=2e-2, abs=1e-3)
