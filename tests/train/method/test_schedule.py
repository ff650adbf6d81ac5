"""Loss weights and learning rates over a run, compared with published settings."""

from __future__ import annotations

import pytest

from teach_once.configs.schema import LossTerm, MultiStep, OneCycle, StudentTraining
from teach_once.train.engine.step import active_terms
from teach_once.train.schedule import learning_rate_at, weight_at


def test_edt_as_in_the_imagenet_recipe() -> None:
    ce = LossTerm(loss="ce", start_epoch=31)
    cd = LossTerm(loss="cd", weight=6.0, decay=0.9, decay_epochs=(30, 60, 90))
    assert [weight_at(ce, e) for e in (1, 30, 31, 100)] == [0.0, 0.0, 1.0, 1.0]
    assert [weight_at(cd, e) for e in (1, 29, 30, 60, 90, 100)] == pytest.approx(
        [6.0, 6.0, 5.4, 4.86, 4.374, 4.374]
    )


def test_a_weight_that_starts_late_and_warms_up_rises_from_its_start() -> None:
    term = LossTerm(loss="dkd", weight=2.0, start_epoch=3, warmup_epochs=4)
    weights = [weight_at(term, epoch) for epoch in range(1, 9)]
    assert weights == pytest.approx([0, 0, 0.5, 1.0, 1.5, 2.0, 2.0, 2.0])


def test_without_decay_a_weight_stays() -> None:
    assert weight_at(LossTerm(loss="cd", weight=6.0, decay_epochs=(2,)), 50) == 6.0


def test_a_term_of_weight_zero_is_left_out() -> None:
    terms = (LossTerm(loss="ce", start_epoch=3), LossTerm(loss="cd"), LossTerm(loss="kd", weight=0))
    assert [name for name, _, _ in active_terms(terms, 1)] == ["cd"]
    assert [name for name, _, _ in active_terms(terms, 3)] == ["ce", "cd"]


def recipe(schedule: MultiStep | OneCycle) -> StudentTraining:
    return StudentTraining(epochs=10, batch_size=1, learning_rate=0.1, schedule=schedule)


def test_multistep_falls_after_its_milestones() -> None:
    training = recipe(MultiStep(type="multistep", milestones=(3, 6), gamma=0.2))
    rates = [learning_rate_at(training, 5 * (epoch - 1), 5) for epoch in (1, 3, 4, 6, 7)]
    assert rates == pytest.approx([0.1, 0.1, 0.02, 0.02, 0.004])
    assert learning_rate_at(training, 14, 5) == 0.1  # the last step of epoch 3


def test_onecycle_rises_to_the_peak_and_falls_to_nearly_nothing() -> None:
    training = recipe(OneCycle(type="onecycle", warmup_fraction=0.3))
    rates = [learning_rate_at(training, step, 10) for step in range(100)]
    assert max(rates) == pytest.approx(0.1, rel=1e-3)
    assert rates.index(max(rates)) == 30
    assert rates[0] < 0.01
    assert rates[-1] < 0.001
    assert all(rate > 0 for rate in rates)
