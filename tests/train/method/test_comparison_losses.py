"""at, rkd, fitnets, dkd, dist, lskd: float64 re-derivations, gradients, invariances, known traps.

The references are written with loops and probabilities in numpy: another road than the code's.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from teach_once.nets.teacher.taps import spatial_attention
from teach_once.train import losses
from teach_once.train.losses import at, dist, dkd, fitnets, kd, lskd, rkd
from tests.support.training.reference_losses import kl64, logits_pair, softmax64

SEEDS = st.integers(0, 10**6)
Array = np.ndarray


def both(a: Array, b: Array) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(a), torch.tensor(b)


def close(found: torch.Tensor, expected: float) -> None:
    assert found.item() == pytest.approx(expected, rel=1e-6, abs=1e-9)


# ---- at


@given(seed=SEEDS)
def test_at_equals_its_formula(seed: int) -> None:
    rng = np.random.default_rng(seed)
    maps = [(rng.normal(size=(3, 4, 2, 5)), rng.normal(size=(3, 7, 2, 5))) for _ in range(2)]
    expected = 0.0
    for pair in maps:
        rows = []
        for features in pair:
            attention = np.array(
                [
                    [(image[:, y, x] ** 2).mean() for y in range(2) for x in range(5)]
                    for image in features
                ]
            )
            rows.append(attention / np.sqrt((attention**2).sum(axis=1, keepdims=True)))
        expected += ((rows[0] - rows[1]) ** 2).mean()
    attentions = [[spatial_attention(torch.tensor(pair[i])) for pair in maps] for i in (0, 1)]
    assert at(*attentions).item() == pytest.approx(expected, rel=1e-5)


def test_at_does_not_see_the_scale_of_a_map_and_survives_a_dead_one() -> None:
    maps = torch.randn(2, 3, 4, 4)
    assert at([spatial_attention(maps)], [spatial_attention(7 * maps)]).item() < 1e-12
    dead = torch.zeros(2, 3, 4, 4, requires_grad=True)
    at([spatial_attention(dead)], [spatial_attention(maps)]).backward()
    assert dead.grad is not None
    assert torch.isfinite(dead.grad).all()


# ---- rkd


def smooth_l1(x: float) -> float:
    return 0.5 * x * x if abs(x) < 1 else abs(x) - 0.5


def distances64(points: Array) -> Array:
    table = np.array([[np.linalg.norm(a - b) for b in points] for a in points])
    return table / table[table > 0].mean() if (table > 0).any() else table


def cosines64(points: Array) -> Array:
    n = len(points)
    found = np.zeros((n, n, n))
    for i, j, k in itertools.product(range(n), repeat=3):
        a, b = points[j] - points[i], points[k] - points[i]
        lengths = np.linalg.norm(a) * np.linalg.norm(b)
        found[i, j, k] = a @ b / lengths if lengths else 0.0
    return found


@given(seed=SEEDS, batch=st.integers(2, 6))
def test_rkd_equals_its_formula(seed: int, batch: int) -> None:
    rng = np.random.default_rng(seed)
    student, teacher = rng.normal(0, 2, (batch, 3)), rng.normal(0, 2, (batch, 5))
    by_distance = np.vectorize(smooth_l1)(distances64(student) - distances64(teacher)).mean()
    by_angle = np.vectorize(smooth_l1)(cosines64(student) - cosines64(teacher)).mean()
    found = rkd(*both(student, teacher), distance_weight=2.0, angle_weight=3.0)
    close(found, 2 * by_distance + 3 * by_angle)


def test_rkd_sees_neither_rotation_nor_shift_nor_scale() -> None:
    torch.manual_seed(0)
    points = torch.randn(8, 4, dtype=torch.float64)
    rotation, _ = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))
    assert rkd(points, 3 * points @ rotation + 5).item() < 1e-12
    assert rkd(points, points.flip(0)).item() > 1.0


def test_rkd_of_one_sample_or_of_equal_ones_is_finite_with_finite_gradient() -> None:
    for student in (torch.randn(1, 4), torch.ones(3, 4)):
        student = student.clone().requires_grad_()
        loss = rkd(student, torch.randn(len(student), 6))
        loss.backward()
        assert math.isfinite(loss.item())
        assert student.grad is not None
        assert torch.isfinite(student.grad).all()
    assert rkd(torch.randn(1, 4), torch.randn(1, 6)).item() == 0.0


def test_rkd_in_pieces_is_the_same_with_the_same_gradient(monkeypatch) -> None:
    student, teacher = torch.randn(9, 4, requires_grad=True), torch.randn(9, 5)
    rkd(student, teacher).backward()
    whole = student.grad.clone()
    student.grad = None
    monkeypatch.setattr(losses, "_TRIPLETS_AT_ONCE", 2 * 81)
    rkd(student, teacher).backward()
    assert torch.allclose(student.grad, whole, rtol=1e-4, atol=1e-5)


def test_rkd_of_bfloat16_numbers_is_that_of_the_same_numbers_in_float32() -> None:
    torch.manual_seed(1)
    student, teacher = (torch.randn(32, 16).bfloat16() for _ in range(2))
    assert rkd(student, teacher).item() == rkd(student.float(), teacher.float()).item()


def test_rkd_of_points_far_from_the_origin_is_that_of_the_same_points_around_it() -> None:
    torch.manual_seed(2)
    student, teacher = torch.randn(2, 16, 8)
    assert abs(rkd(student + 1000, teacher).item() - rkd(student, teacher).item()) < 1e-2


@pytest.mark.parametrize(("distance", "has_direction"), [(1e-4, False), (1e-2, True)])
def test_rkd_of_points_that_almost_coincide_has_no_direction_between_them(
    distance: float, has_direction: bool
) -> None:
    points = torch.eye(8)
    points[1] = points[0] + distance  # far below, inverse distances and gradients are rounding
    _, inverse = losses._products_and_lengths(points)
    assert bool(inverse[0, 1] > 0) == has_direction
    assert (inverse[2:, 0] > 0).all()


def test_rkd_costs_no_product_over_dimensions_for_each_triplet() -> None:
    student, teacher = torch.randn(32, 4096), torch.randn(32, 4096)
    with FlopCounterMode(display=False) as counted:
        rkd(student, teacher)
    products, rank_two = 4 * 2 * 32**2 * 4096, 2 * 2 * 2 * 32**3  # of two networks
    assert counted.get_total_flops() <= products + rank_two


# ---- fitnets


def test_fitnets_is_the_mean_of_squares_over_all_numbers() -> None:
    student, teacher = torch.zeros(2, 3, 4, 4), torch.full((2, 3, 4, 4), 2.0).half()
    assert fitnets(student, teacher).item() == 4.0


# ---- dkd


@given(seed=SEEDS, batch=st.integers(1, 6), classes=st.integers(2, 8))
def test_dkd_equals_its_formula(seed: int, batch: int, classes: int) -> None:
    student, teacher = logits_pair(seed, batch, classes)
    labels = np.random.default_rng(seed).integers(0, classes, batch)
    expected = 0.0
    p_t, p_s = softmax64(teacher / 4), softmax64(student / 4)
    for row, label in enumerate(labels):
        t, s = p_t[row, label], p_s[row, label]
        target = t * math.log(t / s) + (1 - t) * math.log((1 - t) / (1 - s))
        rest = [c for c in range(classes) if c != label]
        other = sum(
            p_t[row, c] / (1 - t) * math.log((p_t[row, c] / (1 - t)) / (p_s[row, c] / (1 - s)))
            for c in rest
        )
        expected += 16 * (1.5 * target + 8 * other) / batch
    close(dkd(*both(student, teacher), torch.tensor(labels), alpha=1.5), expected)


@given(seed=SEEDS)
def test_kd_is_dkd_with_the_teachers_own_weight_on_the_others(seed: int) -> None:
    student, teacher = logits_pair(seed, 1, 6)
    label = torch.tensor([2])
    beta = 1 - float(softmax64(teacher / 4)[0, 2])
    assert dkd(*both(student, teacher), label, 1.0, beta).item() == pytest.approx(
        kd(*both(student, teacher)).item(), rel=1e-6
    )


def test_dkd_of_a_certain_teacher_is_finite() -> None:
    teacher = torch.tensor([[300.0, 0.0, -10.0]])
    student = torch.tensor([[-200.0, 3.0, 100.0]], requires_grad=True)
    loss = dkd(student, teacher, torch.tensor([0]))
    loss.backward()
    assert math.isfinite(loss.item())
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()


# ---- dist


@given(seed=SEEDS, batch=st.integers(2, 6), classes=st.integers(2, 8))
def test_dist_equals_its_formula(seed: int, batch: int, classes: int) -> None:
    student, teacher = logits_pair(seed, batch, classes)
    p_s, p_t = softmax64(student / 2), softmax64(teacher / 2)
    if p_s.std(axis=0).min() < 1e-6 or p_t.std(axis=0).min() < 1e-6:
        return
    rows = np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(p_s, p_t, strict=True)])
    columns = np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(p_s.T, p_t.T, strict=True)])
    assert dist(*both(student, teacher), 2.0).item() == pytest.approx(
        4 * ((1 - rows) + (1 - columns)), rel=1e-5, abs=1e-7
    )


def test_dist_of_the_teacher_itself_is_zero_and_of_one_sample_is_finite() -> None:
    teacher = torch.randn(5, 4, dtype=torch.float64)
    assert abs(dist(teacher, teacher).item()) < 1e-9
    alone = torch.randn(1, 4, requires_grad=True)
    dist(alone, torch.randn(1, 4)).backward()
    assert alone.grad is not None
    assert torch.isfinite(alone.grad).all()
    even = torch.zeros(3, 4, requires_grad=True)
    dist(even, torch.randn(3, 4)).backward()
    assert torch.isfinite(even.grad).all()


# ---- lskd


@given(seed=SEEDS, batch=st.integers(1, 6), classes=st.integers(2, 8))
def test_lskd_equals_its_formula(seed: int, batch: int, classes: int) -> None:
    pair = logits_pair(seed, batch, classes)
    student, teacher = (
        (z - z.mean(axis=1, keepdims=True)) / (z.std(axis=1, keepdims=True, ddof=1) + 1e-7)
        for z in pair
    )
    close(lskd(*both(*pair)), float(4 * kl64(student, teacher, 2.0).mean()))


def test_lskd_does_not_see_shift_and_scale() -> None:
    logits = torch.randn(4, 6, dtype=torch.float64)
    assert lskd(logits, 9 * logits - 3).item() < 1e-9


# ---- gradients


GRADIENTS = {
    "at": lambda s, t, y: at([s.square() + 0.1], [t.square()]),
    "rkd": lambda s, t, y: rkd(s, t),
    "fitnets": lambda s, t, y: fitnets(s, t),
    "dkd": lambda s, t, y: dkd(s, t, y),
    "dist": lambda s, t, y: dist(s, t, 2.0),
    "lskd": lambda s, t, y: lskd(s, t),
    "kd": lambda s, t, y: kd(s, t),
    "ce of mixed images": lambda s, t, y: losses.ce(
        s, y, y.flip(0), torch.tensor([0.3] * 5).double()
    ),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    torch.manual_seed(2)
    student, teacher = (torch.randn(5, 4, dtype=torch.float64) for _ in range(2))
    labels = torch.tensor([0, 3, 1, 1, 2])
    assert torch.autograd.gradcheck(
        lambda s: GRADIENTS[name](s, teacher, labels), student.requires_grad_()
    )


@pytest.mark.parametrize("loss", [kd, dist, lskd])
def test_all_logit_losses_are_zero_for_a_perfect_student(loss) -> None:
    logits = torch.randn(4, 6, dtype=torch.float64)
    assert abs(loss(logits, logits).item()) < 1e-9
